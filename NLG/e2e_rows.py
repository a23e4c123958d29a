"""The numbers of the E2E experiments: one row for every model and method of the paper's Table 2.

    python NLG/e2e_rows.py gpt2_medium/vblora

prints one row as the flags of run_e2e.py, one per line.

VB-LoRA's rows are Table 8 of the paper; the other methods' come from those methods' papers, as
docs/paper_versus_code.md says in full. "smollm2_135m" is a small model for machines without a GPU; no paper has it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vblora.training.campaign import check_names


@dataclass(frozen=True)
class Model:
    name_or_path: str
    flags: Mapping[str, Any] = field(default_factory=dict)  # in which this model's rows differ from COMMON


# Table 8, but for the settings of VB-LoRA itself. They are also what train.py does unless told otherwise.
COMMON: dict[str, Any] = {
    "num_train_epochs": 5,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_steps": 500,
    "weight_decay": 0.01,
    "label_smoothing_factor": 0.1,
}
MODELS: dict[str, Model] = {
    "gpt2_medium": Model("gpt2-medium"),
    "gpt2_large": Model("gpt2-large"),
    # Of the 42,061 rows it sees a part once, drawn by the run's seed.
    "smollm2_135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {
            "dtype": "float32",
            "num_train_epochs": 1,
            "warmup_steps": 50,
            "max_train_samples": 4000,
            "max_eval_samples": 200,
            "quick_samples": 32,
        },
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    # From Li and Liang (2021), whose figures Table 2 prints by way of LoRA's paper.
    "full": {"method": "full", "learning_rate": 5e-5, "per_device_train_batch_size": 10},
    "lora": {
        "method": "lora",
        "targets": "qv",
        "rank": 4,
        "lora_alpha": 32,
        "adapter_dropout": 0.1,
        "learning_rate": 2e-4,
    },
    "vera": {"method": "vera", "targets": "qv", "rank": 1024, "learning_rate": 1e-1},
    "vblora": {
        "method": "vblora",
        "targets": "all",
        "rank": 4,
        "topk": 2,
        "num_vectors": 256,
        "vector_length": 256,
        "init_logits_std": 0.01,
        "init_vector_bank_bound": 0.02,
        "learning_rate_vector_bank": 1e-3,
        "learning_rate_logits": 1e-2,
    },
}
# Where a method's own setting depends on the model.
METHODS_OF_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("gpt2_large", "vblora"): {"num_vectors": 350},
    ("gpt2_large", "vera"): {"learning_rate": 2e-2},
    ("smollm2_135m", "vblora"): {"vector_length": 192},  # 576, 192 and 1,536 wide
    ("smollm2_135m", "full"): {"per_device_train_batch_size": 8},
}


def row(name: str) -> dict[str, Any]:
    """The flags of run_e2e.py for one row, MODEL/METHOD, by name.

    Raises:
        ValueError: there is no such row.
    """
    if name.count("/") != 1:
        raise ValueError(f"a row is MODEL/METHOD, for example gpt2_medium/vblora, not {name!r}")
    model, method = name.split("/")
    check_names("model", [model], list(MODELS))
    check_names("method", [method], list(METHODS))
    return {
        "model_name_or_path": MODELS[model].name_or_path,
        "dataset": "e2e",
        **COMMON,
        **MODELS[model].flags,
        **METHODS[method],
        **METHODS_OF_MODELS.get((model, method), {}),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = "usage: e2e_rows.py MODEL/METHOD"
    names = f"models: {', '.join(MODELS)}; methods: {', '.join(METHODS)}"
    if list(arguments) in (["-h"], ["--help"]):
        print(usage + "\n" + names.replace("; ", "\n"))
        return 0
    try:
        if len(arguments) != 1:
            raise ValueError(f"{usage}; {names}")
        flags = row(arguments[0])
    except ValueError as error:
        print(f"e2e_rows.py: error: {error}", file=sys.stderr)
        return 2
    for name, value in flags.items():
        print(f"--{name} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
