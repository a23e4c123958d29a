"""The numbers of the mathematics experiments: one row for every model and method of the paper's Table 4.

    python math_instruction_tuning/math_rows.py mistral_7b/vblora

prints one row as the flags of finetune_math.py, one per line.

VB-LoRA's rows are section 4.4 of the paper; what it does not say is from the authors' script. LoRA and full fine-tuning
are by the recipe of PiSSA, whose figures Table 4 quotes by way of LoRA-XS's paper. "smollm2_135m" is a small model for
machines without a GPU; no paper has it.
"""

from __future__ import annotations

from typing import Any

from vblora_experiments.rows import VBLORA, Model, Rows

COMMON: dict[str, Any] = {
    "data": "meta-math/MetaMathQA",
    "data_format": "metamath",
    "split": "train[:100000]",
    "max_length": 512,
    "dtype": "bfloat16",
    "bf16": True,
    "targets": "all",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 32,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.02,  # below 1: a share of all steps
    "gradient_checkpointing": True,
}
MODELS: dict[str, Model] = {
    "mistral_7b": Model("mistralai/Mistral-7B-v0.1"),
    "gemma_7b": Model("google/gemma-7b"),
    # GSM8K's own answers: short, and those of its test problems are comparable.
    "smollm2_135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {
            "data": "openai/gsm8k",
            "data_format": "gsm8k",
            "split": "train",
            "max_length": 320,
            "dtype": "float32",
            "bf16": False,
            "num_train_epochs": 1,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "max_train_samples": 1600,
            "held_out": 100,
        },
    ),
}
PISSA = {"num_train_epochs": 1, "learning_rate": 2e-5, "warmup_steps": 0.03}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "dtype": "float32", **PISSA},  # bfloat16 has no room for steps so small
    "lora": {"method": "lora", "rank": 64, "lora_alpha": 64, **PISSA},
    "vera": {"method": "vera", "rank": 1024, "learning_rate": 4e-3},
    "lora_xs": {"method": "lora_xs", "rank": 64, "lora_alpha": 64, "learning_rate": 4e-3},
    "recipe": {"method": "vblora", "recipe": True},  # no paper's: docs/recipe.md
    # The standard deviation is PEFT's default, which the authors' scripts leave as it is.
    "vblora": {**VBLORA, "num_vectors": 2048, "init_logits_std": 0.1},
}
METHODS_OF_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("smollm2_135m", "vblora"): {"num_vectors": 256, "vector_length": 192},  # 576, 192 and 1,536 wide
    ("smollm2_135m", "recipe"): {"recipe_bytes": 247_488},  # as many as the row above stores
    ("smollm2_135m", "lora"): {"rank": 8, "lora_alpha": 16, "learning_rate": 4e-4},
    ("smollm2_135m", "vera"): {"rank": 256},
    ("smollm2_135m", "lora_xs"): {"rank": 32, "lora_alpha": 32},
}
ROWS = Rows(COMMON, MODELS, METHODS, METHODS_OF_MODELS)
row = ROWS.row


if __name__ == "__main__":
    raise SystemExit(ROWS.main("math_rows.py"))
