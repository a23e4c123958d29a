"""Scores of a few validation texts after each epoch, to follow a training by. They are not the official ones."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

import e2e_scores
from causal_text import prompts
from e2e_data import Group
from generation import Decoding, generate

GREEDY = Decoding(beam=1, no_repeat_ngram=0)
BATCH = 16
PACKAGES = ("nltk", "rouge_score")


def check(samples: int) -> None:
    """Refuse before the training what would fail after its first epoch.

    Raises:
        ValueError: fewer than 0 samples; or a package is missing.
    """
    if samples < 0:
        raise ValueError(f"--quick_samples must be at least 0, not {samples}")
    missing = [name for name in PACKAGES if samples and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: not installed; pip install nltk rouge-score, or --quick_samples 0")


class QuickValidation(TrainerCallback):
    """Decodes `groups` without beams after each evaluation, and adds quick_bleu and quick_rougeL to its log."""

    def __init__(self, model: Any, tokenizer: Any, groups: list[Group]) -> None:
        self.model, self.groups = model, groups
        self.tokenizer = copy.copy(tokenizer)  # the trainer's own goes on padding on the right
        self.tokenizer.padding_side = "left"
        self.encoded = prompts([g.source for g in groups], tokenizer)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        training = self.model.training
        self.model.eval()
        texts: list[str] = []
        for at in range(0, len(self.encoded), BATCH):
            texts += generate(self.model, self.tokenizer, self.encoded[at : at + BATCH], GREEDY)
        self.model.train(training)
        scores = e2e_scores.quick_scores(texts, [g.references for g in self.groups])
        state.log_history[-1] |= {f"eval_{name}": value for name, value in scores.items()}
        if state.is_world_process_zero:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            print(f"epoch {state.epoch or 0:g}: {shown} on {len(texts)} texts (not the official scores)", flush=True)
