"""The mathematics of VB-LoRA: a vector bank, a top-k admixture, and the factors composed from them.

Every factor of every layer is cut into sub-vectors of length b. Sub-vector i is a mixture of k rows of one
bank (h x b) shared by all layers, modules and both factors (paper, Sections 3.2 to 3.4):

    u_i = sum_s w_is * bank[j_is],    w_i = softmax(the k largest logits of row i),    j_i = their indices

Two forms of the same function stand here. `compose` is the one that trains: it sees only the k selected
logits of each row, because only they have a gradient. `compose_dense` starts from all h logits as the paper
writes it; it is short, slow, and what the fast form is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vblora.low_rank import is_traced
from vblora.shapes import LayerShape, peft_index_bytes

Factors = tuple[Tensor, Tensor]  # A: (r, in_features) and B transposed: (r, out_features)


def select(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, largest first, and their indices: two (N, k) tensors."""
    return logits.topk(topk, dim=-1)


def compose(bank: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
    """All sub-vectors in one weighted embedding bag: (h, b), (N, k), (N, k) -> (N, b).

    `indices` and `selected` are what `select` gives. Differentiable in `bank` and in `selected`, twice too. What is
    given in 16 bits is composed in float32, which is also the result's type: on CUDA some releases of PyTorch have no
    backward of a weighted embedding bag in 16 bits (its issues 185808 and 185889).
    """
    wide = torch.promote_types(bank.dtype, torch.float32)
    bank, weights = bank.to(wide), selected.to(wide).softmax(dim=-1)  # (h, b), (N, k)
    if is_traced() and not torch.compiler.is_compiling():
        return _mixtures(bank, indices, weights)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Mixtures.apply(bank, indices, weights)
    return _bag(bank, indices, weights)


def _bag(bank: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, bank, mode="sum", per_sample_weights=weights)


def _mixtures(bank: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The same in plain operations, which take the memory of k bags."""
    return (weights.unsqueeze(-1) * bank[indices]).sum(dim=-2)  # (N, k, b) -> (N, b)


class _Mixtures(torch.autograd.Function):
    """`_bag`, whose own backward cannot be gone back through: where that is asked for, `_mixtures` is."""

    @staticmethod
    def forward(ctx: Any, bank: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(bank, indices, weights)
        with torch.enable_grad():
            of_bank, _, of_weights = ctx.needs_input_grad
            ctx.inner = bank.detach().requires_grad_(of_bank), weights.detach().requires_grad_(of_weights)
            ctx.bag = _bag(ctx.inner[0], indices, ctx.inner[1])
        return ctx.bag.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            asked = [tensor for tensor in ctx.inner if tensor.requires_grad]
            found = iter(torch.autograd.grad(ctx.bag, asked, gradient, retain_graph=True))
            of_bank, of_weights = (next(found) if tensor.requires_grad else None for tensor in ctx.inner)
            return of_bank, None, of_weights
        bank, indices, weights = ctx.saved_tensors
        shares = weights.unsqueeze(-1) * gradient.unsqueeze(-2)  # (N, k, b)
        of_bank = torch.zeros_like(bank).index_add(0, indices.flatten(), shares.flatten(0, 1))
        return of_bank, None, (bank[indices] * gradient.unsqueeze(-2)).sum(dim=-1)


def compose_dense(bank: Tensor, logits: Tensor, topk: int) -> Tensor:
    """The paper's formula from all logits: (h, b), (N, h) -> (N, b). The reference, not the fast path."""
    values, indices = logits.topk(topk, dim=-1)
    return _mixtures(bank, indices, values.softmax(dim=-1))


def smallest_index_dtype(num_vectors: int) -> torch.dtype:
    """The integer type PEFT stores indices in."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[peft_index_bytes(num_vectors)]


class Layout:
    """Which rows of the (N, b) table of sub-vectors make up which factor of which layer.

    Layer by layer: the r x ceil(in/b) sub-vectors of A, then the r x ceil(out/b) of B transposed. b need not
    divide a dimension: the last sub-vector of a row is cut to fit.
    """

    def __init__(self, shapes: Sequence[LayerShape], r: int, vector_length: int) -> None:
        self.shapes = list(shapes)
        self.r = r
        self.vector_length = vector_length
        self.sizes: list[int] = []  # rows of the table per factor: A of layer 0, B of layer 0, A of layer 1, ...
        for shape in self.shapes:
            self.sizes += [r * self.tiles(shape.in_features), r * self.tiles(shape.out_features)]

    @property
    def rows(self) -> int:
        """N, the number of sub-vectors."""
        return sum(self.sizes)

    @property
    def parts(self) -> Tensor:
        """For each row of the table 2 j, of A, or 2 j + 1, of B, where j numbers the kinds of layers: (N)."""
        kinds: dict[str, int] = {}
        numbers = [kinds.setdefault(shape.kind, 2 * len(kinds)) + side for shape in self.shapes for side in (0, 1)]
        return torch.tensor(numbers, device="cpu").repeat_interleave(torch.tensor(self.sizes, device="cpu"))

    def tiles(self, features: int) -> int:
        """Sub-vectors in one row of a factor that is `features` wide."""
        return -(-features // self.vector_length)

    def factors(self, table: Tensor) -> list[Factors]:
        """Views of the (N, b) table as the factors of each layer; no copy is made.

        One split serves all layers, so that its backward gathers all their gradients at once.
        """
        parts = iter(table.split(self.sizes))
        return [
            (self._view(next(parts), shape.in_features), self._view(next(parts), shape.out_features))
            for shape in self.shapes
        ]

    def _view(self, part: Tensor, features: int) -> Tensor:
        whole = part.view(self.r, -1)  # (r, tiles * b)
        return whole if whole.shape[1] == features else whole[:, :features]


# --- What is kept after training: k - 1 weights and k indices for each sub-vector ---


def topk_tensors(bank: Tensor, indices: Tensor, selected: Tensor) -> dict[str, Tensor]:
    """The tensors of a top-k file, from the bank (h, b) and the selected logits (N, k) with their indices."""
    # In float32 whatever the adapter's precision: PEFT reads the weights in no other.
    weights = at_most_one(selected.float().softmax(dim=-1)[:, :-1])  # (N, k - 1)
    return {"vector_bank": bank, "topk_indices": indices, "topk_weights": weights}


def at_most_one(weights: Tensor) -> Tensor:
    """The first k - 1 of k weights in float32 (N, k - 1), lowered by some bits where rounding took their sum above 1.

    The reader takes the last weight as 1 - sum, and PEFT its logarithm: rounding must not make it negative.
    """
    above = weights.sum(dim=-1, keepdim=True) > 1
    return torch.where(above, weights * (1 - 4 * torch.finfo(torch.float32).eps), weights)


def selected_logits(weights: Tensor) -> Tensor:
    """The k logits (N, k), logarithms of the weights, that the first k - 1 weights of a top-k file stand for."""
    first = weights.float().clamp(min=0)  # (N, k - 1)
    last = (1 - first.sum(dim=-1, keepdim=True)).clamp(min=0)
    return torch.cat([first, last], dim=1).log()
