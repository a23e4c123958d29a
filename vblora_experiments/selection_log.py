"""What VB-LoRA selects while it trains, in one small file: the source of the paper's Figures 3 to 8.

The file (safetensors) holds, for N sub-vectors, h vectors and E epochs,

    indices     (E + 1, N, k)           the selected vectors before training and after each epoch
    weights     (E + 1, N, k) float16   their weights in the mixture
    footprints  (E, N, ceil(h / 8))     one bit per vector: selected after some step of that epoch (numpy.packbits);
                                        by noisy top-k, in the forward pass of some step
    changes     (E,)                    how often a sub-vector's set of vectors changed between two steps of the epoch
    epochs      (E + 1,)                the epochs that the snapshots were taken after
    bank        (h, b) float16          after the last of them

and in its metadata "num_vectors" and "factors", a JSON list of [layer, "A" or "B", sub-vectors in it], in order. A
checkpoint within an epoch has three more, of the running epoch: footprint (N, h), last (N, k) and running_changes (1,).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState

from vblora.bank import Layout, smallest_index_dtype
from vblora.container import is_count, parse_json
from vblora.io import describe_dtype, read_tensors, write_tensors
from vblora.trainer import KeptWithCheckpoints
from vblora_experiments.records import SELECTIONS_FILE


class Selecting(Protocol):
    """An adapter that selects vectors from a bank."""

    config: Any
    layout: Layout
    vector_bank: nn.Parameter

    def selection(self) -> tuple[Tensor, Tensor]: ...

    def step_selection(self) -> Tensor: ...


class Selections(NamedTuple):
    """A log as read back: `footprints` is (E, N, h) of booleans, the rest as in the file."""

    indices: np.ndarray
    weights: np.ndarray
    footprints: np.ndarray
    changes: np.ndarray
    epochs: np.ndarray
    bank: np.ndarray
    factors: list[tuple[str, str, int]]

    @property
    def num_vectors(self) -> int:
        return self.footprints.shape[2]


class SelectionLog(KeptWithCheckpoints):
    """Keeps the log of a run: a few thousand bits per step, on the adapter's device, written with each checkpoint."""

    def __init__(self, adapter: Selecting, directory: Path) -> None:
        self.adapter = adapter
        self.directory = directory
        self._tensors: dict[str, list[Tensor]] = {}
        self._footprint: Tensor | None = None  # (N, h), of the running epoch
        self._last: Tensor | None = None  # (N, k), sorted: the selection after the epoch's last step
        self._changes = torch.zeros(1, dtype=torch.long)

    def write(self, directory: Path) -> None:
        """Write what there is up to the last full epoch."""
        tensors = {name: torch.stack(parts) for name, parts in self._tensors.items() if parts}
        tensors["bank"] = self.adapter.vector_bank.detach().to(torch.float16)
        if self._last is not None:
            assert self._footprint is not None
            tensors |= {"footprint": self._footprint, "last": self._last, "running_changes": self._changes}
        factors = [[shape.name, factor] for shape in self.adapter.layout.shapes for factor in "AB"]
        rows = self.adapter.layout.sizes
        metadata = {
            "num_vectors": str(self.adapter.config.num_vectors),
            "factors": json.dumps([[*factor, count] for factor, count in zip(factors, rows, strict=True)]),
        }
        write_tensors(directory / SELECTIONS_FILE, tensors, metadata)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._tensors = {name: [] for name in ("indices", "weights", "footprints", "changes", "epochs")}
        earlier = self.directory / f"checkpoint-{state.global_step}" / SELECTIONS_FILE
        if state.global_step and earlier.exists():
            tensors, _ = read_tensors(earlier)
            self._tensors = {name: list(tensors[name]) if name in tensors else [] for name in self._tensors}
            self._begin_epoch()
            if "last" in tensors:
                device = self.adapter.vector_bank.device
                running = [tensors[name].to(device) for name in ("footprint", "last", "running_changes")]
                self._footprint, self._last, self._changes = running
            return
        self._snapshot(state.epoch or 0.0)
        self._begin_epoch()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        indices = self.adapter.step_selection().sort(dim=1).values  # (N, k)
        assert self._footprint is not None
        self._footprint.scatter_(1, indices, True)
        if self._last is not None:
            self._changes += (indices != self._last).any(dim=1).sum()
        self._last = indices

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        assert self._footprint is not None
        bits = np.packbits(self._footprint.cpu().numpy(), axis=1)
        self._tensors["footprints"].append(torch.from_numpy(bits))
        self._tensors["changes"].append(self._changes.cpu()[0].clone())
        self._snapshot(state.epoch or 0.0)
        self._begin_epoch()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write(self.directory)

    def _snapshot(self, epoch: float) -> None:
        indices, weights = self.adapter.selection()
        kept = smallest_index_dtype(self.adapter.config.num_vectors)
        self._tensors["indices"].append(indices.to("cpu", kept, copy=True))
        self._tensors["weights"].append(weights.to("cpu", torch.float16))
        self._tensors["epochs"].append(torch.tensor(epoch))

    def _begin_epoch(self) -> None:
        n, h = self.adapter.layout.rows, self.adapter.config.num_vectors
        device = self.adapter.vector_bank.device
        self._last = None
        self._footprint = torch.zeros(n, h, dtype=torch.bool, device=device)
        self._changes = torch.zeros(1, dtype=torch.long, device=device)


def read_log(path: Path) -> Selections:
    """Read a log.

    Raises:
        ValueError: the file is missing, damaged or no log of selections.
    """
    tensors, metadata = read_tensors(path)
    names = ("indices", "weights", "footprints", "changes", "epochs", "bank")
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{path}: no log of a whole epoch's selections: {', '.join(missing)} missing")
    try:
        num_vectors, factors = _read_metadata(metadata)
        _check_log(tensors, num_vectors, sum(rows for _, _, rows in factors))
    except ValueError as error:
        raise ValueError(f"{path}: no log of selections, or damaged: {error}") from error
    arrays = {name: tensors[name].numpy() for name in names}
    bits = np.unpackbits(arrays["footprints"], axis=2)[:, :, :num_vectors].astype(bool)
    return Selections(
        arrays["indices"].astype(np.int64),
        arrays["weights"].astype(np.float64),
        bits,
        arrays["changes"],
        arrays["epochs"],
        arrays["bank"].astype(np.float64),
        factors,
    )


def _read_metadata(metadata: Mapping[str, str]) -> tuple[int, list[tuple[str, str, int]]]:
    """The vectors of the bank, and each factor with its sub-vectors."""
    count, listed = metadata.get("num_vectors", ""), parse_json(metadata.get("factors", ""))
    if not re.fullmatch(r"[1-9]\d{0,8}", count, re.ASCII):
        raise ValueError(f"num_vectors {count!r:.80} in its metadata")
    if not isinstance(listed, list) or not all(_is_factor(entry) for entry in listed):
        raise ValueError(f"factors {listed!r:.80} in its metadata")
    return int(count), [(layer, factor, rows) for layer, factor, rows in listed]


def _is_factor(entry: Any) -> bool:
    good = isinstance(entry, list) and [type(part) for part in entry] == [str, str, int]
    return good and entry[1] in ("A", "B") and is_count(entry[2], 2**31)


def _check_log(tensors: Mapping[str, Tensor], h: int, n: int) -> None:
    """Hold a log's tensors to what stands above, for n sub-vectors."""
    indices, bank, epochs = tensors["indices"], tensors["bank"], tensors["epochs"].numel() - 1
    k, b = indices.shape[-1] if indices.dim() else 0, bank.shape[-1] if bank.dim() else 0
    shapes = {
        "indices": (epochs + 1, n, k),
        "weights": (epochs + 1, n, k),
        "footprints": (epochs, n, -(-h // 8)),
        "changes": (epochs,),
        "epochs": (epochs + 1,),
        "bank": (h, b),
    }
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != (name in ("weights", "epochs", "bank")):
            raise ValueError(f"{name} is {describe_dtype(tensor)} of shape {tuple(tensor.shape)} and not of {shape}")
        if tensor.dtype in (torch.bfloat16, torch.bool) or (name == "footprints" and tensor.dtype != torch.uint8):
            raise ValueError(f"{name} is {describe_dtype(tensor)}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers")
    if epochs < 1 or not n or not k or (indices.long() < 0).any() or (indices.long() >= h).any():
        raise ValueError(f"an index lies outside the bank of {h} vectors, or there is none")
