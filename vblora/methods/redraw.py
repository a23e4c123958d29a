"""Logits for files: those that a top-k file lacks are drawn again, those of a full file agree with the selection."""

from __future__ import annotations

import torch
from torch import Tensor

from vblora.config import VBLoRAConfig
from vblora.logits import draw


def redrawn(config: VBLoRAConfig, parts: Tensor, seed: int, indices: Tensor, selected: Tensor) -> Tensor:
    """All (N, h) logits in float32 on the CPU: those at `indices` (N, k) give the weights that `selected` (N, k) give.

    The others are drawn as `attach` draws them from `seed`. The selected ones are log w + c. Softmax leaves c free, row
    by row: it is chosen so that the smallest selected logit is as far above the k-th largest drawn one, which it was
    when training began, as training has probably raised it (`_raised`). So the others keep the values they started
    with, which they have moved from only if they were ever selected, and the selection is about as settled as it was.
    The few (at most k) that would not be below the selected ones, because they were selected once and are no longer,
    are mirrored to as far below the smallest. A weight under 2^-24, the last bit of a sum of 1 in float32, counts as
    that: its logarithm must be finite to be trained.
    """
    drawn = torch.cat(list(draw(config, parts, seed)[1]))  # (N, h), float32 on the CPU as when training began
    logs = selected.float().cpu().softmax(dim=-1).clamp(min=2**-24).log()  # (N, k)
    largest = drawn.topk(config.topk, dim=-1).values  # (N, k)
    smallest = largest[:, -1:] + _raised(logs, largest)  # (N, 1)
    shifted = logs - logs.min(dim=-1, keepdim=True).values + smallest
    below = torch.nextafter(2 * smallest - drawn, torch.tensor(-torch.inf, device="cpu"))
    return torch.where(drawn < smallest, drawn, below).scatter(1, indices.cpu(), shifted)


def _raised(selected: Tensor, drawn: Tensor) -> Tensor:
    """How far training has raised the smallest of the k selected logits, by how far it has moved them apart.

    Both are (N, k); the first is known up to a constant for each row. In adapters of MiniLM trained on CoLA, MRPC and
    SST-2 (k 2) it was 0.42, 0.32 and 0.35 of that, so a third is taken; that it is shared by the k - 1 gaps where k is
    larger is a guess. One number for all rows.
    """
    apart = [values.amax(dim=-1) - values.amin(dim=-1) for values in (selected, drawn)]
    gaps = 3 * max(1, selected.shape[-1] - 1)
    return (apart[0] - apart[1]).median().clamp(min=0) / gaps


def above_others(logits: Tensor, selected: Tensor) -> Tensor:
    """These (N, h) logits with the k at `selected` (N, k) the largest of their row.

    With `vblora.AdamW` they are. After another optimiser, which leaves the selection as it was, they may not be: a
    reader, who selects the k largest, would then have another function. The k are raised by one number for each row,
    which their softmax does not feel.
    """
    chosen = logits.gather(1, selected)  # (N, k)
    others = logits.scatter(1, selected, -torch.inf).amax(dim=1, keepdim=True)  # (N, 1)
    short = others - chosen.amin(dim=1, keepdim=True)
    gap = 4 * torch.finfo(logits.dtype).eps * others.abs().clamp(min=1)  # that rounding cannot take away
    raised = torch.where(short >= 0, chosen + short + gap, chosen)
    return logits.scatter(1, selected, raised)
