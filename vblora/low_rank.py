"""output + x A^T B^T: what an adapter adds to a layer, in one product and, where it can be, in the output itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def add_low_rank(output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """output + x A^T B^T as a new tensor, from A (r, in) and B transposed (r, out)."""
    hidden = F.linear(x, a)  # (..., r)
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat, hidden.reshape(-1, hidden.shape[-1]), b).view(output.shape)


def add_to_parts(output: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor]], starts: Sequence[int]) -> Tensor:
    """The same for a layer that is several in one, equally wide: the factors of some parts, and where each begins."""
    hidden = F.linear(x, torch.cat([a for a, _ in factors]))  # (..., parts * r)
    parts = hidden.reshape(-1, hidden.shape[-1]).chunk(len(factors), dim=-1)
    width = factors[0][1].shape[-1]
    sums = list(output.reshape(-1, output.shape[-1]).split(width, dim=-1))
    for part, (_, b), start in zip(parts, factors, starts, strict=True):
        sums[start // width] = torch.addmm(sums[start // width], part, b)
    return torch.cat(sums, dim=-1).view(output.shape)


def add_low_rank_(output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same within `output`, which saves a copy of it; where that cannot be, `add_low_rank`.

    A layer with a bias gives a view of a matrix, whose gradient autograd would copy for what is written to it. Under a
    dispatch mode, such as that of selective checkpointing, the output may be kept to be used again. Not for what is
    traced (`is_traced`).
    """
    if torch._C._len_torch_dispatch_stack() > 0 or not output.is_contiguous():
        return add_low_rank(output, x, a, b)
    if torch.is_grad_enabled():
        return add_low_rank(output, x, a, b) if output._is_view() else _AddLowRank.apply(output, x, a, b)
    hidden = F.linear(x, a)
    output.view(-1, output.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), b)
    return output


class _AddLowRank(torch.autograd.Function):
    """output += x A^T B^T."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = F.linear(x, a)  # (..., r)
        flat = hidden.view(-1, hidden.shape[-1])
        output.view(-1, output.shape[-1]).addmm_(flat, b)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, a, b, flat)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative it is no constant
            hidden = F.linear(x, a).view(hidden.shape)
        flat = gradient.reshape(-1, gradient.shape[-1])  # (rows, out)
        of_hidden = flat @ b.T  # (rows, r)
        needs_x, needs_a, needs_b = ctx.needs_input_grad[1:]
        of_x = (of_hidden @ a).view(x.shape) if needs_x else None
        of_a = of_hidden.T @ x.reshape(-1, x.shape[-1]) if needs_a else None
        of_b = hidden.T @ flat if needs_b else None
        return gradient, of_x, of_a, of_b


def without_autocast(device: str) -> Any:
    """Switches autocast off, where it is on: entering its context at every layer costs more than a small product."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def is_traced() -> bool:
    """Whether torch.compile, torch.jit.trace, a transform of torch.func or forward-mode differentiation looks on.

    They need plain operations, and tensors that are kept from an earlier pass are not theirs.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def in_backward() -> bool:
    """Whether a backward pass is running."""
    return torch._C._current_graph_task_id() != -1
