"""The numbers of the instruction-tuning experiments: one row for every model and method of the paper's Table 3.

    python instruction_tuning/instruct_rows.py llama2_7b/vblora

prints one row as the flags of finetune.py, one per line.

They are Table 9 of the paper; what it does not say is from the authors' scripts, and where the two differ the paper's
value is used (docs/paper_versus_code.md). VeRA's rows are from its paper. "smollm2_135m" is a small model for machines
without a GPU; no paper has it.
"""

from __future__ import annotations

from typing import Any

from vblora_experiments.rows import VBLORA, Model, Rows

COMMON: dict[str, Any] = {
    "data": "yahma/alpaca-cleaned",
    "data_format": "alpaca",
    "bits": 4,
    "dtype": "bfloat16",
    "bf16": True,
    "targets": "all",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,  # below 1: a share of all steps
    # From the authors' scripts, which are QLoRA's: the paper does not say.
    "adapter_dropout": 0.05,
    "max_grad_norm": 0.3,
    "gradient_checkpointing": True,
    "target_max_length": 512,
    "held_out": 1024,
    # The scripts have 16, which cuts every prompt before its instruction begins: docs/paper_versus_code.md.
    "source_max_length": 512,
}
MODELS: dict[str, Model] = {
    "llama2_7b": Model("meta-llama/Llama-2-7b-hf"),
    "llama2_13b": Model("meta-llama/Llama-2-13b-hf"),
    "smollm2_135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {
            "bits": 16,
            "dtype": "float32",
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "source_max_length": 128,
            "target_max_length": 128,
            "max_train_samples": 1600,
            "held_out": 100,
        },
    ),
}
PAGED = {"optim": "paged_adamw_32bit"}  # VB-LoRA's own optimiser knows its logits, and its bank is two megabytes
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 64, "lora_alpha": 16, "learning_rate": 4e-4, **PAGED},
    "vera": {"method": "vera", "rank": 1024, "learning_rate": 4e-3, **PAGED},
    "lora_xs": {"method": "lora_xs", "rank": 64, "lora_alpha": 64, "learning_rate": 4e-3, **PAGED},
    "recipe": {"method": "vblora", "recipe": True},  # no paper's: docs/recipe.md
    # The standard deviation is PEFT's default, which the authors' scripts leave as it is.
    "vblora": {**VBLORA, "num_vectors": 2048, "init_logits_std": 0.1},
}
METHODS_OF_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama2_13b", "vblora"): {"rank": 6},
    ("llama2_7b", "lora"): {"lora_alpha": 32},  # of the authors' scripts, each
    ("llama2_13b", "lora"): {"lora_alpha": 16},
    ("smollm2_135m", "vblora"): {"num_vectors": 256, "vector_length": 192},  # 576, 192 and 1,536 wide
    ("smollm2_135m", "recipe"): {"recipe_bytes": 247_488},  # as many as the row above stores
    ("smollm2_135m", "lora"): {"rank": 8, "optim": "adamw_torch"},
    ("smollm2_135m", "vera"): {"rank": 256, "optim": "adamw_torch"},
    ("smollm2_135m", "lora_xs"): {"rank": 32, "lora_alpha": 32, "optim": "adamw_torch"},
}
ROWS = Rows(COMMON, MODELS, METHODS, METHODS_OF_MODELS)
row = ROWS.row


if __name__ == "__main__":
    raise SystemExit(ROWS.main("instruct_rows.py"))
