"""The logits that training keeps: of a sub-vector's h those that were ever selected, and the next ones.

Only selected logits have a gradient. One that was never selected has no moments either, so that AdamW leaves it where
it was drawn (weight decay shrinks all such by one common factor). Two things follow:

- The next entry to enter a selection is always the largest that never was in one.
- What was never selected need not be kept: the seed draws it again.

(Weight decay on the logits, which the paper does not have, wants float32: in 16 bits the common factor, kept once for
all, drifts from the entries in slots, which are rounded at every step.)

So a table of C < h slots for each sub-vector is enough. It begins with the selected entries, and the others follow from
the largest down: entries enter selections in the order of their slots, and before the last slot is reached the table is
widened. Where most entries have been selected, or no seed is known, it holds all h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vblora.bank import select
from vblora.config import VBLoRAConfig
from vblora.shapes import shares

START = 32  # slots at the beginning; in real training a row has 10 to 20 selected entries after some hundred steps
BLOCK = 1 << 22  # numbers that are drawn at once: all N x h would be 320 MB for Llama2-7B


def draw(config: VBLoRAConfig, parts: Tensor, seed: int) -> tuple[Tensor, Iterator[Tensor]]:
    """Initial values: the bank (h, b), and the logits (N, h) as blocks of rows, from the first to the last.

    With `init_vectors_of_a` = n the vectors from n on are zero. Where vectors are divided (`divided`), a logit is
    positive if row and vector are of one part, else negative: a row selects those of its part (`Layout.parts`) first.

    Drawn on the CPU in float32 whatever the device, so that a seed means the same on all of them; to the bit only on
    processors of one kind, as PyTorch draws normal numbers in other ways on others.
    """
    h, bound = config.num_vectors, config.init_vector_bank_bound
    generator = torch.Generator().manual_seed(seed)
    bank = torch.empty(h, config.vector_length, dtype=torch.float32, device="cpu")
    bank.uniform_(-bound, bound, generator=generator)
    if config.init_vectors_of_a:
        bank[config.init_vectors_of_a :] = 0
    split = divided(config, parts)

    def blocks() -> Iterator[Tensor]:
        for part in _parts(len(parts), h):
            drawn = torch.empty(part.stop - part.start, h, dtype=torch.float32, device="cpu")
            drawn.normal_(generator=generator).mul_(config.init_logits_std)
            if split is not None:
                own = split[0][part].unsqueeze(1) == split[1]  # (n, h)
                drawn = torch.where(own, drawn.abs(), -drawn.abs())
            yield drawn

    return bank, blocks()


def divided(config: VBLoRAConfig, parts: Tensor) -> tuple[Tensor, Tensor] | None:
    """The part of each row (N) and of each vector (h): the first n vectors are A's and the others B's, or all of both,
    and the kinds of layers have as many of them as is their share of the rows. None where nothing is divided."""
    n, h = config.init_vectors_of_a, config.num_vectors
    if not (n or config.init_by_kind):
        return None
    parts = parts % 2 if not config.init_by_kind else parts if n else parts // 2 * 2
    vectors = []
    for side, total in ((0, n), (1, h - n)) if n else ((0, h),):
        numbers, rows = parts[parts % 2 == side].unique(return_counts=True)
        sizes = shares(total, rows.tolist())
        if min(sizes) < config.topk:
            raise ValueError(
                f"init_by_kind deals {total} vectors out to {len(sizes)} kinds of layers, and one would have "
                f"{min(sizes)} where topk is {config.topk}: give more num_vectors, or init_by_kind=False"
            )
        vectors.append(numbers.repeat_interleave(torch.tensor(sizes, device="cpu")))
    return parts, torch.cat(vectors)


def _parts(rows: int, num_vectors: int) -> list[slice]:
    """Rows in blocks of at most about BLOCK numbers."""
    size = max(16, BLOCK // num_vectors // 16 * 16)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class LogitTable(nn.Module):
    """The logits of N sub-vectors in C slots each.

    Attributes:
        indices: which of the h entries a slot holds, (N, C).
        values: its logit, (N, C). Between steps the selected ones train elsewhere, and `put` brings them here.
        slots: the selected slots, the largest logit first, (N, k).
        reached: the last slot that was ever selected, in any row.
        shrunk: what weight decay has multiplied the entries without a slot by.
        seed: what they are drawn from (two halves of 32 bits).
    """

    indices: Tensor
    values: Tensor
    slots: Tensor
    reached: Tensor
    shrunk: Tensor
    seed: Tensor

    def __init__(self, config: VBLoRAConfig, parts: Tensor) -> None:
        super().__init__()
        self.config = config
        self.parts = parts  # (N), on the CPU, where logits are drawn
        self.rows = rows = len(parts)
        kind = torch.uint8 if config.num_vectors <= 256 else torch.int32  # 16 bits can be sent by neither gloo nor NCCL
        with torch.device("cpu"):
            self.register_buffer("indices", torch.zeros(rows, config.topk, dtype=kind))
            self.register_buffer("values", torch.zeros(rows, config.topk))
            self.register_buffer("slots", torch.zeros(rows, config.topk, dtype=torch.long))
            self.register_buffer("reached", torch.tensor(0))
            self.register_buffer("shrunk", torch.tensor(1.0))
            self.register_buffer("seed", torch.zeros(2, dtype=torch.long))
        self._noted: tuple[Tensor, Any] | None = None  # `reached` on its way from a GPU

    @property
    def width(self) -> int:
        """C."""
        return self.indices.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether every entry has a slot."""
        return self.width == self.config.num_vectors

    # -- filling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Begin with the logits that `draw` gives for this seed, and the selection that follows."""
        self._set_seed(seed)
        self._fill(self._fitting(self.config.topk), ((block, None) for block in self._drawn()))
        self.slots.copy_(self.values.topk(self.config.topk, dim=-1).indices)
        self._reach(self.config.topk - 1)

    @torch.no_grad()
    def take_over(
        self, logits: Tensor, selected: Tensor, seed: int | None, also: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Hold these (N, h) logits, of which those at `selected` (N, k) are selected.

        Entries that differ from what `seed` draws get slots; without a seed, or where they are many, all do.

        Args:
            logits: all of them, on any device.
            selected: the heaviest first.
            seed: None where it is not known.
            also: indices (N, c) and a mask of the same shape: further entries that must have a slot.
        """
        parts = _parts(self.rows, self.config.num_vectors)
        if seed is None:
            self._set_seed(0)
            self._fill(self.config.num_vectors, ((logits[part].cpu(), None) for part in parts))
        else:
            self._set_seed(seed)
            most = max(int(first.sum(dim=1).max()) for _, first in self._changed(logits, selected, also))
            self._fill(self._fitting(most), self._changed(logits, selected, also))
            self._reach(most - 1)
        self._locate(selected)

    def _changed(
        self, logits: Tensor, selected: Tensor, also: tuple[Tensor, Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Block by block: the logits, and which of them need a slot."""
        parts = _parts(self.rows, self.config.num_vectors)
        for part, drawn in zip(parts, self._drawn(), strict=True):
            current = logits[part].cpu()
            first = (current != drawn.to(current.dtype)).scatter(1, selected[part].cpu(), True)
            if also is not None:
                needed = torch.zeros_like(first).scatter(1, also[0][part].cpu().long(), also[1][part].cpu())
                first |= needed
            yield current, first

    def _drawn(self) -> Iterator[Tensor]:
        """The entries as if none had ever been selected, in blocks."""
        shrunk = self.shrunk.cpu()
        for block in draw(self.config, self.parts, self._get_seed())[1]:
            yield block if shrunk == 1 else block.to(shrunk.dtype) * shrunk

    def _fill(self, width: int, blocks: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Choose `width` entries of each row: those marked, then the others from the largest down."""
        indices, values = [], []
        for current, first in blocks:
            if width == self.config.num_vectors:
                order = torch.arange(width, device="cpu").expand(len(current), -1)
            else:
                key = current if first is None else current.masked_fill(first, torch.inf)
                order = key.topk(width, dim=-1).indices
            indices.append(order.to(self.indices.dtype))
            values.append(current.gather(1, order))
        self.indices = torch.cat(indices).to(self.indices.device)
        self.values = torch.cat(values).to(self.values)

    def _fitting(self, taken: int) -> int:
        """A width that leaves slots to go on with where `taken` are: `START`, then 5/4 of it, until it is half of h."""
        width = START
        while width < taken + 2 * self.config.topk + 2:
            width = -(-width * 5 // 32) * 8  # a multiple of eight
        return width if 2 * width <= self.config.num_vectors else self.config.num_vectors

    # -- training ------------------------------------------------------------------------------------------------

    def put(self, selected: Tensor) -> None:
        """Set the selected slots' logits (N, k)."""
        self.values.scatter_(1, self.slots, self.precise(selected))

    def precise(self, selected: Tensor) -> Tensor:
        """The selected logits (N, k) in the table's precision. Where they are kept in less (TRL casts all that trains
        to bfloat16), those that are the table's own rounded are the table's own."""
        if selected.dtype == self.values.dtype:
            return selected
        own = self.values.gather(1, self.slots)
        return torch.where(own.to(selected.dtype) == selected, own, selected.to(own.dtype))

    def shrink(self, factor: float) -> None:
        """Multiply all entries by weight decay's factor."""
        if factor != 1:
            self.values.mul_(factor)
            self.shrunk.mul_(factor)

    def select(self) -> tuple[Tensor, Tensor]:
        """The k largest logits, and which entries they are: two (N, k) tensors."""
        values, slots = select(self.values, self.config.topk)
        self.slots.copy_(slots)
        self._reach(torch.maximum(self.reached, slots.max()))
        return values, self.indices.gather(1, slots).long()

    def make_room(self) -> bool:
        """Widen the table unless one more selection is sure to leave a slot that never was selected; whether it was.

        Every entry without a slot is below that one, so that the selection is the same as from all h.
        """
        narrow = not self.is_full and self.width < self._highest() + self.config.topk + 2
        if narrow:
            self.widen(self._fitting(self.width))
        return narrow

    def widen(self, width: int) -> None:
        """Give slots to the largest entries that have none, up to this width; no entry changes."""
        more: list[tuple[Tensor, Tensor]] = []
        for part, block in zip(_parts(self.rows, self.config.num_vectors), self._drawn(), strict=True):
            rest = block.scatter(1, self.indices[part].cpu().long(), -torch.inf)
            values, indices = rest.topk(width - self.width, dim=-1)
            more.append((values.to(self.values), indices.to(self.indices)))
        values, indices = (torch.cat(tensors) for tensors in zip(*more, strict=True))
        self.values = torch.cat([self.values, values], dim=1)
        self.indices = torch.cat([self.indices, indices], dim=1)

    @torch.no_grad()
    def include(self, indices: Tensor, mask: Tensor) -> None:
        """Give slots to the entries at `indices` (N, c) where `mask` is set, too."""
        if not self.is_full:
            chosen = self.indices.gather(1, self.slots).long()
            self.take_over(self.dense(), chosen, self._get_seed(), (indices, mask))

    def arrange(self, indices: Tensor, numbers: Tensor) -> Tensor:
        """`numbers` (N, c) of the entries at `indices`, in the table's slots; 0 where it has other entries: (N, C)."""
        arranged = []
        for part in _parts(self.rows, self.config.num_vectors):
            dense = numbers.new_zeros(part.stop - part.start, self.config.num_vectors)
            dense.scatter_(1, indices[part].long(), numbers[part])
            arranged.append(dense.gather(1, self.indices[part].long()))
        return torch.cat(arranged)

    # -- reading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def dense(self) -> Tensor:
        """All h logits: a new (N, h) tensor."""
        parts = _parts(self.rows, self.config.num_vectors)
        blocks: Iterable[Tensor]
        if self.is_full:
            blocks = (torch.empty(p.stop - p.start, self.config.num_vectors, device="cpu") for p in parts)
        else:
            blocks = self._drawn()
        return torch.cat(
            [
                block.to(self.values).scatter(1, self.indices[part].long(), self.values[part])
                for part, block in zip(parts, blocks, strict=True)
            ]
        )

    # -- small things --------------------------------------------------------------------------------------------

    def _set_seed(self, seed: int) -> None:
        self.seed.copy_(torch.tensor(divmod(seed, 1 << 32), device="cpu"))

    def _get_seed(self) -> int:
        high, low = self.seed.tolist()
        return (high << 32) + low

    def _locate(self, selected: Tensor) -> None:
        """Find the slots of these entries (N, k)."""
        wanted = selected.to(self.indices)
        slots = [
            (self.indices[part].unsqueeze(1) == wanted[part].unsqueeze(2)).int().argmax(dim=-1)  # (n, k, C) -> (n, k)
            for part in _parts(self.rows, self.config.num_vectors)
        ]
        self.slots.copy_(torch.cat(slots))

    def _reach(self, slot: int | Tensor) -> None:
        """Note the last slot that was selected. From a GPU the number comes while the next batch is computed."""
        self.reached.copy_(torch.as_tensor(slot, device=self.reached.device))
        self._noted = None
        if self.reached.is_cuda:
            number = torch.empty((), dtype=torch.long, device="cpu", pin_memory=True).copy_(
                self.reached, non_blocking=True
            )
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.reached.device))
            self._noted = (number, event)

    def _highest(self) -> int:
        if self._noted is None:
            return int(self.reached)
        number, event = self._noted
        event.synchronize()
        return int(number)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Tables of other widths are taken over too, always as new tensors, by which the optimiser sees the change."""
        self._noted = None
        for name in ("indices", "values"):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.ndim == 2 and len(saved) == self.rows:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_noted": None}
