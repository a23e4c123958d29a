"""Table 7 of the paper: the hyper-parameters of VB-LoRA on GLUE.

    python NLU/hyperparameters.py roberta_base cola qv

prints one row as the flags of run_glue.py, one per line.

Where the authors' published scripts differ from the paper, the paper's value is used and the script's is
noted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """What differs from task to task."""

    epochs: int
    head_learning_rate: float


@dataclass(frozen=True)
class Model:
    name_or_path: str
    max_length: int
    tasks: dict[str, Setting]


MODELS: dict[str, Model] = {
    "roberta_base": Model(
        "roberta-base",
        512,
        {
            "sst2": Setting(60, 4e-3),
            "mrpc": Setting(30, 4e-3),  # the authors' script: 60 epochs
            "cola": Setting(80, 2e-2),
            "qnli": Setting(25, 1e-2),
            "rte": Setting(160, 2e-2),
            "stsb": Setting(80, 2e-2),
        },
    ),
    "roberta_large": Model(
        "roberta-large",
        128,
        {
            "sst2": Setting(20, 3e-3),
            "mrpc": Setting(40, 3e-3),  # the authors' script: head learning rate 6e-3
            "cola": Setting(40, 3e-3),
            "qnli": Setting(20, 2e-3),
            "rte": Setting(40, 2e-3),
            "stsb": Setting(40, 6e-3),
        },
    ),
}

# The same in every row. The weight decay is for the head's weights alone; bank and logits have none. The
# standard deviation of the logits is 0.01 in the authors' GLUE code and 0.1 in PEFT's default.
COMMON: dict[str, Any] = {
    "rank": 4,
    "topk": 2,
    "num_vectors": 90,
    "vector_length": 256,
    "init_logits_std": 0.01,
    "init_vector_bank_bound": 0.02,  # the bank starts uniform between plus and minus this
    "learning_rate_vector_bank": 1e-3,
    "learning_rate_logits": 1e-2,
    "weight_decay": 0.1,
    "warmup_steps": 0.06,  # below 1: a share of all steps
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "linear",
}

# For encoders with the module names of BERT and RoBERTa.
TARGETS: dict[str, list[str]] = {
    "qv": ["query", "value"],
    "all": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}


def _known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def row(model: str, task: str, targets: str) -> dict[str, Any]:
    """The flags of run_glue.py for one cell of the paper's Table 1, by name."""
    _known("model", model, list(MODELS))
    _known("task", task, list(MODELS[model].tasks))
    _known("targets", targets, list(TARGETS))
    setting = MODELS[model].tasks[task]
    return {
        "model_name_or_path": MODELS[model].name_or_path,
        "task": task,
        "targets": targets,
        "num_train_epochs": setting.epochs,
        "learning_rate": setting.head_learning_rate,
        "max_length": MODELS[model].max_length,
        **COMMON,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = "usage: hyperparameters.py MODEL TASK TARGETS"
    if list(arguments) in (["-h"], ["--help"]):
        print(
            f"{usage}\nmodels: {', '.join(MODELS)}\ntasks: {', '.join(MODELS['roberta_base'].tasks)}\n"
            f"targets: {', '.join(TARGETS)}"
        )
        return 0
    try:
        if len(arguments) != 3:
            raise ValueError(
                f"{usage}; models: {', '.join(MODELS)}; "
                f"tasks: {', '.join(MODELS['roberta_base'].tasks)}; targets: {', '.join(TARGETS)}"
            )
        flags = row(*arguments)
    except ValueError as error:
        print(f"hyperparameters.py: {error}", file=sys.stderr)
        return 2
    for name, value in flags.items():
        print(f"--{name} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
