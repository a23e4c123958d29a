"""The experiments' numbers: one row for every model, task and method of the paper's Table 1.

    python NLU/hyperparameters.py roberta_base/cola/vblora_qv

prints one row as the flags of run_glue.py, one per line.

VB-LoRA's rows are Table 7 of the paper; where the authors' published scripts differ, the paper's value is used and the
script's is noted. The other methods' rows come from those methods' papers and scripts, as docs/paper_versus_code.md
says in full. "minilm" is a small encoder for machines without a GPU; no paper has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from encoders import MINILM
from vblora_experiments.rows import VBLORA, parts_of, print_row


@dataclass(frozen=True)
class Model:
    name_or_path: str
    max_length: int
    flags: Mapping[str, Any]  # in which this model's rows, but for full fine-tuning's head, differ from COMMON
    of_tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # and those of one task


MODELS: dict[str, Model] = {
    "roberta_base": Model("roberta-base", 512, {}),
    "roberta_large": Model("roberta-large", 128, {}),
    # The pooler is trained with the classifier: RoBERTa's classification head has such a dense layer of its own.
    # Of SST-2's 67,349 phrases it sees a part, drawn by the run's seed.
    "minilm": Model(MINILM, 128, {"head": "pooler,classifier"}, {"sst2": {"max_train_samples": 4000}}),
}

# For encoders with the module names of BERT and RoBERTa.
TARGETS: dict[str, list[str]] = {
    "qv": ["query", "value"],
    "all": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
}
# LoRA-XS's own choice: what writes to the residual stream, and what it is looked up by.
LORA_XS_TARGETS = r".*(query|value|attention\.output\.dense|\d\.output\.dense)"

# The same in every row. With VB-LoRA, weight decay is for the head's weights alone; bank and logits have none.
COMMON: dict[str, Any] = {
    "weight_decay": 0.1,
    "warmup_steps": 0.06,  # below 1: a share of all steps
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "linear",
}

# The standard deviation of the logits is 0.01 in the authors' GLUE code and 0.1 in PEFT's default.
GLUE_VBLORA: dict[str, Any] = {**VBLORA, "num_vectors": 90, "init_logits_std": 0.01}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    # LoRA's paper prints alpha 8 for base; every one of its scripts has 16, for both sizes.
    "lora_qv": {"method": "lora", "targets": "qv", "rank": 8, "lora_alpha": 16},
    "vera_qv": {"method": "vera", "targets": "qv", "rank": 1024},
    "vera_all": {"method": "vera", "targets": "all", "rank": 1024},
    "tied_lora_qv": {"method": "tied_lora", "targets": "qv", "rank": 8},
    "tied_lora_all": {"method": "tied_lora", "targets": "all", "rank": 2},
    "lora_xs": {"method": "lora_xs", "targets": LORA_XS_TARGETS, "rank": 25, "lora_alpha": 16},
    "vblora_qv": {**GLUE_VBLORA, "targets": "qv"},
    "vblora_all": {**GLUE_VBLORA, "targets": "all"},
}
# Where a method's own setting depends on the model.
METHODS_OF_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("roberta_large", "vera_qv"): {"rank": 256},
    ("roberta_large", "vera_all"): {"rank": 256},
    ("roberta_large", "tied_lora_qv"): {"rank": 4},
    ("roberta_large", "tied_lora_all"): {"rank": 1},
    # 384 wide: sub-vectors of 128, and VeRA's smaller rank.
    ("minilm", "vblora_qv"): {"vector_length": 128},
    ("minilm", "vblora_all"): {"vector_length": 128},
    ("minilm", "vera_qv"): {"rank": 256},
    ("minilm", "vera_all"): {"rank": 256},
}

TASKS = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb", "mnli")


@dataclass(frozen=True)
class Columns:
    """What differs from task to task: one value for each of TASKS, or one for all. MNLI is for `--mnli_start`."""

    num_train_epochs: Sequence[float] | float
    learning_rate: Sequence[float] | float  # of the head, and of all where no other is given
    learning_rate_adapter: Sequence[float] | float | None = None
    learning_rate_vector_bank: float | None = None
    learning_rate_logits: float | None = None
    per_device_train_batch_size: Sequence[int] | int | None = None

    def of(self, task: str) -> dict[str, Any]:
        values = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None:
                values[name] = value[TASKS.index(task)] if isinstance(value, Sequence) else value
        return values


# Each tuple: SST-2, MRPC, CoLA, QNLI, RTE, STS-B, MNLI.
SETTINGS: dict[tuple[str, str], Columns] = {
    ("roberta_base", "vblora"): Columns(
        num_train_epochs=(60, 30, 80, 25, 160, 80, 25),  # the authors' script has 60 epochs for MRPC
        learning_rate=(4e-3, 4e-3, 2e-2, 1e-2, 2e-2, 2e-2, 1e-2),  # MNLI: as QNLI, the paper has none
    ),
    ("roberta_large", "vblora"): Columns(
        num_train_epochs=(20, 40, 40, 20, 40, 40, 20),
        learning_rate=(3e-3, 3e-3, 3e-3, 2e-3, 2e-3, 6e-3, 2e-3),  # the authors' script has 6e-3 for MRPC
    ),
    # LoRA: its paper's Table 9 (for large the runs without an MNLI start, which Table 1 quotes). The batches are those
    # of its scripts over all their GPUs; the paper's figures are the scripts' batches per GPU.
    ("roberta_base", "lora"): Columns(
        num_train_epochs=(60, 30, 80, 25, 80, 40, 30),
        learning_rate=(5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 4e-4, 5e-4),
        per_device_train_batch_size=(128, 128, 64, 256, 256, 128, 128),
    ),
    ("roberta_large", "lora"): Columns(
        num_train_epochs=(10, 20, 20, 10, 20, 10, 10),
        learning_rate=(4e-4, 3e-4, 2e-4, 2e-4, 4e-4, 2e-4, 3e-4),  # the script has 3e-4 for CoLA, which collapses
        per_device_train_batch_size=32,
    ),
    # VeRA: its paper's Table 8; MNLI, which it has not, as QNLI.
    ("roberta_base", "vera"): Columns(
        num_train_epochs=(60, 30, 80, 25, 160, 80, 25),
        learning_rate=(4e-3, 4e-3, 1e-2, 4e-3, 1e-2, 1e-2, 4e-3),
        learning_rate_adapter=(4e-3, 1e-2, 1e-2, 1e-2, 4e-3, 1e-2, 1e-2),
        per_device_train_batch_size=64,
    ),
    ("roberta_large", "vera"): Columns(
        num_train_epochs=(10, 40, 40, 20, 40, 20, 20),
        learning_rate=(6e-3, 3e-3, 6e-3, 2e-4, 2e-3, 2e-3, 2e-4),
        learning_rate_adapter=(1e-2, 3e-2, 1e-2, 1e-2, 2e-2, 2e-2, 1e-2),
        per_device_train_batch_size=128,
    ),
    # Tied-LoRA: nothing is published for GLUE. VB-LoRA's epochs and rates of the head; the factors' rate is ours.
    ("roberta_base", "tied_lora"): Columns(
        num_train_epochs=(60, 30, 80, 25, 160, 80, 25),
        learning_rate=(4e-3, 4e-3, 2e-2, 1e-2, 2e-2, 2e-2, 1e-2),
        learning_rate_adapter=1e-3,
    ),
    ("roberta_large", "tied_lora"): Columns(
        num_train_epochs=(20, 40, 40, 20, 40, 40, 20),
        learning_rate=(3e-3, 3e-3, 3e-3, 2e-3, 2e-3, 6e-3, 2e-3),
        learning_rate_adapter=1e-3,
    ),
    # LoRA-XS: the one point that both of its scripts' grids have. They are for large; base has nothing published.
    ("roberta_base", "lora_xs"): Columns((10, 50, 10, 10, 50, 50, 10), 1e-3, 1e-3),
    ("roberta_large", "lora_xs"): Columns((10, 50, 10, 10, 50, 50, 10), 1e-3, 1e-3),
    # Full fine-tuning: fairseq's values for large; for base the middle of RoBERTa's published grid.
    ("roberta_base", "full"): Columns(10, 2e-5, per_device_train_batch_size=(32, 16, 16, 32, 16, 16, 32)),
    ("roberta_large", "full"): Columns(
        10, (1e-5, 1e-5, 1e-5, 1e-5, 2e-5, 2e-5, 1e-5), per_device_train_batch_size=(32, 16, 16, 32, 16, 16, 32)
    ),
    # The small encoder: round numbers that train; `reproduce.sh learning_rates` searches VB-LoRA's.
    ("minilm", "vblora"): Columns(3, 1e-3, learning_rate_vector_bank=4e-3),
    ("minilm", "lora"): Columns(3, 1e-3, 1e-3),
    ("minilm", "vera"): Columns(3, 1e-3, 1e-2),
    ("minilm", "tied_lora"): Columns(3, 1e-3, 2e-3),
    ("minilm", "lora_xs"): Columns(3, 1e-3, 4e-3),
    ("minilm", "full"): Columns(3, 1e-4),
}


NAMES = {"model": list(MODELS), "task": list(TASKS), "method": list(METHODS)}


def row(name: str) -> dict[str, Any]:
    """The flags of run_glue.py for one row, MODEL/TASK/METHOD, by name."""
    model, task, method = parts_of(name, NAMES)
    flags = {flag: v for flag, v in MODELS[model].flags.items() if method != "full" or flag != "head"}
    columns = SETTINGS[model, method.removesuffix("_qv").removesuffix("_all")]
    return {
        "model_name_or_path": MODELS[model].name_or_path,
        "task": task,
        "max_length": MODELS[model].max_length,
        **COMMON,
        **flags,
        **MODELS[model].of_tasks.get(task, {}),
        **METHODS[method],
        **METHODS_OF_MODELS.get((model, method), {}),
        **columns.of(task),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return print_row("hyperparameters.py", row, NAMES, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
