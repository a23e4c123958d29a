"""One bank for many adapters: a further adapter is its indices and weights alone.

The bank is the larger part of an adapter of a small model. Trained once and then frozen, it serves any number of tasks
or users, whose logits alone differ (the paper shares it between layers and modules; between adapters is this
project's).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vblora.container import opened
from vblora.io import alone_in, write_tensors

SUFFIX = ".bank.safetensors"
MOST_BYTES = 2**30  # of its file, which may be anybody's


# --- Packed adapters whose bank is in a file of its own --------------------------------------------------------------


def key_of(bank: Tensor) -> str:
    """SHA-256 of the bank's numbers in float32, row by row, little-endian: what a packed file knows it by."""
    return hashlib.sha256(bank.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def is_key(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def file_of(key: str) -> str:
    """The name of the file that holds the bank with this key."""
    return key[:16] + SUFFIX


@contextmanager
def beside(folder: Path, bank: Tensor) -> Iterator[None]:
    """The bank in the folder, under its name, for the file that the block writes; one such block at a time.

    It is written unless it is there whole. Where the block fails, a bank that is new goes with it.
    """
    key = key_of(bank)
    path = folder / file_of(key)
    with alone_in(folder):
        new = not path.exists()
        try:
            try:
                read_beside(folder, key)
            except ValueError:  # missing, or damaged
                write_tensors(path, {"vector_bank": bank.detach().float()}, {})
            yield
        except BaseException:
            if new:
                with suppress(OSError):  # in a read-only folder it has not come to be
                    path.unlink()
            raise


def read_beside(folder: Path, key: str) -> Tensor:
    """The bank with this key from its file in the folder.

    Raises:
        ValueError: no such file, or it holds another bank.
    """
    path = folder / file_of(key)
    with opened(path) as file:
        if file.size > MOST_BYTES:
            raise ValueError(f"{path} has {file.size:,} bytes, more than the {MOST_BYTES:,} allowed for a bank")
        return checked(file.tensors(), key, str(path))


def checked(tensors: dict[str, Tensor], key: str, name: str) -> Tensor:
    """The bank among a file's tensors, if it is the one with this key.

    Raises:
        ValueError: it is not; the message has the file's name.
    """
    bank = tensors.get("vector_bank")
    if bank is None or bank.dtype != torch.float32 or bank.ndim != 2 or key_of(bank) != key:
        raise ValueError(f"{name} does not hold the bank that its name says")
    return bank
