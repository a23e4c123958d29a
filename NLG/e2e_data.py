"""The rows of a data-to-text set: meaning representations with their references, in LoRA's linear form.

E2E's files are CSV with the columns mr and ref (trainset.csv, devset.csv, testset_w_refs.csv):

    "name[The Vaults], eatType[pub], near[Café Adriatic]","The Vaults is a pub near Café Adriatic."

which becomes the source "name : The Vaults | Type : pub | near : Café Adriatic", as in LoRA's experiments (its names
for three attributes included; text itself is left as it is, while LoRA's files have spaces around punctuation).

A further set is one entry in `SETS` and one function that gives its (source, reference) pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vblora.hub import from_hub
from vblora_experiments import text_files


class Example(NamedTuple):
    source: str
    reference: str


class Group(NamedTuple):
    """A source and all that people wrote for it."""

    source: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class TextSet:
    """Where a set comes from: on the hub, its name, revision, columns and splits; in a folder, its files by split.

    `read` gives the pairs of one file; `linear` the source of one meaning representation.
    """

    hub_name: str
    hub_revision: str
    hub_columns: tuple[str, str]
    files: dict[str, tuple[str, ...]]  # the first one found counts
    read: Callable[[Path], Iterator[Example]]
    linear: Callable[[str], str]


SPLITS = ("train", "validation", "test")


def load_split(name: str, split: str, folder: str | Path | None = None) -> list[Example]:
    """The pairs of one split, from the hub (`folder` None) or from a local folder.

    Raises:
        ValueError: an unknown set or split, a missing file, or a row that is wrong, naming file and line.
    """
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(SETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    source = SETS[name]
    if folder is None:
        return _from_hub(source, split)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = [Path(folder) / file for file in source.files[split]]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ValueError(f"{folder}: no {' or '.join(source.files[split])} for the {split} split of {name}")
    examples = list(source.read(found))
    if not examples:
        raise ValueError(f"{found}: no rows")
    return examples


def group(examples: list[Example]) -> list[Group]:
    """Distinct sources in the order in which they first come, each with all of its references."""
    references: dict[str, list[str]] = {}
    for example in examples:
        references.setdefault(example.source, []).append(example.reference)
    return [Group(source, tuple(texts)) for source, texts in references.items()]


def fingerprint(examples: list[Example]) -> str:
    """SHA-256 of the pairs in use, the same whatever files they came from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example).encode() + b"\n")
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- E2E

E2E_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SLOT = re.compile(r"([^\[\],]*[^\[\],\s])\[([^\[\]]+)\]")


def linear_e2e(mr: str) -> str:
    """LoRA's form of an E2E meaning representation.

    Raises:
        ValueError: it is no list of name[value].
    """
    parts, at = [], 0
    for slot in _SLOT.finditer(mr):
        if mr[at : slot.start()].strip(", ") or (at and "," not in mr[at : slot.start()]):
            break
        name, value = slot.group(1).strip(), slot.group(2).strip()
        parts.append(f"{E2E_NAMES.get(name, name)} : {value}")
        at = slot.end()
    if not parts or mr[at:].strip(", "):
        raise ValueError(f"no list of name[value], with commas between: {mr!r}")
    return " | ".join(parts)


def read_e2e(path: Path) -> Iterator[Example]:
    """The pairs of one of the challenge's CSV files."""
    header: list[str] = []
    for number, fields in text_files.read_table(path):
        if header:
            yield _e2e_example(f"{path}, line {number}", dict(zip(header, fields, strict=True)))
            continue
        header = fields
        text_files.check_header(path, header)
        if not {"mr", "ref"} <= set(header):
            raise ValueError(f"{path}: the columns mr and ref are needed; found {', '.join(header)}")
    if not header:
        raise ValueError(f"{path}: the columns mr and ref are needed; found nothing")


def _e2e_example(where: str, row: dict[str, str]) -> Example:
    reference = " ".join(row["ref"].split())  # two references hold a line break
    if not reference:
        raise ValueError(f"{where}: the reference is empty")
    try:
        return Example(linear_e2e(row["mr"]), reference)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


SETS: dict[str, TextSet] = {
    "e2e": TextSet(
        hub_name="tuetschek/e2e_nlg",
        hub_revision="refs/convert/parquet",
        hub_columns=("meaning_representation", "human_reference"),
        files={
            "train": ("trainset.csv", "train.csv"),
            "validation": ("devset.csv", "validation.csv"),
            "test": ("testset_w_refs.csv", "test.csv"),
        },
        read=read_e2e,
        linear=linear_e2e,
    ),
}


def _from_hub(source: TextSet, split: str) -> list[Example]:
    import datasets

    loaded = from_hub(
        lambda: datasets.load_dataset(source.hub_name, revision=source.hub_revision, split=split),
        f"{source.hub_name} ({split})",
        "--data_dir DIR, with the set's files",
    )
    mr, reference = source.hub_columns
    return [Example(source.linear(row[mr]), " ".join(row[reference].split())) for row in loaded]
