"""The numbers of the E2E experiments: one row for every model and method of the paper's Table 2.

    python NLG/e2e_rows.py gpt2_medium/vblora

prints one row as the flags of run_e2e.py, one per line.

VB-LoRA's rows are Table 8 of the paper; the other methods' come from those methods' papers, as
docs/paper_versus_code.md says in full. "smollm2_135m" is a small model for machines without a GPU; no paper has it.
"""

from __future__ import annotations

from typing import Any

from vblora_experiments.rows import VBLORA, Model, Rows

# Table 8, but for the settings of VB-LoRA itself. They are also what train.py does unless told otherwise.
COMMON: dict[str, Any] = {
    "dataset": "e2e",
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
    "recipe": {"method": "vblora", "targets": "all", "recipe": True},  # no paper's: docs/recipe.md
    "vblora": {**VBLORA, "targets": "all", "num_vectors": 256, "init_logits_std": 0.01},
}
METHODS_OF_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("gpt2_large", "vblora"): {"num_vectors": 350},
    ("gpt2_large", "vera"): {"learning_rate": 2e-2},
    ("smollm2_135m", "vblora"): {"vector_length": 192},  # 576, 192 and 1,536 wide
    ("smollm2_135m", "recipe"): {"recipe_bytes": 247_488},  # as many as the row above stores
    ("smollm2_135m", "full"): {"per_device_train_batch_size": 8},
}


ROWS = Rows(COMMON, MODELS, METHODS, METHODS_OF_MODELS)
row = ROWS.row


if __name__ == "__main__":
    raise SystemExit(ROWS.main("e2e_rows.py"))
