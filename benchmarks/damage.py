"""Changes of files, at random: what damages them, and what somebody would write who means harm.

Bits are turned, bytes cut off, doubled and put in; numbers, strings, lists and objects of their JSON are swapped for
others (NaN, huge numbers, deep nesting, half characters); tensors get other types, shapes and values.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vblora import container
from vblora.files import directory, packed

DEEP = "DEEP"  # stands for a value nested 100,000 times, which no JSON writer writes
DIGITS = "1" * 5001  # of one number, more than Python reads
NUMBERS: list[Any] = [0, 1, -1, 2, 255, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]
STRINGS: list[Any] = ["", "x", "0", "x" * 3000, "\ud800", "\0", "VBLORA", "tied_lora", "all-linear"]
PATTERNS: list[Any] = ["(?:[a-z.]+)+!", "(?:(?:a{1000}){1000}){1000}", "("]
OTHERS: list[Any] = [True, False, None, [], [[]], [0], [""], {}, {"a": {}}, {"": None}, ["x"] * 300, DEEP, DIGITS]
NASTY = [*NUMBERS, *STRINGS, *PATTERNS, *OTHERS]


def attempt(action: Callable[[], Any]) -> Any:
    """What an action gives, None where it refuses."""
    try:
        return action()
    except (ValueError, FileNotFoundError):
        return None


def change(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder; "damaged", or "forged" where its checksums are made to fit."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")))
    if rng.random() < 0.02:
        path.unlink()
        return "damaged"
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        path.write_bytes(_changed_text(data, rng))
        return "forged" if path.name == directory.CONFIG_FILE else "damaged"
    if rng.random() < 0.6 and (found := attempt(lambda: container.deserialize(data))):
        path.write_bytes(_changed_tensors(*found, rng))
        return "forged"
    path.write_bytes(_changed_bytes(bytearray(data), rng))
    return "damaged"


def _changed_bytes(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        some = rng.randrange(1, 65)
        way = rng.randrange(6)
        if way == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            del data[at : at + some]
        elif way == 3:
            data[at:at] = rng.randbytes(some)
        elif way == 4:
            data[at:at] = data[: rng.randrange(len(data) + 1)]
        else:
            data[at : at + some] = bytes(min(some, len(data) - at))
    return bytes(data)


def _changed_text(data: bytes, rng: random.Random) -> bytes:
    """JSON with some of its values swapped; of several lines, one."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    at = rng.randrange(len(lines))
    value = attempt(lambda: container.parse_json(lines[at]))
    lines[at] = _text(_changed_json(value, rng)) if value is not None else rng.randbytes(9)
    return b"\n".join(lines)


def _text(value: Any) -> bytes:
    text = json.dumps(value)
    deep = "[" * 100_000 + "]" * 100_000 if len(text) % 2 else '{"a":' * 100_000 + "1" + "}" * 100_000
    return text.replace(f'"{DEEP}"', deep).replace(f'"{DIGITS}"', DIGITS).encode("utf-8", "surrogatepass")


def _changed_json(value: Any, rng: random.Random) -> Any:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _with_change(value, rng)
    return value


def _with_change(value: Any, rng: random.Random) -> Any:
    """The value with one change at a place within it."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(NASTY)
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    place, changed = rng.choice(places), value.copy()
    way = rng.randrange(8)
    if way == 0:
        del changed[place]
    elif way == 1 and isinstance(changed, dict):
        changed[rng.choice(("x", "r", "__metadata__", "vblora_method", "method", ""))] = rng.choice(NASTY[:9])
    elif way == 2 and isinstance(changed, dict):
        return list(changed.items())
    elif way == 3 and type(changed[place]) is int:
        changed[place] += rng.choice((-1, 1, 7, 10**6))
    else:
        changed[place] = _with_change(changed[place], rng)
    return changed


def _changed_tensors(raws: dict[str, container.Raw], metadata: dict[str, str], rng: random.Random) -> bytes:
    """A file with other tensors or other metadata, whose header fits; and its checksums, as far as they can be made."""
    raws, metadata = dict(raws), dict(metadata)
    for _ in range(rng.choice((1, 1, 2))):
        if metadata and rng.random() < 0.5:
            key = rng.choice(sorted(metadata))
            parsed = attempt(lambda key=key: container.parse_json(metadata[key]))
            new = parsed if parsed is None else _changed_json(parsed, rng)
            metadata[key] = (
                rng.choice(("", "x", "-1", "9" * 30)) if new is None else _text(new).decode("utf-8", "replace")
            )
        elif raws:
            name = rng.choice(sorted(raws))
            raws |= {rng.choice((name, name, f"{name}.x")): _changed_raw(raws[name], rng)}
            if rng.random() < 0.1:
                del raws[name]
    if rng.random() < 0.8:
        _sign(raws, metadata)
    return container.serialize(
        raws, {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    )


def _changed_raw(raw: container.Raw, rng: random.Random) -> container.Raw:
    """A tensor of another type, of another shape, or with other numbers."""
    way, data = rng.randrange(4), bytes(raw.data)
    if way == 0:
        dtype = rng.choice(sorted(container.DTYPES))
        count = len(data) // 8 * 8 // container.DTYPES[dtype].itemsize
        return container.Raw(dtype, (count,), data[: len(data) // 8 * 8])
    if way == 1:
        shape = list(raw.shape)
        rng.shuffle(shape)
        return raw._replace(shape=tuple(rng.choice((shape, [1, *shape], [*shape, 1], shape[::-1]))))
    if way == 2 and raw.dtype in container.FLOATS:
        tensor = raw.tensor().flatten()
        if tensor.numel():
            tensor[rng.randrange(tensor.numel())] = rng.choice((float("nan"), float("inf"), 1e30, -1.0, 0.0))
        return container.Raw.of(tensor.reshape(raw.shape))
    return raw._replace(data=bytes(_same_length(data, rng)))


def _same_length(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _sign(raws: dict[str, container.Raw], metadata: dict[str, str]) -> None:
    """Checksums that fit what the file has now, as somebody would make them who means harm."""
    if packed.HEADER in metadata:
        metadata[packed.CHECKSUM] = container.checksum(metadata[packed.HEADER], raws)
    elif directory.CHECKSUM in metadata:
        tensors = {name: raw.tensor() for name, raw in raws.items()}
        with warnings.catch_warnings():
            config = attempt(lambda: directory._own_settings(metadata)[0])
        if config is not None:
            metadata[directory.CHECKSUM] = directory.pair_checksum(config, tensors, metadata)
