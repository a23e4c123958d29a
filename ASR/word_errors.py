"""Word and character error rates, in percent, with an interval over the recordings.

    WER = (substitutions + deletions + insertions) / words of the references

CER is the same of characters. Both can exceed 100, and are never cut there. The interval is a bootstrap's over
recordings: 95% of the rates of as many recordings drawn with replacement lie in it. One speaker's recordings are no
sample of speakers, and it says nothing about other voices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np

from normalisers import Normaliser

DRAWS = 1000
INTERVAL = (2.5, 97.5)  # percentiles


def rates(
    references: Sequence[str], hypotheses: Sequence[str], normalisers: dict[str, Normaliser], source: str | Path = ""
) -> dict[str, dict[str, Any]]:
    """WER and CER under each of the normalisers.

    Args:
        references: what was meant.
        hypotheses: what was said of each.
        normalisers: by their names.
        source: the references' file, for errors.

    Raises:
        ValueError: nothing to score, unequal numbers of texts, or references of which nothing is left.
    """
    if not references or len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses: each needs one")
    found = {}
    for name, function in normalisers.items():
        pairs = [(function(r), function(h)) for r, h in zip(references, hypotheses, strict=True)]
        if not any(reference for reference, _ in pairs):
            of = f" of {source}" if source else ""
            raise ValueError(f"nothing is left of the references{of} under the normaliser {name}: take another")
        found[name] = {"wer": _rate(pairs, word_counts), "cer": _rate(pairs, character_counts)}
    return found


def _rate(
    pairs: Sequence[tuple[str, str]], count: Callable[[str, str], tuple[int, int, int, int]]
) -> dict[str, float | int]:
    """The rate, its interval, and what it is made of."""
    # Of each recording: substitutions, deletions, insertions, and the reference's length.
    counts = np.array([count(reference, hypothesis) for reference, hypothesis in pairs])
    low, high = np.percentile(resampled(counts[:, :3].sum(axis=1), counts[:, 3]), INTERVAL)
    substitutions, deletions, insertions, length = (int(total) for total in counts.sum(axis=0))
    return {
        "percent": 100 * (substitutions + deletions + insertions) / length,
        "low": float(low),
        "high": float(high),
        "substitutions": substitutions,
        "deletions": deletions,
        "insertions": insertions,
        "length": length,
    }


def word_counts(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """Substituted, deleted and inserted words, and the reference's words."""
    if not reference:  # a recording of which the normaliser leaves nothing
        return 0, 0, len(hypothesis.split()), 0
    found = jiwer.process_words(reference, hypothesis)
    return found.substitutions, found.deletions, found.insertions, len(reference.split())


def character_counts(reference: str, hypothesis: str) -> tuple[int, int, int, int]:
    """The same of characters, blanks between words among them."""
    if not reference:
        return 0, 0, len(hypothesis), 0
    found = jiwer.process_characters(reference, hypothesis)
    return found.substitutions, found.deletions, found.insertions, len(reference)


def resampled(errors: np.ndarray, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """The rates in percent of `DRAWS` draws of as many recordings, with replacement."""
    drawn = np.random.default_rng(seed).integers(len(errors), size=(DRAWS, len(errors)))
    totals = lengths[drawn].sum(axis=1)
    drawn, totals = drawn[totals > 0], totals[totals > 0]
    return 100 * errors[drawn].sum(axis=1) / totals
