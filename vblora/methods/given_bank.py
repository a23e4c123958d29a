"""An adapter on the bank of another one, which stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch

from vblora.files.reading import read_bank
from vblora.methods.vb_lora import VBLoRA


@torch.no_grad()
def use_bank(adapter: VBLoRA, source: str | Path) -> None:
    """Take over the bank of a saved adapter, and freeze it: training moves the logits (and heads) alone.

    Call it before `vblora.param_groups`, which then takes no `lr_vector_bank`.

    Raises:
        ValueError: no adapter with a bank is there, the bank has another shape, or there is nothing left to train: of
            one vector to a sub-vector the selection never moves. The adapter is as it was.
    """
    if adapter.config.topk == 1:
        raise ValueError(
            "topk 1 with a frozen bank leaves nothing of it to train, as one vector has weight 1: give topk 2"
        )
    bank = read_bank(source)
    if bank.shape != adapter.vector_bank.shape:
        raise ValueError(
            f"the bank in {source} is {tuple(bank.shape)}, this adapter's {tuple(adapter.vector_bank.shape)}: "
            "num_vectors and vector_length must be the same"
        )
    if not torch.isfinite(bank).all():
        raise ValueError(f"the bank in {source} holds NaN or infinite numbers")
    adapter.vector_bank.copy_(bank)
    adapter.vector_bank.requires_grad_(False)
