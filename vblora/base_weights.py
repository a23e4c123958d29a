"""The base model's weights: in floating point whatever the layer, and a sample of them by which a file names its base.

An adapter on another base of the same shapes computes without an error and gives other outputs. So a file keeps 32
single weights of the adapted layers, in float32, at places that follow from the layers' names and widths. They are
compared when it is loaded. A sample costs 32 numbers read; a quantised layer is dequantised for it, at most 32 are.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora.forward import ForwardPath
from vblora.io import describe_dtype
from vblora.shapes import LayerShape
from vblora.targets import is_conv1d, is_quantized, weight_of

BASE = "vblora_base"  # in the metadata of a directory's tensors and of a packed file, where other readers pass it over
SIZE = 32
# How far two samples of one base may be apart, as a share of their size: the norm of the difference by the norm.
SAME_TYPE, OTHER_TYPE = 1e-6, 2**-8
QUANTISED = {"Params4bit": "4-bit", "Int8Params": "8-bit"}
ROUNDED = {"4-bit": 0.3, "8-bit": 0.05}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BaseSample(NamedTuple):
    """Single weights of a base model's adapted layers, and the types that those are kept in."""

    kinds: tuple[str, ...]
    values: tuple[float, ...]

    def metadata(self) -> dict[str, str]:
        """As it stands in a file: the types, and in base 85 the numbers as float32 (little-endian) with their CRC."""
        data = struct.pack(f"<{SIZE}f", *self.values)
        text = base64.b85encode(data + zlib.crc32(data).to_bytes(4, "little")).decode()
        return {BASE: f"{'+'.join(self.kinds)} {text}"}

    def tolerance(self, other: BaseSample) -> float:
        """How far this and another sample of the same base may be apart."""
        rounded = [ROUNDED[kind] for kind in (*self.kinds, *other.kinds) if kind in ROUNDED]
        return max(rounded, default=SAME_TYPE if self.kinds == other.kinds else OTHER_TYPE)


def read_sample(metadata: Mapping[str, str]) -> BaseSample | None:
    """What `BaseSample.metadata` wrote; None in files of version 0.1, of PEFT, or where the base was not to be had.

    Raises:
        ValueError: it is damaged.
    """
    if BASE not in metadata:
        return None
    found = re.fullmatch(r"([a-z0-9+-]{1,99}) (\S{165})", metadata[BASE], re.ASCII)
    try:
        data = base64.b85decode(found[2]) if found else b""
    except ValueError:
        data = b""
    if found is None or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        raise ValueError(f"the metadata's {BASE}, a sample of the base model, is damaged")
    return BaseSample(tuple(found[1].split("+")), struct.unpack(f"<{SIZE}f", data[:-4]))


@torch.no_grad()
def take_sample(
    model: nn.Module, targets: Mapping[str, nn.Module], shapes: Sequence[LayerShape], outputs: Mapping[str, slice]
) -> BaseSample | None:
    """The sample of a model for these targets, which each adapt some outputs of their layer.

    None where an adapter is merged into the weights, or they are divided, offloaded, on the meta device, or no finite
    numbers that can be looked at.
    """
    if any(isinstance(module, ForwardPath) and module.merged for module in model.children()):
        return None
    weights: dict[str, Tensor] = {}
    kinds, values = set(), []
    for shape, row, column in _places(shapes):
        module = targets[shape.name]
        kind = _kind_of(module)
        if kind is None:
            return None
        if shape.name not in weights:
            weights = {shape.name: full_weight(module)[outputs[shape.name]]}  # (out, in); one at a time
        weight = weights[shape.name]
        if tuple(weight.shape) != (shape.out_features, shape.in_features):
            return None
        kinds.add(kind)
        values.append(float(weight[row, column]))
    data = torch.tensor(values, dtype=torch.float32, device="cpu").double()  # as float32 has them
    return BaseSample(tuple(sorted(kinds)), tuple(data.tolist())) if data.isfinite().all() else None


def check_base(
    theirs: BaseSample | None, ours: BaseSample | None, shapes: Sequence[LayerShape], what: str, strict: bool
) -> None:
    """Compare a file's base with the model's, where both are known: warn of another one, or with `strict` refuse it.

    Raises:
        ValueError: naming the layer that differs most.
    """
    if theirs is None or ours is None:
        return
    one, other = (torch.tensor(s.values, dtype=torch.float64, device="cpu") for s in (theirs, ours))
    apart = (one - other).abs()
    size, allowed = max(one.norm(), other.norm()), theirs.tolerance(ours)
    if apart.norm() <= allowed * size:
        return
    layer = [shape.name for shape, _, _ in _places(shapes)][int(apart.argmax())]
    text = (
        f"{what} was made on another base model: of {SIZE} weights compared, those of {layer} differ most; together "
        f"they are {float(apart.norm() / size):.2g} of their size apart, and {allowed:.2g} is allowed"
    )
    if strict:
        raise ValueError(text)
    warnings.warn(f"{text}. Its outputs are not those that were trained; strict_base=True refuses it", stacklevel=5)


def _places(shapes: Sequence[LayerShape]) -> Iterator[tuple[LayerShape, int, int]]:
    """The layer, the output and the input of each weight of the sample, whatever order the layers are in."""
    ordered = sorted(shapes)
    for number in range(SIZE):
        shape = ordered[number * len(ordered) // SIZE]
        drawn = int.from_bytes(hashlib.sha256(f"{number} {shape.name}".encode()).digest()[:16], "little")
        column, row = drawn % shape.in_features, drawn // shape.in_features % shape.out_features
        yield shape, row, column


def _kind_of(module: nn.Module) -> str | None:
    """How a layer's weight is kept; None where its numbers are not to be had here."""
    weight: Any = weight_of(module)
    if weight.is_meta:
        return None
    if is_quantized(module):
        kind = QUANTISED.get(type(weight).__name__)
        return None if kind == "4-bit" and weight.quant_state is None else kind
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in FLOATS and weight.dim() == 2
    return describe_dtype(weight) if plain else None


def full_weight(module: nn.Module) -> Tensor:
    """The weight as floating point (out, in) whatever the layer: dequantised, Conv1D's transposed."""
    weight = weight_of(module)
    if weight.is_meta:
        raise ValueError("the weights are offloaded, and their singular factors need them in memory")
    if is_quantized(module):
        return _dequantized(module)
    return weight.detach().T if is_conv1d(module) else weight.detach()


def _dequantized(module: nn.Module) -> Tensor:
    """A bitsandbytes layer's weight in floating point. (PEFT's function for this changes 8-bit layers on the CPU.)"""
    from bitsandbytes import functional

    weight: Any = weight_of(module)
    if type(weight).__name__ == "Params4bit":
        data, how = weight.data, weight.quant_state
        if getattr(how, "packing_format_for_cpu", False):  # what it makes of them for a CPU's evaluation
            data, how = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(how))
        return functional.dequantize_4bit(data, how)
    state: Any = module.state  # holds the scales after the first forward pass, the weight before it
    return functional.int8_vectorwise_dequant(weight.data, weight.SCB if state.SCB is None else state.SCB)
