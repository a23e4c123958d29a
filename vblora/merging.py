"""Whether an adapter can be added to the weights of its layers for good."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vblora.targets import is_quantized, weight_of


def check_mergeable(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weight cannot take a sum, or is another module's too.

    Raises:
        ValueError: naming the layer and why.
    """
    for name, module in targets.items():
        weight = weight_of(module)
        if is_quantized(module):
            raise ValueError(
                f"{name} is quantised ({weight.dtype}), and rounding the sum again would change it: "
                "load the base model in 16 or 32 bits to merge"
            )
        if weight.is_meta:
            raise ValueError(f"the weight of {name} is offloaded: load the base model in memory to merge")
        if others := _sharing(model, module):
            raise ValueError(f"the weight of {name} is also that of {', '.join(others)}, which merging would change")


def _sharing(model: nn.Module, target: nn.Module) -> list[str]:
    """Other modules whose parameter is the very weight of this layer."""
    weight = weight_of(target)
    return [
        name
        for name, module in model.named_modules()
        if module is not target and any(p is weight for p in module.parameters(recurse=False))
    ]
