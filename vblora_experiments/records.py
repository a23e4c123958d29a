"""The record of a run: all that is needed to read its result, or to do it again."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vblora.io import read_json
from vblora.models import RECORD_FILE

PACKAGES = ("vblora", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
SELECTIONS_FILE = "selections.safetensors"
# What tables read of every record, and of those of one experiment. What may be None older records do not have.
NUMBER = (int, float)
RECORD: dict[str, Any] = {
    "method": str,
    "model": (str, type(None)),
    "seed": int,
    "settings": dict,
    "scores": dict,
    "overrides": (dict, type(None)),
    "stored_parameters": {"parameters": int, "bytes": int},
    "train_seconds": (int, float, type(None)),
}
EPOCH = {"epoch": NUMBER}
OF_EXPERIMENT: dict[str, dict[str, Any]] = {
    "glue": {"task": str, "data": (dict, type(None)), "scores": {"metric": str, "last": EPOCH, "best": EPOCH}},
    "e2e": {"quick_scores": list},
    "instruct": {"held_out_losses": list},
    "asr": {"language": str, "test": {"cut": int, "clips": int, "rates": dict}},
}


def environment() -> dict[str, Any]:
    """Versions, machine and commit."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "device": device_name(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name() -> str:
    """The accelerator's name, or the processor and the threads PyTorch uses of it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of this code, with "+" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    revision = git("rev-parse", "--short=12", "HEAD")
    return revision if revision is None or not git("status", "--porcelain", "--untracked-files=no") else revision + "+"


def peak_memory_mib() -> int:
    """The most memory held: the accelerator's where there is one, else the whole process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def read_files(paths: Sequence[Path], experiment: str) -> list[tuple[Path, dict[str, Any]]]:
    """The records of one kind of experiment in these files and folders, each with its file.

    Raises:
        ValueError: a file or folder does not exist, or a record lacks what tables are made of.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    files = [f for path in paths for f in (_record_files(path) if path.is_dir() else [path])]
    found = [(file, record) for file in files if (record := read_json(file)).get("experiment") == experiment]
    for file, record in found:
        require_whole(file, record, RECORD | OF_EXPERIMENT.get(experiment, {}))
    return found


def require_whole(file: Path, record: Any, shape: Mapping[str, Any]) -> None:
    """Refuse a record that lacks what a table is made of.

    Raises:
        ValueError: naming the file and what is wrong in it.
    """
    if fault := fault_of(record, dict(shape)):
        raise ValueError(f"{file}: no record of a run, or a damaged one: {fault}")


def fault_of(value: Any, shape: Any, name: str = "") -> str | None:
    """What a value from JSON lacks of a shape: of a dictionary its keys, of anything else its types."""
    if not isinstance(shape, dict):
        good = isinstance(value, shape) and not isinstance(value, bool)
        return None if good else f"{name} is {value!r:.80}"
    if not isinstance(value, dict):
        return f"{name} is {value!r:.80}"
    faults = (fault_of(value.get(key), part, f"{name}.{key}".lstrip(".")) for key, part in shape.items())
    return next((fault for fault in faults if fault), None)


def _record_files(folder: Path) -> list[Path]:
    """The JSON files of a folder of results, and the records of the runs below it."""
    return sorted({*folder.glob("*.json"), *folder.rglob(RECORD_FILE)})


def scores(log_history: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Scores per epoch, at the last epoch and at the best one, from the trainer's log."""
    epochs = [
        {"epoch": entry["epoch"], **{k.removeprefix("eval_"): v for k, v in entry.items() if _is_score(k)}}
        for entry in log_history
        if f"eval_{metric}" in entry
    ]
    if not epochs:
        raise ValueError("the run was never evaluated: leave --eval_strategy at epoch")
    return {"metric": metric, "last": epochs[-1], "best": max(epochs, key=lambda e: e[metric]), "epochs": epochs}


def _is_score(key: str) -> bool:
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
    return key.startswith("eval_") and key not in timings
