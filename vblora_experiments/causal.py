"""Batches of encoded rows for causal language models: padded, or several joined to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

IGNORED = -100  # labels that the loss leaves out


class Encoded(NamedTuple):
    """A row as token numbers, and its labels."""

    input_ids: list[int]
    labels: list[int]


class EncodedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Encoded rows as the trainer takes them; by a column's name all of that column."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self.rows = [one._asdict() for one in encoded]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]


class Padded:
    """Batches padded on the right to their longest row."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": _filled(rows, "input_ids", self.pad, width),
            "attention_mask": torch.tensor(mask),
            "labels": _filled(rows, "labels", IGNORED, width),
        }


# ------------------------------------------------------------------------------------- joining


class JoinedRows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Several rows in one, up to `length` tokens (a longer row stands alone), with positions that begin anew.

    A model that is given these positions, no mask and no cache (use_cache false, as the trainer sets it) lets no token
    see another row: transformers' masks and flash attention both go by the positions. The first label of each row but
    the first is at its second token, so that no row is predicted from the one before.
    """

    def __init__(self, encoded: Sequence[Encoded], length: int) -> None:
        self.rows: list[dict[str, list[int]]] = []
        for members in _bins([len(one.input_ids) for one in encoded], length):
            parts = [encoded[number] for number in members]
            self.rows.append(
                {
                    "input_ids": [i for part in parts for i in part.input_ids],
                    "labels": [label for part in parts for label in [IGNORED, *part.labels[1:]]],
                    "position_ids": [at for part in parts for at in range(len(part.input_ids))],
                }
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]


def _bins(lengths: Sequence[int], length: int) -> list[list[int]]:
    """The rows' numbers in bins of at most `length` tokens: longest rows first, each into the fullest bin with room."""
    by_room: dict[int, list[list[int]]] = {}  # bins by the room that is left in them
    full: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        room = min((r for r in by_room if r >= lengths[number]), default=None)
        if room is None:
            members, left = [number], length - lengths[number]
        else:
            members, left = by_room[room].pop(), room - lengths[number]
            members.append(number)
            if not by_room[room]:
                del by_room[room]
        if left > 0:
            by_room.setdefault(left, []).append(members)
        else:
            full.append(members)
    # In the order of their first row, so that the trainer's shuffling alone decides the order.
    return sorted([*full, *(members for bins in by_room.values() for members in bins)])


@torch.no_grad()
def check_joining(model: Any, token: int) -> None:
    """Refuse a model whose joined rows would see each other, by what two short rows give.

    Raises:
        ValueError: it goes by another mask than that of the positions (OPT and BLOOM do).
    """
    was_training, cached = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = False
    first, row = torch.arange(3), [token] * 4
    outputs = []
    for start in (first, first + 3):
        ids = torch.tensor([[*start.tolist(), *row]], device=model.device)
        positions = torch.tensor([[*range(len(start)), *range(len(row))]], device=model.device)
        outputs.append(model(input_ids=ids, position_ids=positions).logits[0, len(start) :].float())
    model.train(was_training)
    model.config.use_cache = cached
    if not torch.allclose(outputs[0], outputs[1], rtol=1e-2, atol=1e-2):
        raise ValueError(f"{type(model).__name__}: joined rows would see each other: leave --pack_length out")


class PaddedJoined:
    """Batches of joined rows; what pads one is a row of its own, which nothing else sees and the loss leaves out."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        positions = [row["position_ids"] + list(range(width - len(row["position_ids"]))) for row in rows]
        return {
            "input_ids": _filled(rows, "input_ids", self.pad, width),
            "labels": _filled(rows, "labels", IGNORED, width),
            "position_ids": torch.tensor(positions),
        }


def _filled(rows: list[dict[str, list[int]]], name: str, value: int, width: int) -> torch.Tensor:
    return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
