"""How a packed file's numbers are written: whole numbers in few bits, floats in byte planes, int8 or int4, or steps."""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from vblora.container import DTYPES, Raw

MOST_INFLATION = 16  # times the bytes stored: what a tensor in byte planes may grow to
WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their width in bytes


# --- Whole numbers in as many bits as they need -------------------------------------------------------------------


def bits_for(count: int) -> int:
    """Bits of one index below `count`: ceil(log2 count), and at least 1."""
    return max(1, (count - 1).bit_length())


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Whole numbers below 2^width, flattened, as a stream of bits, each number's lowest first: a uint8 vector.

    Bit j of the stream is bit j mod 8 of byte j // 8; the last byte is filled up with zeros.
    """
    flat = values.flatten().long()
    bits = torch.stack([(flat >> j & 1).to(torch.uint8) for j in range(width)], dim=-1).flatten()  # (n * width,)
    bits = F.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(dim=-1).to(torch.uint8)


def unpack_bits(data: Tensor, count: int, width: int) -> Tensor:
    """The `count` numbers (int64) that `pack_bits` wrote.

    Raises:
        ValueError: too few or too many bytes, or bits set behind the last number.
    """
    if data.numel() != packed_bytes(count, width):
        raise ValueError(
            f"{count} numbers of {width} bits take {packed_bytes(count, width)} bytes, and the file has {data.numel()}"
        )
    bits = (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).flatten()
    if bits[count * width :].any():
        raise ValueError("the unused bits behind the last number are not 0")
    bits = bits[: count * width].view(count, width)
    values = torch.zeros(count, dtype=torch.int64, device="cpu")
    for j in range(width):
        values |= bits[:, j].long() << j
    return values


def packed_bytes(count: int, width: int) -> int:
    return -(-count * width // 8)


# --- Floats, bit for bit ------------------------------------------------------------------------------------------


def to_planes(tensor: Tensor) -> bytes | None:
    """A float tensor's bytes, those of one place together, each such plane deflated where that makes it smaller.

    Each number is first turned left by one bit, which brings its exponent into the highest byte and its sign into the
    lowest bit: trained numbers share few exponents, while their lower bits are noise. From the highest byte to the
    lowest, a plane is its stored length (4 bytes) and that many bytes; fewer than there are numbers are a raw deflate
    stream. None where it saves nothing, or more than a reader takes (see `MOST_INFLATION`).
    """
    width, n = tensor.element_size(), tensor.numel()
    size = n * width
    if n == 0 or n >= 2**32:
        return None
    whole = tensor.detach().cpu().contiguous().flatten().view(WHOLE[width])
    turned = whole << 1 | whole >> (8 * width - 1) & 1
    columns = turned.view(torch.uint8).view(n, width)
    stored = b""
    for place in reversed(range(width)):
        plane = bytes(Raw.of(columns[:, place]).data)
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        deflated = packer.compress(plane) + packer.flush()
        best = deflated if len(deflated) < n else plane
        stored += len(best).to_bytes(4, "little") + best
    return stored if size / MOST_INFLATION <= len(stored) < size else None


def from_planes(data: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `to_planes` wrote.

    Raises:
        ValueError: the data is damaged, or is not that of this type and shape.
    """
    width, n = DTYPES[dtype].itemsize, 1
    for size in shape:
        n *= size
    if not 0 < n * width <= MOST_INFLATION * len(data):
        raise ValueError(f"{len(data)} bytes cannot hold {dtype} of shape {list(shape)}")
    columns = torch.empty(n, width, dtype=torch.uint8, device="cpu")
    start = 0
    for place in reversed(range(width)):
        length = int.from_bytes(data[start : start + 4], "little")
        start += 4
        if length > min(n, len(data) - start):
            raise ValueError(f"a byte plane is said to take {length} bytes, more than it can")
        columns[:, place] = torch.frombuffer(bytearray(_plane(data[start : start + length], n)), dtype=torch.uint8)
        start += length
    if start != len(data):
        raise ValueError(f"{len(data) - start} bytes are left behind the last byte plane")
    turned = columns.flatten().view(WHOLE[width])
    whole = turned >> 1 & (1 << 8 * width - 1) - 1 | turned << 8 * width - 1
    return whole.view(DTYPES[dtype]).reshape(shape)


def _plane(stored: bytes | bytearray | memoryview, size: int) -> bytes | bytearray | memoryview:
    if len(stored) == size:
        return stored
    inflater = zlib.decompressobj(-15)
    try:
        plane = inflater.decompress(stored, size + 1)  # never more than that is made
    except zlib.error as error:
        raise ValueError(f"a byte plane is no deflate stream: {error}") from error
    if len(plane) != size or not inflater.eof or inflater.unused_data:
        raise ValueError(f"a byte plane does not inflate to {size} bytes")
    return plane


# --- Floats, rounded ----------------------------------------------------------------------------------------------


def to_whole(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A matrix's rows as whole numbers of so many bits (in int8) and a float32 scale per row: tensor = whole * scale.

    A row's scale is its largest magnitude divided by the largest whole number, 2^(bits - 1) - 1.
    """
    top = 2 ** (bits - 1) - 1
    rows = tensor.detach().float().flatten(1)  # (rows, columns)
    scale = rows.abs().amax(dim=1) / top if rows.numel() else torch.zeros(len(rows), device="cpu")
    divisor = torch.where(scale > 0, scale, 1)
    whole = (rows / divisor.unsqueeze(1)).round().clamp(-top, top).to(torch.int8)
    return whole.reshape(tensor.shape), scale


def from_whole(whole: Tensor, scale: Tensor) -> Tensor:
    """The float32 tensor that `to_whole` rounded."""
    if not torch.isfinite(scale).all() or (scale < 0).any():
        raise ValueError("a scale is negative, NaN or infinite")
    return (whole.float().flatten(1) * scale.unsqueeze(1)).reshape(whole.shape)


def to_steps(weights: Tensor, bits: int) -> Tensor:
    """The first k - 1 of k weights (N, k - 1), largest first, as whole numbers: each a step within its own interval.

    The s-th largest of k weights that sum to 1 lies between R / (k - s + 1) and min(w_(s-1), R), where R is what
    the s - 1 before it leave of 1: the largest between 1/k and 1. That interval is cut into 2^bits - 1 steps, with
    the *decoded* weights before it, so that decoding can give no negative weight and no sum above 1.
    """
    return _walk(weights.double(), None, bits)[0]


def from_steps(steps: Tensor, bits: int) -> Tensor:
    """The weights (N, k - 1), in float64, that `to_steps` rounded."""
    return _walk(None, steps.double(), bits)[1]


def _walk(weights: Tensor | None, steps: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Both directions, weight by weight: given either the weights or the steps, the steps and the weights."""
    given = steps if weights is None else weights
    assert given is not None
    top, k = 2**bits - 1, given.shape[1] + 1
    rest = torch.ones(len(given), dtype=torch.float64, device="cpu")
    last = rest
    codes, values = [], []
    for s in range(k - 1):
        low = rest / (k - s)
        span = (torch.minimum(last, rest) - low).clamp(min=0)
        if weights is None:
            code = given[:, s]
        else:
            code = ((given[:, s] - low) / torch.where(span > 0, span, 1) * top).round().clamp(0, top)
        last = low + span * (code / top)
        rest = (rest - last).clamp(min=0)
        codes.append(code)
        values.append(last)
    return torch.stack(codes, dim=1).long(), torch.stack(values, dim=1)
