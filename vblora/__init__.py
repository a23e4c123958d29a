"""VB-LoRA: adapters of some kilobytes, composed from one vector bank (arXiv 2405.15179)."""

from vblora.adapter import Adapter, attach
from vblora.methods import LoRAXSConfig, TiedLoRAConfig, VBLoRAConfig
from vblora.optim import AdamW, param_groups
from vblora.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "AdamW",
    "Adapter",
    "LoRAXSConfig",
    "TiedLoRAConfig",
    "VBLoRAConfig",
    "attach",
    "load",
    "param_groups",
    "save",
]
