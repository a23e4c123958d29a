"""The paper's Table 3, as printed: MT-Bench, first turn, judged by GPT-4."""

from __future__ import annotations

# LoRA has two figures: VeRA's paper's (5.19 and 5.77), and that of VB-LoRA's authors, who ran it again, which is here.
TABLE_3: dict[tuple[str, str], float] = {
    ("llama2_7b", "base"): 4.79,
    ("llama2_7b", "lora"): 5.63,
    ("llama2_7b", "vera"): 5.08,
    ("llama2_7b", "vblora"): 5.71,
    ("llama2_13b", "base"): 5.38,
    ("llama2_13b", "lora"): 6.13,
    ("llama2_13b", "vera"): 5.93,
    ("llama2_13b", "vblora"): 6.31,
}
PARAMETERS: dict[tuple[str, str], float] = {  # millions
    ("llama2_7b", "lora"): 159.9,
    ("llama2_7b", "vera"): 1.6,
    ("llama2_7b", "vblora"): 0.8,
    ("llama2_13b", "lora"): 250.3,
    ("llama2_13b", "vera"): 2.4,
    ("llama2_13b", "vblora"): 1.1,
}
# Of a run on an A100 (Table 9).
MINUTES: dict[tuple[str, str], float] = {
    ("llama2_7b", "lora"): 120,
    ("llama2_13b", "lora"): 156,
    ("llama2_7b", "vblora"): 150,
    ("llama2_13b", "vblora"): 180,
}
