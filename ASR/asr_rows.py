"""The numbers of the speech experiments: one row for every model and method.

    python ASR/asr_rows.py tiny_en/vblora

prints one row as the flags of run_asr.py, one per line.

No paper that could be had gives rates, epochs or VB-LoRA's settings for Whisper: the rows of large-v2 are a start of
our own, with VB-LoRA's rates as in all of its paper's experiments. The small models run on a machine without a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vblora_experiments.rows import Model, Rows

COMMON: dict[str, Any] = {
    "targets": "decoder",
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "max_new_tokens": 224,
}
LARGE: dict[str, Any] = {
    "targets": "both",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "bf16": True,
    "long_clips": "leave_out",
}
# A window of 8 seconds holds all clips of the Italian test part; 300 steps see each clip six times.
SMALL: dict[str, Any] = {
    "window": 8,
    "long_clips": "leave_out",
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "warmup_steps": 18,
    "max_new_tokens": 80,
}
MODELS: dict[str, Model] = {
    "tiny_en": Model("openai/whisper-tiny.en", SMALL),
    "base": Model("openai/whisper-base", SMALL),
    "large_v2_fleurs": Model("openai/whisper-large-v2", LARGE),
    "large_v2_common_voice": Model("openai/whisper-large-v2", LARGE),
}
METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {"method": "zero_shot"},
    "full": {"method": "full", "targets": "both", "learning_rate": 1e-5},
    "lora": {"method": "lora", "rank": 8, "lora_alpha": 8, "learning_rate": 3e-3},
    "dora": {"method": "dora", "rank": 8, "lora_alpha": 8, "learning_rate": 3e-3},  # LoRA's rate
    "vera": {"method": "vera", "rank": 256, "learning_rate": 1e-2},
    "lora_xs": {"method": "lora_xs", "rank": 32, "learning_rate": 4e-3},
    # As in the paper's other experiments: both kinds of rates, a small bank, two vectors mixed.
    "vblora": {
        "method": "vblora",
        "rank": 4,
        "topk": 2,
        "num_vectors": 256,
        "vector_length": 256,
        "init_logits_std": 0.01,
        "init_vector_bank_bound": 0.02,
        "learning_rate_vector_bank": 1e-3,
        "learning_rate_logits": 1e-2,
    },
    "recipe": {"method": "vblora", "recipe": True, "rank": 8},
    # With a twentieth of LoRA's numbers instead of a fifth.
    "recipe_small": {"method": "vblora", "recipe": True, "rank": 8},
}
METHODS_OF_MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("tiny_en", "recipe_small"): {"recipe_bytes": 63_800},  # LoRA of rank 8 on the decoder: 319,488 numbers
    ("base", "recipe_small"): {"recipe_bytes": 127_000},  # 638,976
    # On both sides of large-v2: 14,417,920.
    **{(model, "recipe_small"): {"recipe_bytes": 2_880_000} for model in ("large_v2_fleurs", "large_v2_common_voice")},
    **{(model, "vblora"): {"num_vectors": 90, "vector_length": 128} for model in ("tiny_en", "base")},
    # As LoRA's and the recipe's, the best of a search on Italian's development part with tiny.en (docs/speech.md).
    **{(model, "vera"): {"learning_rate": 4e-2} for model in ("tiny_en", "base")},
    **{(model, "lora_xs"): {"learning_rate": 1.6e-2} for model in ("tiny_en", "base")},
    **{(model, "vera"): {"rank": 1024} for model in ("large_v2_fleurs", "large_v2_common_voice")},
}


class Language(NamedTuple):
    """A language of a set.

    Attributes:
        folder: of its tables.
        token: whose token is used, where Whisper has none of it.
        max_new_tokens: of a text, where the row's do not hold every one.
    """

    folder: str
    token: str = ""
    max_new_tokens: int | None = None

    def flags(self, code: str) -> dict[str, str]:
        """What a run is told for this language."""
        flags = {"language": code} | ({"language_token": self.token} if self.token else {})
        return flags | ({"max_new_tokens": str(self.max_new_tokens)} if self.max_new_tokens is not None else {})


# What the decoder has room for beside its prompt. Whisper's tokens cut some scripts small: a letter of Odia is 2.7 of
# them, of Dhivehi 1.9, of Sorani 0.95. Longer texts are left out of the training, and in the test cannot be said whole.
ALL_TOKENS = 444
# The languages that Whisper has no token of, each with the token that we chose: a related language's where there is
# one, else that of the widest-spoken neighbour.
FLEURS_UNSEEN = {
    "ast": Language("ast_es", "es"),
    "ceb": Language("ceb_ph", "tl"),
    "ckb": Language("ckb_iq", "fa", ALL_TOKENS),
    "ff": Language("ff_sn", "ha"),
    "ga": Language("ga_ie", "cy"),
    "ig": Language("ig_ng", "yo"),
    "kam": Language("kam_ke", "sw"),
    "kea": Language("kea_cv", "pt"),
    "ky": Language("ky_kg", "kk"),
    "lg": Language("lg_ug", "sw"),
    "luo": Language("luo_ke", "sw"),
    "nso": Language("nso_za", "sn"),
    "ny": Language("ny_mw", "sn"),
    "om": Language("om_et", "so"),
    "or": Language("or_in", "bn", ALL_TOKENS),
    "umb": Language("umb_ao", "ln"),
    "wo": Language("wo_sn", "ha"),
    "xh": Language("xh_za", "sn"),
    "zu": Language("zu_za", "sn"),
}
COMMON_VOICE_UNSEEN = {
    "ckb": Language("ckb", "fa", ALL_TOKENS),
    "cv": Language("cv", "tt"),
    "dv": Language("dv", "si", ALL_TOKENS),
    "eo": Language("eo", "es"),
    "fy": Language("fy-NL", "nl"),
    "ia": Language("ia", "la"),
    "kmr": Language("kmr", "tr"),
    "ky": Language("ky", "kk"),
    "rw": Language("rw", "sw"),
    "ug": Language("ug", "uz"),
}
# The small models' recordings are Debian's prompts (asterisk_prompts.py). Italian and Russian are new to tiny.en, whose
# tokens cut Cyrillic small: a text of the Russian test part has 126 of them, by base's at most 38.
LANGUAGES: dict[str, dict[str, Language]] = {
    "tiny_en": {"it": Language("it"), "ru": Language("ru", max_new_tokens=160)},
    "base": {"it": Language("it"), "ru": Language("ru")},
    "large_v2_fleurs": FLEURS_UNSEEN,
    "large_v2_common_voice": COMMON_VOICE_UNSEEN,
}


ROWS = Rows(COMMON, MODELS, METHODS, METHODS_OF_MODELS)
row = ROWS.row
DECODING = ("max_new_tokens",)  # what a row says of transcribing
OF_TRAINING = ("targets", "max_train_samples", "spec_augment")  # of no use to what trains nothing


def training_row(name: str) -> dict[str, Any]:
    """The flags of one row without those of transcribing."""
    return {flag: value for flag, value in row(name).items() if flag not in DECODING}


if __name__ == "__main__":
    raise SystemExit(ROWS.main("asr_rows.py"))
