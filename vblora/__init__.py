"""VB-LoRA: adapters of some kilobytes, composed from one vector bank (arXiv 2405.15179)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vblora import moved

if TYPE_CHECKING:
    from vblora.adapter import Adapter, attach, load, save
    from vblora.averages import AveragedModel
    from vblora.groups import param_groups
    from vblora.methods import LoRAXSConfig, TiedLoRAConfig, VBLoRAConfig
    from vblora.optim import AdamW
    from vblora.recipes import Recipe, recipe
    from vblora.serving.store import AdapterStore

__version__ = "0.2.0"

moved.install()

__all__ = [
    "AdamW",
    "Adapter",
    "AdapterStore",
    "AveragedModel",
    "LoRAXSConfig",
    "Recipe",
    "TiedLoRAConfig",
    "VBLoRAConfig",
    "attach",
    "load",
    "param_groups",
    "recipe",
    "save",
]

# Where each public name lives. They are imported when first used, because importing torch takes seconds, and
# `vblora count` does without.
_HOMES = {
    "AdamW": "vblora.optim",
    "Adapter": "vblora.adapter",
    "AdapterStore": "vblora.serving.store",
    "AveragedModel": "vblora.averages",
    "LoRAXSConfig": "vblora.methods",
    "Recipe": "vblora.recipes",
    "TiedLoRAConfig": "vblora.methods",
    "VBLoRAConfig": "vblora.methods",
    "attach": "vblora.adapter",
    "load": "vblora.adapter",
    "param_groups": "vblora.groups",
    "recipe": "vblora.recipes",
    "save": "vblora.adapter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("vblora.methods")  # so that every method is known, whichever name was asked for first
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
