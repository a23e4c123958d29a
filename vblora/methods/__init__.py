"""The methods: VB-LoRA, Tied-LoRA and LoRA-XS here, all others through PEFT, one switch over all of them."""

from vblora.methods.lora_xs import LoRAXS, LoRAXSConfig
from vblora.methods.selection_rules import SelectionConfig, SelectionVBLoRA
from vblora.methods.tied_lora import TiedLoRA, TiedLoRAConfig
from vblora.methods.vb_lora import VBLoRA, VBLoRAConfig

__all__ = [
    "LoRAXS",
    "LoRAXSConfig",
    "SelectionConfig",
    "SelectionVBLoRA",
    "TiedLoRA",
    "TiedLoRAConfig",
    "VBLoRA",
    "VBLoRAConfig",
]
