"""safetensors files as bytes: a header in JSON and the tensors' data behind it, both checked against each other.

Read here and not by the safetensors package because a packed file may come from anybody: every number of the header
is held against the bytes that are there before anything is made of it. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The types that are stored, by safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
MOST_DIMENSIONS = 8


class Raw(NamedTuple):
    """One tensor as it lies in a file: safetensors' name of its type, its shape, its numbers (little-endian)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @classmethod
    def of(cls, tensor: Tensor) -> Raw:
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"a packed file holds no tensors of type {tensor.dtype}")
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        data = ctypes.string_at(tensor.data_ptr(), size) if size else b""
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)

    def tensor(self) -> Tensor:
        """A tensor with memory of its own."""
        if not self.data:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(bytearray(self.data), dtype=DTYPES[self.dtype]).reshape(self.shape)


def serialize(tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; the widest types first, so that all lie on multiples of their width."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    pieces, end = [], 0
    for name in sorted(tensors, key=lambda name: (-_size(tensors[name].dtype), name)):
        raw = tensors[name]
        header[name] = {"dtype": raw.dtype, "shape": raw.shape, "data_offsets": [end, end + len(raw.data)]}
        pieces.append(raw.data)
        end += len(raw.data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def deserialize(data: bytes) -> tuple[dict[str, Raw], dict[str, str]]:
    """The tensors of a safetensors file as views of its bytes, and its metadata.

    Raises:
        ValueError: these bytes are no safetensors file, or it is cut short, or its header does not fit them.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError(f"no safetensors file, or cut short: {len(data)} bytes, and a header of {length}")
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the header's __metadata__ is no table of strings")
    body = memoryview(data)[8 + length :]
    spans = {name: _span(name, entry, len(body)) for name, entry in header.items()}
    end = 0
    for start, stop in sorted(spans.values()):
        if start != end:
            raise ValueError(f"the header's tensors overlap, or leave a gap, at byte {min(start, end)} of the data")
        end = stop
    if end != len(body):
        raise ValueError(f"the file has {len(body)} bytes of data, and its header describes {end}")
    raws = {n: Raw(header[n]["dtype"], tuple(header[n]["shape"]), body[a:b]) for n, (a, b) in spans.items()}
    return raws, metadata


def parse_json(text: str | bytes) -> Any:
    """JSON from a file that may come from anybody: no name twice, no NaN, no nesting beyond Python's stack.

    Raises:
        ValueError: no such JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is no JSON: {error}") from error


def checksum(text: str, tensors: Mapping[str, Raw]) -> str:
    """SHA-256 of a text, then each tensor's name, type, shape and data; each part behind its length in 8 bytes."""
    digest = hashlib.sha256()
    parts: list[bytes | memoryview] = [text.encode()]
    for name in sorted(tensors):
        raw = tensors[name]
        parts += [name.encode(), raw.dtype.encode(), ",".join(map(str, raw.shape)).encode(), raw.data]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def is_count(value: Any, below: int = 2**63) -> bool:
    """Whether a value from JSON is a whole number from 0 up."""
    return type(value) is int and 0 <= value < below


def _span(name: str, entry: Any, available: int) -> tuple[int, int]:
    """Where a tensor's data lies, if its type, shape and place agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} is of type {dtype!r}, which packed files do not have")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(is_count(n) for n in shape):
        raise ValueError(f"the shape of {name!r} is none")
    if not isinstance(span, list) or len(span) != 2 or not all(is_count(n) for n in span):
        raise ValueError(f"the place of {name!r} is none")
    start, stop = span
    if not start <= stop <= available or math.prod(shape) * _size(dtype) != stop - start:
        raise ValueError(f"{name!r}, {dtype} of shape {shape}, does not fit bytes {start} to {stop} of {available}")
    return start, stop


def _size(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name comes twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
