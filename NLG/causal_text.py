"""Pairs of source and reference as a causal language model reads them, and the model and tokenizer themselves."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from e2e_data import Example
from vblora.training import commands

IGNORED = -100  # labels that the loss leaves out
FLAG = "--model_name_or_path DIR"


def load_model(name: str, dtype: str = "auto") -> Any:
    """The causal model of this name or folder; dtype "auto" is the one its weights are kept in."""
    return commands.from_hub(lambda: AutoModelForCausalLM.from_pretrained(name, dtype=dtype), name, FLAG)


def load_tokenizer(name: str) -> Any:
    """Its tokenizer, with a token to pad with, which is never looked at."""
    tokenizer = commands.from_hub(lambda: AutoTokenizer.from_pretrained(name), name, FLAG)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end token, which every row needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """The rows as token numbers and labels; the source and the separator have no label.

    The separator is the tokenizer's first token of a text, or its end token where it has none (GPT-2). Source and
    reference are tokenized apart, so that no token reaches across.
    """

    def __init__(self, examples: list[Example], tokenizer: Any, max_length: int) -> None:
        sources = prompts([e.source for e in examples], tokenizer)
        texts = tokenizer([f" {e.reference}" for e in examples], add_special_tokens=False)["input_ids"]
        self.rows = []
        for source, reference in zip(sources, texts, strict=True):
            ids = [*source, *reference, tokenizer.eos_token_id][:max_length]
            self.rows.append({"input_ids": ids, "labels": [IGNORED] * min(len(source), len(ids)) + ids[len(source) :]})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]


def prompts(sources: list[str], tokenizer: Any) -> list[list[int]]:
    """What stands before the reference: the source's tokens and the separator."""
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [[*ids, separator] for ids in tokenizer(sources, add_special_tokens=False)["input_ids"]]


class Padded:
    """Batches padded on the right to their longest row."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = tokenizer.pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def filled(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": filled("input_ids", self.pad),
            "attention_mask": torch.tensor(mask),
            "labels": filled("labels", IGNORED),
        }
