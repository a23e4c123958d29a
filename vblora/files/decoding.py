"""The tensors of a packed file, taken out one by one; sizes are compared before anything is decoded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vblora.bank import at_most_one
from vblora.config import TensorSpec
from vblora.container import FLOATS, Raw, is_count
from vblora.files import drawn
from vblora.files.content import check_floats
from vblora.files.encoding import bits_for, from_planes, from_steps, from_whole, packed_bytes, unpack_bits
from vblora.files.shared_bank import file_of, is_key

SCALE_PREFIX = "scale."
WHOLE_BITS = {"int8": 8, "int4": 4}  # codes of matrices in whole numbers, with a scale for each row


class Reader:
    """Takes the tensors of a file one by one; sizes are compared before anything is decoded.

    `bank_of` gives a bank that is in another file by its key, `draw` the selection that the file's seed draws.
    """

    def __init__(
        self,
        raws: dict[str, Raw],
        codes: dict[str, Any],
        bank_of: Callable[[str], Tensor] | None,
        draw: Callable[[], dict[str, Tensor]],
    ) -> None:
        self.raws = raws
        self.codes = dict(codes)
        self.bank_of = bank_of
        self._draw = draw
        self._drawn: dict[str, Tensor] = {}
        self.stored: dict[str, tuple[str, int]] = {}

    def take(self, name: str, spec: TensorSpec) -> Tensor:
        """A tensor of the adapter."""
        if name in drawn.SELECTION and drawn.is_code(self.codes.get(name)):
            return self._drawn_again(name, spec.shape)
        if name == "topk_indices":
            assert spec.below is not None
            return self._indices(name, spec.shape, bits_for(spec.below))
        if name == "topk_weights" and spec.shape[1] == 0:
            return torch.zeros(spec.shape, device="cpu")
        if name == "topk_weights" and self.codes.get(name) == "steps":
            return self._steps(name, spec.shape)
        if name == "vector_bank" and _is_shared(self.codes.get(name)):
            return self._shared(name, spec.shape)
        return self._floats(name, spec.shape)

    def head(self, name: str) -> Tensor:
        """A tensor of a head, whose shape the file alone knows."""
        if name in self.codes:
            return self._floats(name, None)
        raw = self._pop(name, "as it is")
        tensor = raw.tensor()
        if tensor.is_floating_point():
            check_floats(name, tensor)
        return tensor

    def require_empty(self) -> None:
        if rest := sorted(self.raws.keys() | self.codes.keys()):
            raise ValueError(f"these tensors belong to no adapter of these settings: {', '.join(rest[:5])}")

    def _drawn_again(self, name: str, shape: tuple[int, ...]) -> Tensor:
        code = self.codes.pop(name)
        self._drawn = self._drawn or self._draw()
        tensor = self._drawn[name]
        if tuple(tensor.shape) != shape or drawn.code_of(tensor) != code:
            raise ValueError(
                f"{name} is left out to be drawn from the seed, and this processor draws another one than the file's: "
                "have it packed with its indices (vblora pack FILE OTHER --selection indices, where it can be read)"
            )
        self.stored[name] = ("drawn from the seed", 0)
        return tensor

    def _pop(self, name: str, how: str) -> Raw:
        if name not in self.raws:
            raise ValueError(f"this tensor is missing: {name}")
        raw = self.raws.pop(name)
        _, before = self.stored.get(name, ("", 0))
        self.stored[name] = (how, before + len(raw.data))
        return raw

    def _indices(self, name: str, shape: tuple[int, ...], width: int) -> Tensor:
        raw = self._pop(name, f"{width} bits")
        _require(name, raw, ("U8",), (packed_bytes(math.prod(shape), width),))
        return unpack_bits(raw.tensor(), math.prod(shape), width).view(shape)

    def _steps(self, name: str, shape: tuple[int, ...]) -> Tensor:
        del self.codes[name]
        bits = 16 if name in self.raws and self.raws[name].dtype == "U16" else 8
        raw = self._pop(name, f"{bits} bits")
        _require(name, raw, ("U8", "U16"), shape)
        steps = raw.tensor()
        steps = steps.long() if bits == 8 else steps.view(torch.int16).long() & 0xFFFF
        return at_most_one(from_steps(steps, bits).float())

    def _shared(self, name: str, shape: tuple[int, ...]) -> Tensor:
        _, key = self.codes.pop(name)
        if self.bank_of is None:
            raise ValueError(f"its bank is shared and in another file, called {file_of(key)}")
        bank = self.bank_of(key)
        if tuple(bank.shape) != shape:
            raise ValueError(f"the shared bank {file_of(key)} is {tuple(bank.shape)}; its settings need {shape}")
        self.stored[name] = ("shared", 0)
        return bank

    def _floats(self, name: str, shape: tuple[int, ...] | None) -> Tensor:
        code = self.codes.pop(name, None)
        if code is None:
            raw = self._pop(name, "as it is")
            _require(name, raw, FLOATS, shape)
            tensor = raw.tensor()
        elif code == "int8" or (code == "int4" and name == "vector_bank"):  # int4's shape is not in the file
            tensor = self._whole(name, code, shape)
        else:
            dtype, planes_shape = _planes_of(name, code)
            raw = self._pop(name, "byte planes")
            _require(name, raw, ("U8",), (len(raw.data),))
            if shape is not None and shape != planes_shape:
                raise ValueError(f"{name} has shape {planes_shape}; its settings need {shape}")
            tensor = from_planes(raw.data, dtype, planes_shape)
        check_floats(name, tensor)
        return tensor

    def _whole(self, name: str, code: str, shape: tuple[int, ...] | None) -> Tensor:
        raw = self._pop(name, code)
        if code == "int8":
            _require(name, raw, ("I8",), shape)
            whole = raw.tensor()
        else:
            assert shape is not None
            _require(name, raw, ("U8",), (packed_bytes(math.prod(shape), 4),))
            whole = unpack_bits(raw.tensor(), math.prod(shape), 4).view(shape) - 8
        scale = self.raws.pop(SCALE_PREFIX + name, None)
        if scale is None or whole.dim() < 2:
            raise ValueError(f"{name} is {code}, and lacks a scale for each row of a matrix")
        _require(SCALE_PREFIX + name, scale, ("F32",), tuple(whole.shape[:1]))
        self.stored[name] = (code, len(raw.data) + len(scale.data))
        return from_whole(whole, scale.tensor())


def _is_shared(code: Any) -> bool:
    return isinstance(code, list) and len(code) == 2 and code[0] == "shared" and is_key(code[1])


def _planes_of(name: str, code: Any) -> tuple[str, tuple[int, ...]]:
    good = isinstance(code, list) and 1 < len(code) < 10 and isinstance(code[0], str) and code[0] in FLOATS
    if not good or not all(is_count(n) for n in code[1:]):
        raise ValueError(f"{name} is written in a way that is not known here: {code!r:.80}")
    return code[0], tuple(code[1:])


def _require(name: str, raw: Raw, dtypes: Sequence[str], shape: tuple[int, ...] | None) -> None:
    if raw.dtype not in dtypes or (shape is not None and raw.shape != shape):
        found = f"{raw.dtype} of shape {list(raw.shape)}"
        raise ValueError(
            f"{name} is {found}; the header needs {' or '.join(dtypes)} of shape {list(shape or raw.shape)}"
        )
