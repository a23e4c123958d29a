"""What the trainings of the task folders share: going on, saving, and the result that they write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

from vblora.adapter import Adapter
from vblora.io import read_json, write_json
from vblora.models import TRAINING_FILE
from vblora.trainer import AdapterTrainer
from vblora_experiments import publishing, records, runs
from vblora_experiments.command_line import Settings, StartArguments


def once(out: Path, plan: dict[str, Any], training: TrainingArguments, fit: Callable[[], None]) -> dict[str, Any]:
    """What training.json in a run's folder holds, after `fit` where it is not there yet; nothing in other processes.

    Raises:
        ValueError: the folder holds another run, or is another one to each of several processes.
    """
    publishing.check(training)
    require_shared(out)
    if runs.begin(out, plan) is None and not (out / TRAINING_FILE).exists():
        fit()
    return read_json(out / TRAINING_FILE) if training.process_index == 0 else {}


def require_shared(out: Path) -> None:
    """Refuse a run's folder that several processes do not see alike, as on machines that share no file system: some
    would go on from a checkpoint and others begin.

    Raises:
        ValueError: naming what the first two of them see.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    own = TRAINING_FILE if (out / TRAINING_FILE).exists() else Path(runs.last_checkpoint(out) or "no checkpoint").name
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, own)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"{out} holds {found[0]} on rank 0 and {other} on rank {rank}: --output_dir must be a folder that all "
                "machines share"
            )


def train(trainer: AdapterTrainer, out: Path) -> bool:
    """Train, from the last checkpoint if there is one, and save last/; whether this process writes."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint or runs.last_checkpoint(out))
    if not trainer.is_world_process_zero():
        return False
    trainer.adapter.save(str(out / "last"))
    return True


def write(out: Path, plan: dict[str, Any], trainer: AdapterTrainer, more: Mapping[str, Any]) -> None:
    """Write training.json: what is known of any training, and what `more` says of this one."""
    write_json(
        out / TRAINING_FILE,
        {
            "settings": plan,
            "epochs": trainer.state.epoch or 0,
            "steps": trainer.state.global_step,
            **of_adapter(trainer),
            "train_seconds": round(trainer.train_seconds, 3),
            "peak_memory_mib": records.peak_memory_mib(),
            **records.environment(),
            **more,
        },
    )


def of_adapter(trainer: AdapterTrainer) -> dict[str, Any]:
    """What a result says of the adapter: its settings, the recipe they come from, and what is stored."""
    adapter = trainer.adapter
    return {
        "adapter_settings": adapter.config.to_dict() if isinstance(adapter, Adapter) else None,
        **({"recipe": trainer.recipe.to_dict()} if trainer.recipe is not None else {}),
        "stored_parameters": adapter.stored_parameters()._asdict(),
    }


def record_of(
    settings: Settings, part: str, wanted: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The record of a run: the one in its folder, or the one that `make` gives, with the row and what overrides it.

    Raises:
        ValueError: this part of the one in the folder (how it was decoded or tested) is not as wanted.
    """
    record = runs.finished(settings.output_dir, part, wanted)
    if record is None:
        record = make() | {"row": settings.of(StartArguments).row, "overrides": settings.overrides}
    return record


def heading(experiment: str, trained: Mapping[str, Any]) -> dict[str, Any]:
    """What the record of a run begins with: what it is of, and all of training.json."""
    settings = trained["settings"]
    names = {"model": settings["model_name_or_path"], "method": settings["method"], "seed": settings["seed"]}
    return {"experiment": experiment, **names, **trained}


def bytes_on_disk(out: Path) -> int:
    """The bytes of the tensors in last/."""
    return sum(path.stat().st_size for path in (out / "last").glob("*.safetensors"))
