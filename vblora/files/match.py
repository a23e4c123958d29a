"""Whether a packed file fits a model: its layers found there by name, its rows in that model's order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from vblora.config import VBLoRAConfig
from vblora.files import peft_format
from vblora.files.content import Content
from vblora.shapes import LayerShape
from vblora.targets import is_linear, layer_shapes


def find_layers(model: nn.Module, content: Content, path: Path | str) -> dict[str, nn.Module]:
    """The layers that a packed file is for, by name, in the model's order.

    By the names in the file and not by its `target_modules`, which may be a regular expression of anybody's.

    Raises:
        ValueError: a layer is missing, is no linear layer or has other widths; the message names it.
    """
    wanted = {shape.name: shape for shape in content.shapes}
    parts: dict[str, list[str]] = {}  # the targets in each split layer
    for name, part in sorted(content.outputs.items(), key=lambda item: item[1].start or 0):
        if part != slice(None):
            parts.setdefault(name.rpartition(".")[0], []).append(name)
    targets: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            targets |= dict.fromkeys(parts.get(name, [name] if name in wanted else []), module)
    missing = [name for name in wanted if name not in targets]
    try:
        if missing and content.config.target_parameters:
            from vblora.experts import named_experts  # few files have them

            targets |= named_experts(model, missing)
            missing = [name for name in wanted if name not in targets]
        shapes = [] if missing else layer_shapes(targets, content.config)
        other = [shape for shape in shapes if shape != wanted[shape.name]]
    except ValueError as error:
        raise ValueError(f"{path} does not fit this model: {error}") from error
    if not missing and not other:
        return targets
    made_for = f" (it was made for {content.base_model})" if content.base_model else ""
    problem = f"the model has no linear layer or expert {missing[0]!r}" if missing else _difference(other[0], wanted)
    count = len(missing) or len(other)
    more = f", and {count - 1} more layers differ" if count > 1 else ""
    raise ValueError(f"{path} does not fit this {type(model).__name__}{made_for}: {problem}{more}")


def in_order_of(content: Content, shapes: Sequence[LayerShape]) -> dict[str, Tensor]:
    """A packed file's tensors with the layers in this order.

    Raises:
        ValueError: the layers are others, or this method's tensors cannot be put into another order.
    """
    if list(shapes) == content.shapes:
        return content.tensors
    if {s.name: s for s in shapes} != {s.name: s for s in content.shapes}:
        raise ValueError("the file is for other layers, or other widths")
    if type(content.config) is not VBLoRAConfig:
        raise ValueError(f"the model has its layers in another order, which {content.config.method} cannot be put into")
    named = peft_format.to_peft(content.tensors, content.config, content.shapes)
    return peft_format.from_peft(named, content.config, shapes)


def _difference(shape: LayerShape, wanted: dict[str, LayerShape]) -> str:
    theirs = wanted[shape.name]
    return (
        f"{shape.name} is {shape.in_features} -> {shape.out_features} here, "
        f"and {theirs.in_features} -> {theirs.out_features} in the file"
    )
