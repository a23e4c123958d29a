"""The record of a run: all that is needed to read its result, or to do it again."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vblora.io import read_json, write_json
from vblora.models import PLAN_FILE, RECORD_FILE

LOCK_FILE = ".lock"
PACKAGES = ("vblora", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
# What may differ when a run goes on where it stopped: where things are (what is there has fingerprints in the plan),
# and how they are shown.
FREE_TO_CHANGE = {
    "output_dir",
    "logging_dir",
    "disable_tqdm",
    "report_to",
    "resume_from_checkpoint",
    "data_dir",
    "use_cpu",
    "dataloader_pin_memory",
}

# What beside them makes no other experiment of a run: the record has it in its own place.
NEUTRAL = FREE_TO_CHANGE | {
    *("row", "seed", "model_name_or_path", "start_from", "bank_from", "data", "bench_dir", "gsm8k", "math", "judge"),
    *("decode_batch_size", "solve_batch_size", "judge_workers", "device_map"),
}
SELECTIONS_FILE = "selections.safetensors"


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


def begin(directory: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Start, or go on with, the run of this plan in a directory.

    Returns:
        The record, where the run has been finished already; else None.

    Raises:
        ValueError: the directory holds a run of another plan, or another process trains into it now.
    """
    _lock(directory)
    if (directory / PLAN_FILE).exists():
        changed = differences(read_json(directory / PLAN_FILE), plan)
        if changed and _has_results(directory):
            raise ValueError(
                f"{directory} holds a run with other settings ({changed}): remove it, or give another place "
                "(--output_dir; for reproduce.sh --runs)"
            )
        if (directory / RECORD_FILE).exists():
            return read_json(directory / RECORD_FILE)
    write_json(directory / PLAN_FILE, plan)
    return None


def _has_results(directory: Path) -> bool:
    """Whether a run has come to more than its plan: one stopped by a wrong setting must not block the right one."""
    kept = any((directory / name).exists() for name in (RECORD_FILE, "best", "last"))
    return kept or last_checkpoint(directory) is not None


_locks: dict[Path, Any] = {}  # the open lock files of this process


def _lock(directory: Path) -> None:
    """Keep other processes out of a run's folder until this one ends. (Of a distributed run, the first one does.)"""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    if directory.resolve() in _locks or os.environ.get("RANK", "0") != "0":
        return
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / LOCK_FILE).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(f"another process trains into {directory}: wait for it, or end it") from error
    _locks[directory.resolve()] = file


def read_files(paths: Sequence[Path], experiment: str) -> list[tuple[Path, dict[str, Any]]]:
    """The records of one kind of experiment in these files and folders, each with its file.

    Raises:
        ValueError: a file or folder does not exist.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    files = [f for path in paths for f in (_record_files(path) if path.is_dir() else [path])]
    return [(file, record) for file in files if (record := read_json(file)).get("experiment") == experiment]


def _record_files(folder: Path) -> list[Path]:
    """The JSON files of a folder of results, and the records of the runs below it."""
    return sorted({*folder.glob("*.json"), *folder.rglob(RECORD_FILE)})


def finished(directory: Path, part: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run that has come to its end, where there is one.

    Raises:
        ValueError: this part of it (how it was decoded or tested) is not as wanted.
    """
    if not (directory / RECORD_FILE).exists():
        return None
    record = read_json(directory / RECORD_FILE)
    if changed := differences(record[part], wanted):
        raise ValueError(f"{directory} holds a run with another {part} ({changed}): give another --output_dir")
    return record


def finish(directory: Path, record: dict[str, Any]) -> None:
    """Write the record of a run that has come to its end."""
    write_json(directory / RECORD_FILE, record)


def last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint of an interrupted run."""
    found = {int(p.name.removeprefix("checkpoint-")): p for p in directory.glob("checkpoint-*") if _is_whole(p)}
    return str(found[max(found)]) if found else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the checkpoint was written to its end: the trainer's state is the last file that Trainer writes."""
    if not checkpoint.name.removeprefix("checkpoint-").isdecimal():
        return False
    try:
        read_json(checkpoint / "trainer_state.json")
    except ValueError:
        return False
    return True


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


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In which settings two runs differ, in words; "" for none."""
    keys = sorted((before.keys() | now.keys()) - FREE_TO_CHANGE)
    return ", ".join(f"{k}: {before.get(k)} before, {now.get(k)} now" for k in keys if before.get(k) != now.get(k))
