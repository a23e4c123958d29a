"""Instructions and responses: reading them, the two prompt forms, tokens and labels.

Used by instruction_tuning/ (Alpaca) and math_instruction_tuning/ (MetaMathQA, GSM8K).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vblora.hub import from_hub
from vblora_experiments.causal import IGNORED, Encoded
from vblora_experiments.text_files import read_json_rows

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Row(NamedTuple):
    """What the model is given, and what it should answer."""

    prompt: str
    response: str


@dataclass(frozen=True)
class DataFormat:
    """How the rows of a set become text, and text becomes tokens.

    Attributes:
        instruction, input, response: the columns; `input` may be missing or empty in a row.
        end: what stands between the prompt's last mark and the response.
        together: prompt and response are tokenized as one text (MetaMath's code), not apart (QLoRA's).
        rewrite: what is made of a response; ValueError for one that it cannot be made of.
    """

    instruction: str
    response: str
    input: str | None = None
    end: str = ""
    together: bool = False
    rewrite: Callable[[str], str] = str

    def row(self, fields: dict[str, Any]) -> Row:
        """The row of these fields.

        Raises:
            ValueError: a column is missing, empty or no text.
        """
        for column in (self.instruction, self.response):
            if not isinstance(fields.get(column), str) or not fields[column].strip():
                raise ValueError(f"no text in {column!r}")
        more = fields.get(self.input) if self.input else None
        if more is not None and not isinstance(more, str):
            raise ValueError(f"{self.input!r} is no text")
        # Braces in a text are no fields: only the template is formatted.
        template = WITH_INPUT if more else WITHOUT_INPUT
        prompt = template.format(instruction=fields[self.instruction], input=more)
        return Row(prompt + self.end, self.rewrite(fields[self.response]))


def as_metamath(answer: str) -> str:
    """GSM8K's worked answer as MetaMathQA has it: without the calculator's marks, ending in "The answer is: N"."""
    worked, mark, number = re.sub(r"<<[^<>]*>>", "", answer).rpartition("#### ")
    if not mark or not number.strip():
        raise ValueError('the answer does not end with "#### " and a number')
    return f"{worked}#### {number.strip()}\nThe answer is: {number.strip()}"


DATA_FORMATS = {
    # The prompts of Stanford's Alpaca, with the space at the end that QLoRA's code has.
    "alpaca": DataFormat("instruction", "output", input="input", end=" "),
    "metamath": DataFormat("query", "response", together=True),
    "gsm8k": DataFormat("question", "answer", together=True, rewrite=as_metamath),
}
CONFIGURATIONS = {"openai/gsm8k": "main"}  # of sets on the hub that have several


def load_rows(source: str, data_format: str, split: str = "train") -> list[Row]:
    """The rows of a data set on the hub, or of a local file (.json, a list; .jsonl, one object a line).

    Args:
        source: a name on the hub, or a file.
        data_format: one of DATA_FORMATS.
        split: as datasets has it: train, train[:1000], train[10%:20%]. For a file what stands in brackets counts.

    Raises:
        ValueError: an unknown format, a missing file, or a row that is wrong, naming its number.
    """
    if data_format not in DATA_FORMATS:
        raise ValueError(f"unknown data format {data_format!r}; known: {', '.join(DATA_FORMATS)}")
    is_file = Path(source).suffix in (".json", ".jsonl")
    if is_file and not Path(source).is_file():
        raise ValueError(f"{source}: no such file")
    fields = _from_file(Path(source), split) if is_file else _from_hub(source, split)
    rows = []
    for where, of_row in fields:
        try:
            rows.append(DATA_FORMATS[data_format].row(of_row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not rows:
        raise ValueError(f"{source}: no rows in {split}")
    return rows


def _from_file(path: Path, split: str) -> list[tuple[str, dict[str, Any]]]:
    rows = read_json_rows(path, as_lines=path.suffix != ".json")
    return rows[_slice(split, len(rows))]


_SLICE = re.compile(r"\w+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def _slice(split: str, count: int) -> slice:
    """The part of `count` rows that a split names, by datasets' rules: numbers, or per cent rounded to whole rows."""
    found = _SLICE.fullmatch(split)
    if found is None:
        raise ValueError(f"no split such as train, train[:1000] or train[10%:20%]: {split!r}")
    ends = [
        None if end is None else round(int(end[:-1]) / 100 * count) if end.endswith("%") else int(end)
        for end in found.groups()
    ]
    return slice(*ends)


def _from_hub(name: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    import datasets

    loaded = from_hub(
        lambda: datasets.load_dataset(name, CONFIGURATIONS.get(name), split=split), name, "--data FILE.json"
    )
    return [(f"{name}, row {number}", row) for number, row in enumerate(loaded, 1)]


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows in use, the same wherever they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- tokens and labels


@dataclass(frozen=True)
class Limits:
    """Tokens at most: of the prompt and of the response (apart), or of the whole row (together)."""

    source: int = 512
    target: int = 512
    total: int = 512


def encode(rows: Sequence[Row], tokenizer: Any, together: bool, limits: Limits) -> list[Encoded]:
    """The rows as tokens, with labels on the response and the end token alone.

    A row is the tokenizer's first token (where it has one), the prompt, the response and the end token; what is over
    its limit is cut at the end. Apart, no token reaches across the prompt's end. Together, a token has a label if it
    begins in the response: one that reaches across has none, as in MetaMath's code.
    """
    if not rows:  # which the tokenizer does not take
        return []
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = tokenizer.eos_token_id
    if not together:
        prompts = tokenizer([row.prompt for row in rows], add_special_tokens=False)["input_ids"]
        responses = tokenizer([row.response for row in rows], add_special_tokens=False)["input_ids"]
        encoded = []
        for prompt, response in zip(prompts, responses, strict=True):
            source, target = [*first, *prompt][: limits.source], [*response, end][: limits.target]
            encoded.append(Encoded(source + target, [IGNORED] * len(source) + target))
        return encoded
    texts = [row.prompt + row.response for row in rows]
    whole = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    encoded = []
    for row, ids, offsets in zip(rows, whole["input_ids"], whole["offset_mapping"], strict=True):
        labels = [i if at >= len(row.prompt) else IGNORED for i, (at, _) in zip(ids, offsets, strict=True)]
        ids, labels = [*first, *ids, end], [IGNORED] * len(first) + labels + [end]
        encoded.append(Encoded(ids[: limits.total], labels[: limits.total]))
    return encoded


def with_labels(encoded: Sequence[Encoded]) -> list[Encoded]:
    """The rows of which some of the response is left."""
    return [one for one in encoded if any(label != IGNORED for label in one.labels[1:])]  # the first is never predicted
