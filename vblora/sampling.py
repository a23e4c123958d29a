"""Which rows: batches of like length, so that little is computed on padding; a part of a set; the longest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import nn
from torch.utils.data import Sampler

T = TypeVar("T")
POOL = 50  # batches that are sorted by length together: more pad less, fewer mix better


class LengthGroupedSampler(Sampler[int]):
    """Row numbers in an order whose consecutive batches hold rows of like length.

    All rows are shuffled, cut into pools of `POOL` batches, each pool sorted by length and cut into batches, and the
    batches shuffled again: transformers' sampler of the same name leaves them sorted, so that a model sees only long
    rows, then only short ones. A batch that is not full comes last. The order follows from the seed and the epoch.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch, over all accumulation steps of one device.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator, device="cpu").tolist()
        size = self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), POOL * size):
            pool = sorted(order[start : start + POOL * size], key=lambda row: self.lengths[row])
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        last = [batch for batch in batches if len(batch) < size]
        full = [batch for batch in batches if len(batch) == size]
        shuffled = [full[at] for at in torch.randperm(len(full), generator=generator, device="cpu").tolist()]
        return iter([row for batch in [*shuffled, *last] for row in batch])


class LongestFirstSampler(Sampler[int]):
    """Row numbers by falling length, for evaluation: the least padding, and too little memory shows at once."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.order = sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


def spaced(items: Sequence[T], count: int | None) -> list[T]:
    """That many of the items, evenly spaced, as like ones stand beside each other in a set; all without a count."""
    if count is None or count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def positions(model: nn.Module) -> int | None:
    """How many tokens a row may have; None for a model without learned positions, which has no such limit."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa begins to count behind its padding token.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
