"""The parameters of an adapted model, in groups that each have their learning rate."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vblora.adapter import Adapter
from vblora.methods.through_peft import peft_parameter_names
from vblora.methods.vb_lora import VBLoRA
from vblora.whole import require_whole


def param_groups(
    model: nn.Module,
    lr: float,
    lr_vector_bank: float | None = None,
    lr_logits: float | None = None,
    lr_adapter: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Every trainable parameter of `model` in exactly one group.

    Groups, in order and left out where empty: "vector_bank" and "logits" (VB-LoRA; no weight decay, as in the
    authors' GLUE code), "adapter" (the matrices of other methods), "scales" (their vectors, as VeRA's and Tied-LoRA's;
    no weight decay, which would shrink the whole update), "weights" (everything else that is a matrix) and "biases"
    (everything else that is a vector: biases and norms; no weight decay).

    Args:
        model: the adapted model, or any other.
        lr: learning rate of heads, and of all that is trained without an adapter.
        lr_vector_bank: learning rate of the bank; required for VB-LoRA.
        lr_logits: learning rate of the logits; required for VB-LoRA.
        lr_adapter: learning rate of other methods' parameters; `lr` unless given.
        weight_decay: AdamW's, for "adapter" and "weights".

    Raises:
        ValueError: nothing is trainable, the adapter is frozen, a layer was replaced, logits are not whole
            (`vblora.whole`), a rate is missing, or one is given for parameters that there are none of.
    """
    members = _members(model)
    rates = {
        "vector_bank": lr_vector_bank,
        "logits": lr_logits,
        "adapter": lr if lr_adapter is None else lr_adapter,
        "scales": lr if lr_adapter is None else lr_adapter,
        "weights": lr,
        "biases": lr,
    }
    given = {"vector_bank": lr_vector_bank, "logits": lr_logits, "adapter": lr_adapter}
    for name, rate in given.items():
        if rate is not None and not members[name] and not (name == "adapter" and members["scales"]):
            _require_trainable_adapter(model)
            raise ValueError(f"lr_{name} is given, but the model has no trainable {name} parameters")
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise ValueError(f"the rate of {name} must be a number of at least 0, not {value!r}")
    groups = []
    for name, parameters in members.items():
        if not parameters:
            continue
        rate = rates[name]
        if rate is None:
            raise ValueError(f"lr_{name} is missing: VB-LoRA trains its {name} at a learning rate of its own")
        decay = weight_decay if name in ("adapter", "weights") else 0.0
        groups.append({"name": name, "params": parameters, "lr": rate, "weight_decay": decay})
    if not groups:
        _require_trainable_adapter(model)
        raise ValueError("no parameter of the model is trainable: attach an adapter first")
    return groups


def _require_trainable_adapter(model: nn.Module) -> None:
    """Refuse a model all of whose adapters were frozen, with the usual reason.

    Raises:
        ValueError: with the way out.
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    if adapters and not any(p.requires_grad for adapter in adapters for p in adapter.parameters()):
        raise ValueError(
            f"the adapter {adapters[0].name} is frozen: call what freezes a whole model, as "
            "peft.prepare_model_for_kbit_training, before vblora.attach, or then requires_grad_(True) on the adapter "
            "and on the modules of modules_to_save"
        )


def _members(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    members: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("vector_bank", "logits", "adapter", "scales", "weights", "biases")
    }
    group_of = _adapter_groups(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        members[group_of.get(name, "weights" if parameter.ndim > 1 else "biases")].append(parameter)
    return members


def _adapter_groups(model: nn.Module) -> dict[str, str]:
    """The group of every parameter that is an adapter's own, ours or PEFT's, by its name in the model."""
    theirs = set(peft_parameter_names(model))
    groups = {name: _group_of(p) for name, p in model.named_parameters() if name in theirs}
    groups |= {name: "scales" for name in groups if ".ia3_l." in name}  # vectors, kept as matrices of one row
    for prefix, module in model.named_modules():
        if isinstance(module, Adapter):
            module.require_layers()
            if isinstance(module, VBLoRA):
                require_whole(module)
            own = module.named_parameters()
            groups |= {f"{prefix}.{name}": module.groups.get(name, _group_of(p)) for name, p in own}
    return groups


def _group_of(parameter: nn.Parameter) -> str:
    """The group of an adapter's parameter that names none itself."""
    return "adapter" if parameter.ndim > 1 else "scales"
