"""The paper's Table 2, as printed: E2E with GPT-2, the mean of three seeds."""

from __future__ import annotations

SCORES = ("BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr")
TABLE_2: dict[tuple[str, str], tuple[float, ...]] = {
    ("gpt2_medium", "full"): (68.2, 8.62, 46.2, 71.0, 2.47),
    ("gpt2_medium", "lora"): (68.9, 8.69, 46.4, 71.3, 2.51),
    ("gpt2_medium", "vera"): (70.1, 8.81, 46.6, 71.5, 2.50),
    ("gpt2_medium", "vblora"): (70.0, 8.81, 46.6, 71.5, 2.52),
    ("gpt2_large", "full"): (68.5, 8.78, 46.0, 69.9, 2.45),
    ("gpt2_large", "lora"): (70.1, 8.80, 46.7, 71.9, 2.52),
    ("gpt2_large", "vera"): (70.3, 8.85, 46.9, 71.6, 2.54),
    ("gpt2_large", "vblora"): (70.3, 8.86, 46.7, 72.2, 2.54),
}
PARAMETERS: dict[tuple[str, str], float] = {  # millions
    ("gpt2_medium", "full"): 354.92,
    ("gpt2_medium", "lora"): 0.35,
    ("gpt2_medium", "vera"): 0.098,
    ("gpt2_medium", "vblora"): 0.076,
    ("gpt2_large", "full"): 774.03,
    ("gpt2_large", "lora"): 0.77,
    ("gpt2_large", "vera"): 0.17,
    ("gpt2_large", "vblora"): 0.13,
}
MINUTES = 180  # of a run of VB-LoRA on an A100 (Table 8)
EPOCHS = 5
