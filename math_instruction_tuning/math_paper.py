"""The paper's Table 4, as printed: accuracy on GSM8K and MATH after 100,000 rows of MetaMathQA."""

from __future__ import annotations

SETS = ("gsm8k", "math")
TABLE_4: dict[tuple[str, str], tuple[float, float]] = {
    ("mistral_7b", "full"): (67.02, 18.60),
    ("mistral_7b", "lora"): (67.70, 19.68),
    ("mistral_7b", "lora_xs"): (68.01, 17.86),
    ("mistral_7b", "vblora"): (69.22, 17.90),
    ("gemma_7b", "full"): (71.34, 22.74),
    ("gemma_7b", "lora"): (74.90, 31.28),
    ("gemma_7b", "lora_xs"): (74.22, 27.62),
    ("gemma_7b", "vblora"): (75.96, 28.90),
}
PARAMETERS: dict[tuple[str, str], float] = {  # millions
    ("mistral_7b", "full"): 7242,
    ("mistral_7b", "lora"): 168,
    ("mistral_7b", "lora_xs"): 0.92,
    ("mistral_7b", "vblora"): 0.65,
    ("gemma_7b", "full"): 8538,
    ("gemma_7b", "lora"): 200,
    ("gemma_7b", "lora_xs"): 0.80,
    ("gemma_7b", "vblora"): 0.67,
}
