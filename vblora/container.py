"""safetensors files: a header in JSON and the tensors' data behind it, both checked against each other.

Read here and not by the safetensors package because a file may come from anybody: every number of the header is held
against the bytes that are there before anything is made of it. Written here because that package orders the metadata
by chance, and the same adapter should be the same bytes. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
MOST_HEADER_BYTES = 2**26


class Raw(NamedTuple):
    """One tensor as it lies in a file: safetensors' name of its type, its shape, its numbers (little-endian)."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @classmethod
    def of(cls, tensor: Tensor) -> Raw:
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"tensors of type {tensor.dtype} are not written here")
        tensor = tensor.detach().cpu().contiguous()
        size = tensor.numel() * tensor.element_size()
        data = ctypes.string_at(tensor.data_ptr(), size) if size else b""
        return cls(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)

    def tensor(self) -> Tensor:
        """A tensor with memory of its own, or that of `data` where nothing else refers to it."""
        if not self.data:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="cpu")
        data = self.data if isinstance(self.data, bytearray) else bytearray(self.data)
        return torch.frombuffer(data, dtype=DTYPES[self.dtype]).reshape(self.shape)


class Entry(NamedTuple):
    """Where a tensor's numbers lie in the data behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


# --- Writing ------------------------------------------------------------------------------------------------------


def serialize(tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file; the same for the same content."""
    sizes = {name: (raw.dtype, raw.shape, len(raw.data)) for name, raw in tensors.items()}
    header, order = _header(sizes, metadata)
    return b"".join([header, *(tensors[name].data for name in order)])


def write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor; the same bytes for the same content.

    Raises:
        ValueError: a tensor of a type that is not in `DTYPES`.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is of type {tensor.dtype}, which is not written here")
    sizes = {n: (DTYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()}
    header, order = _header(sizes, metadata)
    file.write(header)
    for name in order:
        file.write(Raw.of(tensors[name]).data)


def _header(
    sizes: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The length and the header, and the order of the data: the widest types first, so that all lie on multiples of
    their width."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    order = sorted(sizes, key=lambda name: (-_size(sizes[name][0]), name))
    end = 0
    for name in order:
        dtype, shape, size = sizes[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


# --- Reading ------------------------------------------------------------------------------------------------------


class TensorFile:
    """A safetensors file that is open: its header, checked against its size, and its tensors one by one.

    It stays the file that it was when another one is moved to its place.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        self.size = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(8), self.size)
        self.entries, self.metadata = _parse_header(file.read(length), self.size - 8 - length)
        self._data = 8 + length

    def read(self, name: str) -> Raw:
        """One tensor, in memory of its own."""
        dtype, shape, start, stop = self.entries[name]
        data = bytearray(stop - start)
        self._file.seek(self._data + start)
        if self._file.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise ValueError(f"{name} ends too early: the file has become shorter")
        return Raw(dtype, shape, data)

    def raws(self) -> dict[str, Raw]:
        return {name: self.read(name) for name in self.entries}

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.read(name).tensor() for name in self.entries}

    def is_current(self) -> bool:
        """Whether the file is still what its path leads to."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return False


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """A safetensors file for reading. Of a file that is damaged, or larger than what is wanted, no more is read than
    its header.

    Raises:
        ValueError: no such file, or it is cut short or damaged, also when its tensors are read.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    with file:
        try:
            found = TensorFile(path, file)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
        yield found


def deserialize(data: bytes) -> tuple[dict[str, Raw], dict[str, str]]:
    """The tensors of a safetensors file as views of its bytes, and its metadata.

    Raises:
        ValueError: these bytes are no safetensors file, or it is cut short, or its header does not fit them.
    """
    length = _header_length(data[:8], len(data))
    body = memoryview(data)[8 + length :]
    entries, metadata = _parse_header(data[8 : 8 + length], len(body))
    return {n: Raw(e.dtype, e.shape, body[e.start : e.stop]) for n, e in entries.items()}, metadata


def _header_length(first: bytes, size: int) -> int:
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise ValueError(
            f"no safetensors file, or cut short: {size} bytes cannot hold the header of {length} that they begin with"
        )
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, more than the {MOST_HEADER_BYTES} that are read")
    return length


def _parse_header(text: bytes, available: int) -> tuple[dict[str, Entry], dict[str, str]]:
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the header's __metadata__ does not map names to texts")
    entries = {name: _entry(name, entry, available) for name, entry in header.items()}
    end = 0
    for start, stop in sorted((entry.start, entry.stop) for entry in entries.values()):
        if start != end:
            raise ValueError(f"the header's tensors overlap, or leave a gap, at byte {min(start, end)} of the data")
        end = stop
    if end != available:
        raise ValueError(f"the file has {available} bytes of data, and its header describes {end} bytes")
    return entries, metadata


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
    parts: list[bytes | bytearray | memoryview] = [text.encode()]
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


def _entry(name: str, entry: Any, available: int) -> Entry:
    """Where a tensor's data lies, if its type, shape and place agree."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets alone")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} is of type {dtype!r}, which is not read here")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(is_count(n) for n in shape):
        raise ValueError(f"{name!r} has a shape that is no list of whole numbers: {shape!r:.80}")
    if not isinstance(span, list) or len(span) != 2 or not all(is_count(n) for n in span):
        raise ValueError(f"{name!r} has data_offsets that are not two whole numbers: {span!r:.80}")
    start, stop = span
    if not start <= stop <= available or math.prod(shape) * _size(dtype) != stop - start:
        raise ValueError(f"{name!r}, {dtype} of shape {shape}, does not fit bytes {start} to {stop} of {available}")
    return Entry(dtype, tuple(shape), start, stop)


def _size(dtype: str) -> int:
    return DTYPES[dtype].itemsize


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("one name stands twice in the same object")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number that JSON has")
