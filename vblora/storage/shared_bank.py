"""One bank for many adapters: a further adapter is its indices and weights alone.

The bank is the larger part of an adapter of a small model. Trained once and then frozen, it serves any number of tasks
or users, whose logits alone differ (the paper shares it between layers and modules; between adapters is this
project's).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vblora.methods.vb_lora import VBLoRA
from vblora.storage import TENSOR_FILE
from vblora.storage.files import read_tensors, write_tensors
from vblora.storage.peft_format import BANK

SUFFIX = ".bank.safetensors"


def read_bank(source: str | Path) -> Tensor:
    """The bank (h, b) of an adapter: of a directory, ours or PEFT's, or of a packed file.

    Raises:
        ValueError: no adapter is there, or one without a bank.
    """
    path = Path(source)
    if path.is_file():
        from vblora.storage import packed  # it builds on this module

        tensors = packed.read(path).tensors
    else:
        path = path / TENSOR_FILE
        tensors, _ = read_tensors(path)
    banks = [tensor for name, tensor in tensors.items() if name in ("vector_bank", BANK)]
    if len(banks) != 1 or banks[0].ndim != 2 or not banks[0].is_floating_point():
        raise ValueError(f"{path} holds no vector bank")
    return banks[0]


@torch.no_grad()
def use_bank(adapter: VBLoRA, source: str | Path) -> None:
    """Take over the bank of a saved adapter, and freeze it: training moves the logits (and heads) alone.

    Call it before `vblora.param_groups`, which then takes no `lr_vector_bank`.

    Raises:
        ValueError: as `read_bank`, or the bank has another shape. The adapter is as it was.
    """
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


# --- Packed adapters whose bank is in a file of its own --------------------------------------------------------------


def key_of(bank: Tensor) -> str:
    """SHA-256 of the bank's numbers in float32, row by row, little-endian: what a packed file knows it by."""
    return hashlib.sha256(bank.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def is_key(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def file_of(key: str) -> str:
    """The name of the file that holds the bank with this key."""
    return key[:16] + SUFFIX


def write_beside(folder: Path, bank: Tensor) -> None:
    """Write the bank into the folder, under its name, unless it is there."""
    path = folder / file_of(key_of(bank))
    if not path.exists():
        write_tensors(path, {"vector_bank": bank.detach().float()}, {})


def read_beside(folder: Path, key: str) -> Tensor:
    """The bank with this key from its file in the folder.

    Raises:
        ValueError: no such file, or it holds another bank.
    """
    path = folder / file_of(key)
    tensors, _ = read_tensors(path)
    return checked(tensors, key, str(path))


def checked(tensors: dict[str, Tensor], key: str, name: str) -> Tensor:
    """The bank among a file's tensors, if it is the one with this key.

    Raises:
        ValueError: it is not; the message has the file's name.
    """
    bank = tensors.get("vector_bank")
    if bank is None or bank.dtype != torch.float32 or bank.ndim != 2 or key_of(bank) != key:
        raise ValueError(f"{name} does not hold the bank that its name says")
    return bank
