"""Every method that PEFT has, through PEFT: by name, or from a JSON configuration.

VB-LoRA's own code is in this package; LoRA, VeRA, DoRA, OLoRA and the rest are baselines, and PEFT keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vblora.adapter import Adapter
from vblora.io import read_tensors
from vblora.shapes import Count

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# Methods that PEFT reaches by a setting of another one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("LORA", {"use_dora": True}),
    "olora": ("LORA", {"init_lora_weights": "olora"}),
    "pissa": ("LORA", {"init_lora_weights": "pissa"}),
    "rslora": ("LORA", {"use_rslora": True}),
}


def peft_config(method: str, settings: dict[str, Any]) -> PeftConfig:
    """PEFT's configuration of a method.

    Args:
        method: a PEFT type in lower case ("lora", "vera", "ia3", ...) or one of `VARIANTS`. PEFT's own
            VB-LoRA, for comparisons, is "peft_vblora".
        settings: fields of that configuration.

    Raises:
        ValueError: PEFT is missing, or does not have the method or a field.
    """
    config_class = peft_config_class(method)
    extra = VARIANTS[method][1] if method in VARIANTS else {}
    fields = config_class.__dataclass_fields__
    if unknown := sorted(set(settings) - set(fields)):
        raise ValueError(f"PEFT's {config_class.__name__} has no field {', '.join(unknown)}")
    try:
        return config_class(**{**extra, **settings})
    except TypeError as error:
        raise ValueError(f"PEFT's {config_class.__name__}: {error}") from error


def peft_config_class(method: str) -> Any:
    """The class of PEFT's configuration of a method.

    Raises:
        ValueError: PEFT is missing, or does not have the method.
    """
    mapping = _peft().PEFT_TYPE_TO_CONFIG_MAPPING
    peft_type = VARIANTS[method][0] if method in VARIANTS else method.removeprefix("peft_").upper()
    if peft_type not in mapping:
        known = sorted({str(t.value).lower() for t in mapping} | set(VARIANTS))
        own = ", ".join(["full", *sorted(config.method for config in Adapter.methods)])
        raise ValueError(f"there is no method {method!r}: ours are {own}, and PEFT's {', '.join(known)}")
    return mapping[peft_type]


def peft_config_from_dict(values: dict[str, Any]) -> PeftConfig:
    """PEFT's configuration from the content of a JSON file; "peft_type" names the method."""
    values = dict(values)
    peft_type = values.pop("peft_type", None)
    if not isinstance(peft_type, str):
        raise ValueError('a PEFT configuration needs "peft_type", for example "LORA"')
    return peft_config(peft_type.lower(), values)


class PeftAdapter:
    """An adapter of PEFT's, with the few calls that training scripts make of any adapter."""

    def __init__(self, model: nn.Module, config: PeftConfig) -> None:
        self.model: PeftModel = _peft().get_peft_model(model, config)
        self.config = config

    def save(self, directory: str | Path, *, form: str = "topk") -> None:
        """Write PEFT's directory. `form` matters to PEFT's VB-LoRA alone."""
        if self.config.peft_type == "VBLORA":
            self.config.save_only_topk_weights = form == "topk"  # type: ignore[attr-defined]
        self.model.save_pretrained(str(directory))

    def start_from(self, directory: str | Path) -> None:
        """Take over the values of an adapter that PEFT saved, but not its heads.

        Raises:
            ValueError: no such file, or it does not fit this adapter.
        """
        path = Path(directory) / "adapter_model.safetensors"
        tensors, _ = read_tensors(path)
        own = _peft().get_peft_model_state_dict(self.model)
        heads = {n.replace(".modules_to_save.default", "") for n, _ in self._trained() if _is_saved_module(n)}
        for name in sorted(own.keys() - heads):
            if name not in tensors or tensors[name].shape != own[name].shape:
                raise ValueError(f"{path}: another adapter; {name} does not fit")
        taken = {name: tensors[name] for name in own.keys() - heads}
        _peft().set_peft_model_state_dict(self.model, {**own, **taken})

    def stored_parameters(self) -> Count:
        """Trained values outside `modules_to_save`, and the bytes PEFT writes for them.

        PEFT may write more than it trains (VeRA's frozen projections), or, for VB-LoRA's top-k form, less.
        """
        trained = sum(p.numel() for name, p in self._trained() if not _is_saved_module(name))
        heads = {name.replace(".modules_to_save.default", "") for name, _ in self._trained() if _is_saved_module(name)}
        kept = _peft().get_peft_model_state_dict(self.model)
        size = sum(t.numel() * t.element_size() for name, t in kept.items() if name not in heads)
        return Count(trained, trained, trained, size)

    def head_parameters(self) -> int:
        """Numbers in the modules of `modules_to_save`."""
        return sum(p.numel() for name, p in self._trained() if _is_saved_module(name))

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def peft_parameter_names(model: nn.Module) -> list[str]:
    """Trainable parameters of a PEFT model that are its adapter's own, not a `modules_to_save`."""
    if not hasattr(model, "peft_config"):
        return []
    return [n for n, p in model.named_parameters() if p.requires_grad and not _is_saved_module(n)]


def _is_saved_module(name: str) -> bool:
    return ".modules_to_save." in name


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("this method comes from PEFT: pip install peft") from error
    return peft
