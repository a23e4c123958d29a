"""A reader of packed VB-LoRA files written from docs/packed_format.md alone, without torch: what tests hold ours to."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import zlib

FLOATS = {"F32": (4, "f"), "F16": (2, "e"), "F64": (8, "d")}


def read(data):
    """The factors by layer, as lists of rows: name -> (A: r rows, B transposed: r rows)."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    strings, body = header.pop("__metadata__"), data[8 + length :]
    stored = {name: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for name, e in header.items()}
    assert strings["sha256"] == checksum(strings["vblora"], stored)
    description = json.loads(strings["vblora"])
    config, codes = description["config"], description["codes"]
    layers = list(expand(description["layers"]))
    h, b, k, r = (config[key] for key in ("num_vectors", "vector_length", "topk", "r"))
    n = sum(r * (-(-i // b) + -(-o // b)) for _, i, o in layers)
    bank = chunks(floats("vector_bank", stored, codes, h * b), b)
    indices = chunks(bits(stored["topk_indices"][2], n * k, max(1, math.ceil(math.log2(h)))), k)
    weights = [[*row, max(0.0, 1 - sum(row))] for row in mixtures(stored, codes, n, k)]
    vectors = [
        [sum(w * bank[j][x] for w, j in zip(*row, strict=True)) for x in range(b)]
        for row in zip(weights, indices, strict=True)
    ]
    rows = iter(vectors)
    return {name: (factor(rows, r, i, b), factor(rows, r, o, b)) for name, i, o in layers}


def checksum(text, stored):
    parts = [text.encode()]
    for name in sorted(stored, key=str.encode):
        dtype, shape, data = stored[name]
        parts += [name.encode(), dtype.encode(), ",".join(map(str, shape)).encode(), data]
    return hashlib.sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).hexdigest()


def expand(groups):
    for group in groups:
        if len(group) == 3:
            yield group
        else:
            prefix, first, last, items = group
            for number in range(first, last + 1):
                yield from ([f"{prefix}{number}{suffix}", i, o] for suffix, i, o in items)


def floats(name, stored, codes, count=None):
    dtype, shape, data = stored[name]
    code = codes.get(name)
    if code == "int8":
        scales = struct.unpack(f"<{shape[0]}f", stored["scale." + name][2])
        whole = struct.unpack(f"{len(data)}b", data)
        return [x * scales[at // (len(whole) // len(scales))] for at, x in enumerate(whole)]
    if code == "int4":
        scales = struct.unpack(f"<{len(stored['scale.' + name][2]) // 4}f", stored["scale." + name][2])
        return [(n - 8) * scales[at // (count // len(scales))] for at, n in enumerate(bits(data, count, 4))]
    if code is None and dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[at : at + 2])[0] for at in range(0, len(data), 2)]
    if code is not None:
        dtype, data = code[0], from_planes(data, FLOATS[code[0]][0], math.prod(code[1:]))
    width, letter = FLOATS[dtype]
    return list(struct.unpack(f"<{len(data) // width}{letter}", data))


def from_planes(data, width, n):
    planes = []
    for _ in range(width):
        (length,) = struct.unpack_from("<I", data)
        piece, data = data[4 : 4 + length], data[4 + length :]
        planes.append(piece if length == n else zlib.decompress(piece, wbits=-15))
    assert not data
    numbers = [int.from_bytes(bytes(column), "big") for column in zip(*planes, strict=True)]
    return b"".join((x >> 1 | (x & 1) << 8 * width - 1).to_bytes(width, "little") for x in numbers)


def bits(data, count, width):
    stream = int.from_bytes(data, "little")
    return [stream >> i * width & 2**width - 1 for i in range(count)]


def mixtures(stored, codes, n, k):
    if k == 1:
        return [[] for _ in range(n)]
    if codes.get("topk_weights") != "steps":
        return chunks(floats("topk_weights", stored, codes), k - 1)
    dtype, _, data = stored["topk_weights"]
    steps = struct.unpack(f"<{n * (k - 1)}{'B' if dtype == 'U8' else 'H'}", data)
    top = 255 if dtype == "U8" else 65535
    rows = []
    for row in chunks(steps, k - 1):
        last = rest = 1.0
        rows.append([])
        for s, step in enumerate(row, 1):
            low = rest / (k - s + 1)
            span = max(0.0, min(last, rest) - low)
            last = low + span * (step / top)
            rest = max(0.0, rest - last)
            rows[-1].append(last)
    return rows


def factor(rows, r, width, b):
    return [[x for _ in range(-(-width // b)) for x in next(rows)][:width] for _ in range(r)]


def chunks(values, size):
    return [list(values[at : at + size]) for at in range(0, len(values), size)]


def described(page):
    """The keys of the description that the page names."""
    return set(re.findall(r"^\| `(\w+)` \|", page.split("## The description")[1].split("**Layers.**")[0], re.M))
