"""The rows of a GLUE task, from the hub or from a local folder in any of the usual file formats.

A folder may hold, for training and development (the first of these that is there):

    train.tsv   dev.tsv     GLUE's own files, tab-separated, no quoting (MNLI: dev_matched.tsv)
    train.csv   dev.csv     with a header
    train.jsonl dev.jsonl   one JSON object per line (.json: the same, or one list of objects)

"validation" may stand for "dev". CoLA's raw form has no header and four columns; its development set may be
one file or the two files dev_in_domain.tsv and dev_out_of_domain.tsv, which together are GLUE's (also under
their first names, in_domain_train.tsv, in_domain_dev.tsv and out_of_domain_dev.tsv). A folder with GLUE's
sub-folders (CoLA/, SST-2/) does as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from glue_tasks import HUB_DATASET, Task, get_task
from vblora.hub import from_hub
from vblora_experiments import text_files

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json")


class Example(NamedTuple):
    sentence1: str
    sentence2: str | None
    label: int | float


class Splits(NamedTuple):
    train: list[Example] | None
    validation: list[Example]


@dataclass(frozen=True)
class TaskData:
    """The splits "train" (None where it was not asked for and is not there) and "validation".

    Columns: sentence1, sentence2 (tasks on pairs) and label. ``fingerprint`` is the sha256 of the rows in
    use, the same for the same rows whatever files they came from.
    """

    task: Task
    train: datasets.Dataset | None
    validation: datasets.Dataset
    fingerprint: str

    def __getitem__(self, split: str) -> datasets.Dataset:
        if split not in ("train", "validation") or getattr(self, split) is None:
            raise KeyError(split)
        return getattr(self, split)


def load_task(
    task: str,
    data: str | Path | None = None,
    max_train: int | None = None,
    seed: int = 0,
    need_train: bool = True,
) -> TaskData:
    """Read a task from the hub (``data`` None) or from the folder ``data``.

    ``max_train`` keeps a random part of the training rows, the same one for the same seed. ValueErrors name
    the file and line, or the columns or files that are missing.
    """
    row = get_task(task)
    if max_train is not None and max_train < 1:
        raise ValueError(f"max_train must be at least 1, not {max_train}")
    splits = _from_hub(row) if data is None else _from_folder(row, Path(data), need_train)
    train, validation = splits
    if train is not None and max_train is not None:
        train = _sample(train, max_train, seed)
    return TaskData(
        row,
        None if train is None else _dataset(row, train),
        _dataset(row, validation),
        _fingerprint(row, train, validation),
    )


def tokenize(dataset: datasets.Dataset, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """What the model takes, plus ``labels``: truncated to ``max_length`` and not padded (pad per batch,
    later)."""
    columns = dataset[:]
    texts = [list(columns[name]) for name in ("sentence1", "sentence2") if name in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, padding=False)
    kept = {name: encoded[name] for name in encoded if name in tokenizer.model_input_names}
    return datasets.Dataset.from_dict({**kept, "labels": list(columns["label"])})


def _sample(examples: list[Example], size: int, seed: int) -> list[Example]:
    rng = random.Random(seed)
    order = sorted((rng.random(), index) for index in range(len(examples)))
    return [examples[index] for index in sorted(index for _, index in order[:size])]


def _dataset(task: Task, examples: list[Example]) -> datasets.Dataset:
    columns: dict[str, list[Any]] = {"sentence1": [example.sentence1 for example in examples]}
    if len(task.text_columns) == 2:
        columns["sentence2"] = [example.sentence2 for example in examples]
    return datasets.Dataset.from_dict({**columns, "label": [example.label for example in examples]})


def _fingerprint(task: Task, train: list[Example] | None, validation: list[Example]) -> str:
    digest = hashlib.sha256(task.name.encode())
    for name, examples in (("train", train), ("validation", validation)):
        if examples is not None:
            digest.update(f"\n{name}\n".encode())
            for example in examples:
                digest.update(json.dumps(example, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ the hub


def _from_hub(task: Task) -> Splits:
    loaded = from_hub(
        lambda: datasets.load_dataset(HUB_DATASET, task.hub_config),
        f"{HUB_DATASET} ({task.hub_config})",
        "--data_dir DIR, with files of your own",
    )
    validation = "validation_matched" if task.name == "mnli" else "validation"
    return Splits(_hub_split(task, loaded, "train"), _hub_split(task, loaded, validation))


def _hub_split(task: Task, loaded: Any, split: str) -> list[Example]:
    examples = []
    for number, row in enumerate(loaded[split]):
        where = f"{HUB_DATASET} ({task.hub_config}), {split}, row {number}"
        examples.append(_example(task, where, [row[column] for column in task.text_columns], row["label"]))
    return examples


# --------------------------------------------------------------------------------------- local files


def _from_folder(task: Task, folder: Path, need_train: bool) -> Splits:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if not _find(folder, ("train", "in_domain_train")) and (folder / task.folder).is_dir():
        folder = folder / task.folder
    train_files, train_names = _train_files(task, folder)
    dev_files, dev_names = _dev_files(task, folder)
    missing = []
    if need_train and not train_files:
        missing.append(f"training file ({train_names})")
    if not dev_files:
        missing.append(f"development file ({dev_names})")
    if missing:
        raise ValueError(f"{folder}: no {' and no '.join(missing)} for {task.name}")
    return Splits(_read_all(task, train_files) if train_files else None, _read_all(task, dev_files))


def _find(folder: Path, stems: Iterable[str]) -> list[Path]:
    """The first file there is, by format and then by name; at most one."""
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES for stem in stems]
    return [path for path in found if path.is_file()][:1]


def _names(stems: Iterable[str]) -> str:
    return f"{' or '.join(stems)}{{{','.join(SUFFIXES)}}}"


def _train_files(task: Task, folder: Path) -> tuple[list[Path], str]:
    stems = ("train", "in_domain_train") if task.name == "cola" else ("train",)
    return _find(folder, stems), _names(stems)


def _dev_files(task: Task, folder: Path) -> tuple[list[Path], str]:
    names = _names(task.dev_names)
    found = _find(folder, task.dev_names)
    if found or task.name != "cola":
        return found, names
    for pair in (
        ("dev_in_domain.tsv", "dev_out_of_domain.tsv"),
        ("in_domain_dev.tsv", "out_of_domain_dev.tsv"),
    ):
        present = [folder / name for name in pair if (folder / name).is_file()]
        if len(present) == 1:
            absent = next(name for name in pair if name != present[0].name)
            raise ValueError(
                f"{folder}: {present[0].name} is there but {absent} is not; CoLA's development set is both together"
            )
        if present:
            return present, names
    return [], f"{names}, or dev_in_domain.tsv with dev_out_of_domain.tsv"


def _read_all(task: Task, paths: list[Path]) -> list[Example]:
    return [example for path in paths for example in _read(task, path)]


def _read(task: Task, path: Path) -> list[Example]:
    read = _read_json if path.suffix in (".jsonl", ".json") else _read_table
    examples = read(task, path)
    if not examples:
        raise ValueError(f"{path}: no rows")
    return examples


def _read_table(task: Task, path: Path) -> list[Example]:
    """A .tsv or .csv file; MRPC's start with a byte order mark."""
    lines = list(text_files.read_table(path))
    if not lines:
        return []
    if task.name == "cola" and path.suffix == ".tsv" and not {"sentence", "sentence1"} & set(lines[0][1]):
        header, needed = ["source", "label", "mark", "sentence"], (["sentence"], "label")
        if len(lines[0][1]) != len(header):
            names, found = ", ".join(header), len(lines[0][1])
            raise ValueError(f"{path}, line {lines[0][0]}: {found} columns instead of {len(header)} ({names})")
    else:
        header = lines.pop(0)[1]
        text_files.check_header(path, header)
        needed = _columns(task, path, header)
    rows = [(f"{path}, line {number}", dict(zip(header, fields, strict=True))) for number, fields in lines]
    return [_pick(task, where, row, needed) for where, row in rows]


def _read_json(task: Task, path: Path) -> list[Example]:
    as_lines = not text_files.read_text(path).lstrip().startswith("[")
    rows = text_files.read_json_rows(path, as_lines)
    return [_pick(task, where, row, _columns(task, where, list(row))) for where, row in rows]


def _columns(task: Task, where: object, header: list[str]) -> tuple[list[str], str]:
    """The names under which the text and the label stand here: GLUE's file names, the hub's, or this
    project's."""
    neutral = ["sentence1", "sentence2"][: len(task.text_columns)]
    text_choices = [list(task.tsv_columns[:-1]), list(task.text_columns), neutral]
    label_choices = [*task.tsv_columns[-1:], "label", "labels", "score"]
    text = next((names for names in text_choices if names and set(names) <= set(header)), None)
    label = next((name for name in label_choices if name in header), None)
    if text is None or label is None:
        wanted = task.tsv_columns or (*task.text_columns, "label")
        raise ValueError(
            f"{where}: {task.name} needs the columns {', '.join(wanted)} "
            f"(or {', '.join((*neutral, 'label'))}); found {', '.join(header)}"
        )
    return text, label


def _pick(task: Task, where: str, record: dict[str, Any], needed: tuple[list[str], str]) -> Example:
    text, label = needed
    return _example(task, where, [record[name] for name in text], record[label])


def _example(task: Task, where: str, text: list[Any], label: Any) -> Example:
    for part in text:
        if not isinstance(part, str) or not part.strip():
            raise ValueError(f"{where}: a sentence is empty or not text: {part!r}")
    value = _score(task, where, label) if task.is_regression else _class(task, where, label)
    return Example(text[0], text[1] if len(text) == 2 else None, value)


def _class(task: Task, where: str, label: Any) -> int:
    if label in task.labels:
        return task.labels.index(label)
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(label, bool) or number not in range(task.num_labels):
        raise ValueError(
            f"{where}: unknown label {label!r}; {task.name} has {', '.join(task.labels)} "
            f"(or 0 to {task.num_labels - 1})"
        )
    return int(number)


def _score(task: Task, where: str, label: Any) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(label, bool) or not 0 <= number <= 5:
        raise ValueError(f"{where}: unknown label {label!r}; {task.name} has scores from 0 to 5")
    # The hub stores them in single precision, 3.8 as 3.7999999523; the files have three decimals at most.
    return round(number, 4)
