"""A Triton kernel for the composition, measured by composition.py beside the embedding bag.

Forward: one program for a row of the table. It reads k logits, turns them into weights, and sums k rows of the bank.
Backward, in two kernels without atomic additions, so that two runs give the same bits: one program for a row of the
table gives the gradient of its logits; one program for a row of the bank sums, in a fixed order, what the rows that
selected it send back (their places come from a stable sort of the indices).
"""

# mypy: disable-error-code="no-untyped-def,unused-ignore"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(bank, indices, logits, table, weights, b, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ks, columns = tl.arange(0, KP), tl.arange(0, B)
    z = tl.load(logits + row * K + ks, mask=ks < K, other=float("-inf"))
    e = tl.exp(z - tl.max(z, axis=0))
    w = e / tl.sum(e, axis=0)
    tl.store(weights + row * K + ks, w, mask=ks < K)
    total = tl.zeros((B,), dtype=tl.float32)
    for s in tl.static_range(K):
        index = tl.load(indices + row * K + s)
        vector = tl.load(bank + index * b + columns, mask=columns < b, other=0.0)
        total += tl.sum(tl.where(ks == s, w, 0.0), axis=0) * vector
    tl.store(table + row * b + columns, total, mask=columns < b)


@triton.jit
def _of_logits(bank, indices, weights, gradient, result, b, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr):
    """dz_s = w_s (g . bank[j_s] - sum_t w_t g . bank[j_t])"""
    row = tl.program_id(0).to(tl.int64)
    ks, columns = tl.arange(0, KP), tl.arange(0, B)
    g = tl.load(gradient + row * b + columns, mask=columns < b, other=0.0)
    w = tl.load(weights + row * K + ks, mask=ks < K, other=0.0)
    dots = tl.zeros((KP,), dtype=tl.float32)
    for s in tl.static_range(K):
        index = tl.load(indices + row * K + s)
        vector = tl.load(bank + index * b + columns, mask=columns < b, other=0.0)
        dots += tl.where(ks == s, tl.sum(g * vector, axis=0), 0.0)
    tl.store(result + row * K + ks, w * (dots - tl.sum(w * dots, axis=0)), mask=ks < K)


@triton.jit
def _of_bank(order, starts, weights, gradient, result, b, K: tl.constexpr, B: tl.constexpr):
    vector = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, B)
    total = tl.zeros((B,), dtype=tl.float32)
    for at in range(tl.load(starts + vector), tl.load(starts + vector + 1)):
        place = tl.load(order + at)  # in the (N, k) table of indices
        g = tl.load(gradient + (place // K) * b + columns, mask=columns < b, other=0.0)
        total += tl.load(weights + place) * g
    tl.store(result + vector * b + columns, total, mask=columns < b)


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bank: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
        n, k = indices.shape
        b = bank.shape[1]
        table, weights = bank.new_empty(n, b), torch.empty_like(selected)
        sizes = {"K": k, "KP": triton.next_power_of_2(k), "B": triton.next_power_of_2(b)}
        _forward[(n,)](bank, indices, selected, table, weights, b, **sizes)
        ctx.save_for_backward(bank, indices, weights)
        ctx.sizes = sizes
        return table

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        bank, indices, weights = ctx.saved_tensors
        (n, _), (h, b), gradient = indices.shape, bank.shape, gradient.contiguous()
        of_logits, of_bank = torch.empty_like(weights), torch.empty_like(bank)
        _of_logits[(n,)](bank, indices, weights, gradient, of_logits, b, **ctx.sizes)
        ordered, order = indices.flatten().sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(h + 1, device=ordered.device))
        sizes = {name: ctx.sizes[name] for name in ("K", "B")}
        _of_bank[(h,)](order, starts, weights, gradient, of_bank, b, **sizes)
        return of_bank, None, of_logits


def compose(bank: Tensor, indices: Tensor, selected: Tensor) -> Tensor:
    """As `vblora.bank.compose`, on a GPU in float32: (h, b), (N, k), (N, k) -> (N, b)."""
    return _Compose.apply(bank, indices.contiguous(), selected.contiguous())
