"""Records in folders, in tables: a table for each folder, model and data, a line for runs that differ by their seed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from vblora.io import read_json
from vblora.models import PLAN_FILE, RECORD_FILE
from vblora_experiments.records import OF_EXPERIMENT, RECORD, SELECTIONS_FILE, fault_of
from vblora_experiments.report.kinds import FOLDERS, KINDS, Curve, Kind, Record, Scores, command_of, finite, flags_of
from vblora_experiments.tables import deviation_of, mean_of

PARAMETERS = "parameters"  # what a paper's figures call them beside the scores
# What the paper prints for a record's scores, by their titles, and its parameters; by experiment.
Papers = Mapping[str, Callable[[Record], Mapping[str, float]]]


@dataclass
class Run:
    """A record that can be shown."""

    file: Path
    record: Record
    kind: Kind
    scores: Scores
    curve: Curve | None
    command: str
    paper: Mapping[str, float]

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def selections(self) -> Path | None:
        """The log of what the run selected, where it is kept."""
        own = self.file.with_name(SELECTIONS_FILE)
        collected = self.file.parent / "selections" / f"{self.file.stem}.safetensors"
        path = own if self.file.name == RECORD_FILE else collected
        return path if path.is_file() else None


@dataclass
class Line:
    """Runs that differ by their seed alone; `at` is the line's place in the page."""

    at: str
    name: str
    runs: list[Run]

    @property
    def stored(self) -> Mapping[str, int]:
        return self.runs[0].record["stored_parameters"]

    @property
    def paper(self) -> Mapping[str, float]:
        return self.runs[0].paper

    def values(self, score: str) -> list[float]:
        return [run.scores[score] for run in self.runs if score in run.scores]

    def middle(self, score: str) -> float | None:
        """The median over the seeds for a row of GLUE's, as in the paper's Table 1, else the mean."""
        values = self.values(score)
        return median(values) if values and self.is_median else mean_of(values)

    @property
    def is_median(self) -> bool:
        return self.runs[0].record["experiment"] == "glue" and bool(self.runs[0].record.get("row"))

    def deviation(self, score: str) -> float | None:
        return deviation_of(self.values(score))


@dataclass
class Table:
    """The lines of one folder, experiment, model, part and data."""

    folder: Path
    kind: Kind
    title: str
    lines: list[Line]
    shared: Mapping[str, str]  # flags that all lines have

    @property
    def scores(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.lines for run in line.runs for name in run.scores))


class Other(NamedTuple):
    """A JSON file that is no run's record."""

    file: Path
    what: str
    date: str
    commit: str


@dataclass
class Found:
    """What the folders hold; `problems` has a sentence for each file that cannot be shown."""

    tables: list[Table] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for table in self.tables for line in table.lines for run in line.runs]


def read(paths: Sequence[Path], papers: Papers, watch: Callable[[list[Path]], Any] = iter) -> Found:
    """Read all records in files and folders.

    Args:
        paths: the files and folders.
        papers: what the paper prints, by experiment.
        watch: what the files go through, such as a progress bar.

    Raises:
        ValueError: a file or folder does not exist, or none of them has a record that can be shown.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
    files = list(dict.fromkeys(file for path in paths for file in _files(path)))
    found, runs = Found(), []
    for file in watch(files):
        try:
            one = _read(file, papers)
        except ValueError as error:
            text = " ".join(str(error).split())
            found.problems.append(text if str(file) in text else f"{file}: {text}")
            continue
        if isinstance(one, Run):
            runs.append(one)
        else:
            found.others.append(one)
    if not runs:
        first = f"; {found.problems[0]}" if found.problems else ""
        raise ValueError(f"no record of a run in {', '.join(map(str, paths))}{first}")
    found.tables = _tables(runs)
    return found


def _files(path: Path) -> Iterator[Path]:
    """The JSON files below a folder; of a run's own folder its record alone."""
    if path.is_file():
        yield path
        return
    for name, folders, files in os.walk(path):
        folder = Path(name)
        if PLAN_FILE in files or RECORD_FILE in files:
            folders.clear()
            files = [file for file in files if file == RECORD_FILE]
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        yield from (folder / file for file in sorted(files) if file.endswith(".json"))


def _read(file: Path, papers: Papers) -> Run | Other:
    record = read_json(file)
    experiment = record.get("experiment")
    if experiment not in KINDS:
        what = record.get("benchmark") or experiment or "no record of a run"
        return Other(file, str(what), str(record.get("date", "")), str(record.get("commit", "")))
    if fault := fault_of(record, RECORD | OF_EXPERIMENT.get(experiment, {})):
        raise ValueError(f"{file}: no record of a run, or a damaged one: {fault}")
    kind = KINDS[experiment]
    try:
        scores = {name: finite(value) for name, value in kind.scores(record).items()}
        curve = kind.curve(record)
        if curve is not None:
            curve = curve._replace(points=[(finite(x), finite(y)) for x, y in curve.points])
        paper = papers[experiment](record) if experiment in papers else {}
        return Run(file, record, kind, scores, curve, command_of(record, kind), paper)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{file}: no record of a run, or a damaged one: {error!r:.200}") from error


def _tables(runs: Sequence[Run]) -> list[Table]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_table_of(run), []).append(run)
    tables, count = [], 0
    for own in groups.values():
        lines: dict[tuple[Any, ...], list[Run]] = {}
        for run in own:
            lines.setdefault(_line_of(run.record), []).append(run)
        shared = set.intersection(*(set(flags_of(group[0].record).items()) for group in lines.values()))
        made = []
        for group in lines.values():
            count += 1
            made.append(Line(f"line{count}", _name(group[0].record, shared), sorted(group, key=lambda run: run.seed)))
        made.sort(key=lambda line: -line.stored["bytes"])
        first = own[0]
        tables.append(Table(_folder(first.file), first.kind, _title(first), made, dict(sorted(shared))))
    return tables


def _table_of(run: Run) -> tuple[Any, ...]:
    record = run.record
    model = str(record["model"]).rpartition("/")[2]
    data = record["settings"].get("data_fingerprint")
    return (_folder(run.file), record["experiment"], model, run.kind.part(record), data)


def _line_of(record: Record) -> tuple[Any, ...]:
    """What runs of one line have in common: the row, the flags, what became of them, and what the runs started from."""
    settings = {name: value for name, value in (record.get("adapter_settings") or {}).items() if value}
    settings |= {name: record["settings"][name] for name in FOLDERS if name in record["settings"]}
    own = json.dumps(settings, sort_keys=True)
    return (record.get("row"), record["method"], own, *sorted(flags_of(record).items()))


def _folder(file: Path) -> Path:
    """The folder of a record's table: of a run's own record the one that its folder is in."""
    return file.parent.parent if file.name == RECORD_FILE else file.parent


def _title(run: Run) -> str:
    record = run.record
    rows = (record.get("data") or {}).get("train_rows") or record.get("train_rows")
    parts = [str(record["model"]).rpartition("/")[2], run.kind.part(record)]
    parts += [f"{rows:,} rows"] if rows else []
    return ", ".join(part for part in parts if part)


def _name(record: Record, shared: set[tuple[str, str]]) -> str:
    """What a line is called: the row's method, or the method, and the flags that not all lines of its table have."""
    method = str(record["row"]).rpartition("/")[2] if record.get("row") else str(record["method"])
    flags = [f"{name} {_short(value)}" for name, value in flags_of(record).items() if (name, value) not in shared]
    own = [flag for flag in flags if not (flag.startswith("method ") and flag.endswith(f" {method}"))]
    return ", ".join([re.sub(r"\s+", " ", method), *own])


def _short(value: str) -> str:
    """A number with many digits in four."""
    return f"{float(value):.4g}" if re.fullmatch(r"\d+\.\d{6,}", value) else value
