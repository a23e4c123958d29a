"""--push_to_hub: a finished run's adapter on the hub, with its card and the run's record, in one commit.

It is the adapter that counts: best/ where the run keeps one, else last/. The Trainer's own pushing, of every
checkpoint, is switched off (`vblora.trainer`). A command that is repeated pushes a run that is finished already.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from vblora.files import remote
from vblora.models import RECORD_FILE, TRAINING_FILE


def check(training: TrainingArguments) -> None:
    """Refuse at a run's start what could not be pushed at its end, or would leave the token in a file.

    Raises:
        ValueError: a flag that does nothing here, a wrong name, the hub does not know the token, or W&B would keep it.
    """
    token, trackers = training.hub_token, training.report_to or ()
    if token and "wandb" in trackers and any(token in part for part in sys.argv):
        raise ValueError(
            "W&B keeps the command line, with --hub_token: give the token in the environment (HF_TOKEN), or no "
            "--report_to wandb"
        )
    if not training.push_to_hub or training.process_index != 0:
        return
    for name in ("hub_strategy", "hub_always_push"):
        if getattr(training, name) != TrainingArguments.__dataclass_fields__[name].default:
            raise ValueError(f"--{name} does nothing: the adapter that counts is pushed once, at the end of the run")
    remote.check_name(repository(training))
    remote.check_token(training.hub_token)


def repository(training: TrainingArguments) -> str:
    """--hub_model_id, or as the output folder is called."""
    return training.hub_model_id or Path(str(training.output_dir)).absolute().name


def published(training: TrainingArguments, result: dict[str, Any]) -> dict[str, Any]:
    """The result of a run that has come to its end, after pushing it if that is wanted; none in other processes.

    Raises:
        ValueError: the hub does not take it. The run stays finished.
    """
    if not training.push_to_hub or not result:
        return result
    out = Path(str(training.output_dir))
    folder = next((out / name for name in ("best", "last") if (out / name).is_dir()), None)
    if folder is None:
        raise ValueError(f"{out} holds no adapter: --push_to_hub has nothing to push")
    files = [out / name for name in (RECORD_FILE, TRAINING_FILE) if (out / name).exists()][:1]
    try:
        address = remote.upload(
            folder,
            repository(training),
            more={path.name: path for path in files},
            revision=training.hub_revision,
            private=training.hub_private_repo,
            token=training.hub_token,
        )
    except ValueError as error:
        raise ValueError(f"{out} is finished and not on the hub; the same command tries again. {error}") from error
    print(f"{folder} is on the hub: {address}")
    return result
