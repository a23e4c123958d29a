"""The adapted layers of a model in few characters, and a fingerprint of them.

Blocks that repeat are written once: twelve encoder layers with two adapted projections each are

    ["encoder.layer.", 0, 11, [[".attention.self.query", 768, 768], [".attention.self.value", 768, 768]]]

and a layer without a number in its name is ["name", in, out].
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vblora.container import is_count
from vblora.shapes import LayerShape

WIDEST = 2**24  # inputs or outputs of one layer
NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def compact(shapes: Sequence[LayerShape]) -> list[list[Any]]:
    """The layers as groups, in their order; `expand` gives them back."""
    groups: list[list[Any]] = []
    for shape in shapes:
        split = _split(shape.name)
        if split is None:
            groups.append(list(shape))
            continue
        prefix, number, suffix = split
        item = [suffix, shape.in_features, shape.out_features]
        if groups and groups[-1][:3] == [prefix, number, number]:
            groups[-1][3].append(item)
        else:
            groups.append([prefix, number, number, [item]])
    merged: list[list[Any]] = []
    for group in groups:
        before = merged[-1] if merged else []
        if len(group) == len(before) == 4 and [group[0], group[1] - 1, group[3]] == [before[0], before[2], before[3]]:
            before[2] = group[2]
        else:
            merged.append(group)
    return merged


def expand(groups: Any, most_layers: int, most_characters: int) -> list[LayerShape]:
    """The layers that `compact` wrote.

    Args:
        groups: from JSON; anything may be in it.
        most_layers, most_characters: no more layers, and no longer names in all, are made.

    Raises:
        ValueError: no such groups, or a name comes twice.
    """
    if not isinstance(groups, list) or not groups:
        raise ValueError("the file names no layers")
    shapes: list[LayerShape] = []
    for group in groups:
        prefix, numbers, items = _checked(group)
        most_layers -= len(numbers) * len(items)
        most_characters -= len(numbers) * sum(len(prefix) + 9 + len(suffix) for suffix, _, _ in items)
        if most_layers < 0 or most_characters < 0:
            raise ValueError("the file names more layers than its size can hold values for")
        shapes += [LayerShape(f"{prefix}{n}{item[0]}", item[1], item[2]) for n in numbers for item in items]
    if len({shape.name for shape in shapes}) != len(shapes):
        raise ValueError("the file names a layer twice")
    return shapes


def fingerprint(shapes: Sequence[LayerShape], outputs: Mapping[str, slice]) -> str:
    """SHA-256 of the targets' names, widths and first outputs, one line each, sorted: whether an adapter fits."""
    lines = sorted(
        f"{s.name}\t{s.in_features}\t{s.out_features}\t{outputs[s.name].start or 0}\n".encode() for s in shapes
    )
    return hashlib.sha256(b"".join(lines)).hexdigest()


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names as a model has them: layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def _split(name: str) -> tuple[str, int, str] | None:
    """A name at its first number: what is before it, the number, what is behind it."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if NUMBER.fullmatch(part):
            return "".join(f"{p}." for p in parts[:index]), int(part), "".join(f".{p}" for p in parts[index + 1 :])
    return None


def _checked(group: Any) -> tuple[str, Sequence[int | str], list[list[Any]]]:
    """A group's prefix, its numbers ("" where it has none), and its layers."""
    if _is_item(group) and group[0]:
        return "", ("",), [group]
    good = isinstance(group, list) and len(group) == 4 and isinstance(group[0], str)
    if good and is_count(group[1]) and is_count(group[2], 10**9) and group[1] <= group[2]:
        if isinstance(group[3], list) and group[3] and all(map(_is_item, group[3])):
            return group[0], range(group[1], group[2] + 1), group[3]
    raise ValueError("the file's list of layers is damaged")


def _is_item(value: Any) -> bool:
    good = isinstance(value, list) and len(value) == 3 and isinstance(value[0], str)
    return good and all(is_count(n, WIDEST + 1) and n > 0 for n in value[1:])
