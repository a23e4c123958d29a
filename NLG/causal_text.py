"""Pairs of source and reference as a causal language model reads them."""

from __future__ import annotations

from typing import Any

from e2e_data import Example
from vblora_experiments.causal import IGNORED, Encoded


def encode(examples: list[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """The rows as token numbers and labels; the source and the separator have no label.

    The separator is the tokenizer's first token of a text, or its end token where it has none (GPT-2). Source and
    reference are tokenized apart, so that no token reaches across.
    """
    sources = prompts([e.source for e in examples], tokenizer)
    texts = tokenizer([f" {e.reference}" for e in examples], add_special_tokens=False)["input_ids"]
    rows = []
    for source, reference in zip(sources, texts, strict=True):
        target = [*reference, tokenizer.eos_token_id]
        labels = [IGNORED] * len(source) + target
        rows.append(Encoded([*source, *target][:max_length], labels[:max_length]))
    if short := sum(all(label == IGNORED for label in row.labels) for row in rows):
        raise ValueError(f"--max_length {max_length} leaves nothing of the reference of {short} rows: raise it")
    return rows


def prompts(sources: list[str], tokenizer: Any) -> list[list[int]]:
    """What stands before the reference: the source's tokens and the separator."""
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [[*ids, separator] for ids in tokenizer(sources, add_special_tokens=False)["input_ids"]]
