"""Run records as tables.

    python NLU/table.py results/cola_minilm        # one line per record, most stored parameters first

`reproduce.py` prints the paper's tables from here: the median over seeds, its standard deviation, the last and the
best epoch (the paper takes each run's best, on the set that it reports), and the paper's figure beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any, NamedTuple

import paper
from experiments import ABLATIONS, TABLE_1, Trial, trial_of
from vblora_experiments import campaign, commands, records, tables
from vblora_experiments.tables import count, number, signed

TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "vera": "VeRA",
    "vblora": "VB-LoRA",
    "tied_lora": "Tied-LoRA",
    "lora_xs": "LoRA-XS",
}
MODEL_TITLES = {"roberta_base": "RoBERTa-base", "roberta_large": "RoBERTa-large", "minilm": "MiniLM-L6"}
TASK_TITLES = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "qnli": "QNLI", "rte": "RTE", "stsb": "STS-B"}
METRICS = {"matthews_correlation": "Matthews", "accuracy": "accuracy", "pearson": "Pearson"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="record files, or folders of them")
    print(render(read(parser.parse_args(arguments).records)))


def read(paths: Sequence[Path], required: bool = True) -> list[dict[str, Any]]:
    """The records in these files and folders, most stored parameters first.

    Raises:
        ValueError: there are none, where some are required; or a file or folder does not exist.
    """
    found = [record for _, record in records.read_files(paths, "glue")]
    if not found and required:
        raise ValueError(f"no run record in {', '.join(map(str, paths))}")
    return sorted(found, key=lambda r: -r["stored_parameters"]["parameters"])


def render(found: Sequence[dict[str, Any]]) -> str:
    """One line of Markdown for each record."""
    lines = [
        "| task | method | stored parameters | adapter bytes | last epoch | best epoch | epochs |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for record in found:
        stored, scores = record["stored_parameters"], record["scores"]
        metric = scores["metric"]
        lines.append(
            f"| {record['task']} ({METRICS.get(metric, metric)}) | {TITLES.get(record['method'], record['method'])} "
            f"| {stored['parameters']:,} | {stored['bytes']:,} | {score(record, 'last'):.3f} "
            f"| {score(record, 'best'):.3f} | {scores['last']['epoch']:g} |"
        )
    return "\n".join(lines)


class Cell(NamedTuple):
    """One row of the table for one task, over its seeds; scores in percent. None: no record, or not in the paper."""

    model: str
    task: str
    name: str  # the method, or the variant of an ablation
    seeds: int
    best: float | None
    best_sd: float | None
    last: float | None
    last_sd: float | None
    parameters: int | None
    paper: float | None
    paper_parameters: float | None  # millions
    from_mnli: bool

    @property
    def difference(self) -> float | None:
        return None if self.best is None or self.paper is None else self.best - self.paper


def cells(trials: Sequence[Trial], found: Sequence[dict[str, Any]], experiment: str = TABLE_1) -> list[Cell]:
    """The cells that these trials make, in the order of their first trial, from the records there are.

    The medians are over seeds, each run at its best or at its last epoch; deviations are the sample's (n - 1).
    """
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.row, variant_name(trial, experiment)), []).append(trial)
    return [_cell(name, group, found, experiment) for (_, name), group in groups.items()]


def variant_name(trial: Trial, experiment: str) -> str:
    """What a trial is called in the table: its method in Table 1, its variant in an ablation."""
    if experiment == TABLE_1:
        return trial.method
    if trial.variant:
        return trial.variant
    # The row as it stands is the variant whose changes change nothing.
    known = ABLATIONS[experiment].of(trial.model)
    return next(name for name, changes in known.items() if not trial_of(trial.row, name, changes, 0).changes)


def _cell(name: str, group: Sequence[Trial], found: Sequence[dict[str, Any]], experiment: str) -> Cell:
    of_group = [next((r for r in found if trial.is_of(r)), None) for trial in group]
    records = [record for record in of_group if record is not None]
    first = group[0]
    _refuse_mixed_data(first, records)
    if experiment == TABLE_1:
        printed = paper.score(first.model, first.method, first.task)
        millions = paper.PARAMETERS.get((first.model, first.method))
    else:
        study = ABLATIONS[experiment]
        is_papers = (first.model, first.task) == (study.model, study.task)
        printed, millions = study.paper.get(name) if is_papers else None, None
    best, last = ([_percent(r, when) for r in records] for when in ("best", "last"))
    return Cell(
        first.model,
        first.task,
        name,
        len(records),
        median(best) if best else None,
        stdev(best) if len(best) > 1 else None,
        median(last) if last else None,
        stdev(last) if len(last) > 1 else None,
        records[0]["stored_parameters"]["parameters"] if records else None,
        printed,
        millions,
        first.from_mnli,
    )


def _refuse_mixed_data(trial: Trial, records: Sequence[dict[str, Any]]) -> None:
    """Refuse records of one cell that were made on different numbers of rows: they are not to be compared."""
    sizes = {tuple(sorted((k, v) for k, v in (r.get("data") or {}).items() if k != "fingerprint")) for r in records}
    if len(sizes) > 1:
        raise ValueError(
            f"the records of {trial.row} were made on different data ({'; '.join(map(str, map(dict, sizes)))}): "
            "remove those that do not belong"
        )


def _percent(record: dict[str, Any], when: str) -> float:
    return 100 * score(record, when)


def score(record: Mapping[str, Any], when: str) -> float:
    """A record's score at its "last" or its "best" epoch.

    Raises:
        ValueError: there is none.
    """
    metric, scores = record["scores"]["metric"], record["scores"][when]
    if not isinstance(scores.get(metric), (int, float)):
        raise ValueError(f"a record of {record['task']} has no {metric} at its {when} epoch: it is damaged")
    return scores[metric]


def render_cells(cells: Sequence[Cell], experiment: str, format: str, extra: Mapping[str, str] | None = None) -> str:
    """The table in one of FORMATS. Markdown and LaTeX leave out what has no record; CSV has a line for each cell.

    `extra` are the flags that every run was given beside its row: the table says so.
    """
    if format == "csv":
        return tables.as_csv([*Cell._fields, "difference"], [[*cell, cell.difference] for cell in cells])
    header, lines = (_table1_lines if experiment == TABLE_1 else _ablation_lines)(cells)
    notes = campaign.note_of(extra or {})
    notes += ["† started from the adapter trained on MNLI."] if any(c.from_mnli and c.seeds for c in cells) else []
    return tables.render(header, lines, format, notes)


def _table1_lines(cells: Sequence[Cell]) -> tuple[list[str], tables.Lines]:
    """Four lines for each row of Table 1: best epoch, last epoch, paper, difference."""
    have = [cell for cell in cells if cell.seeds]
    tasks = [task for task in TASK_TITLES if any(cell.task == task for cell in have)]
    rows = list(dict.fromkeys((cell.model, cell.name) for cell in have))
    header = ["model", "method", "# params", "", *(TASK_TITLES[task] for task in tasks), "average"]
    lines: tables.Lines = []
    for model, name in rows:
        by_task = {cell.task: cell for cell in have if (cell.model, cell.name) == (model, name)}
        one = next(iter(by_task.values()))
        of_tasks = [by_task.get(task) for task in tasks]
        names = [MODEL_TITLES[model], method_title(name)]
        lines.append(
            [*names, count(one.parameters), "best epoch"]
            + [_score(c.best, c.best_sd, c.seeds, c.from_mnli) if c else "" for c in of_tasks]
            + [_average([c.best if c else None for c in of_tasks])]
        )
        lines.append(
            ["", "", "", "last epoch"]
            + [_score(c.last, c.last_sd, from_mnli=c.from_mnli) if c else "" for c in of_tasks]
            + [_average([c.last if c else None for c in of_tasks])]
        )
        if any(cell.paper is not None for cell in by_task.values()):
            printed = "" if one.paper_parameters is None else f"{one.paper_parameters:g}M"
            lines.append(
                ["", "", printed, "paper"]
                + [_score(c.paper) if c else "" for c in of_tasks]
                + [_average([c.paper if c else None for c in of_tasks])]
            )
            lines.append(
                ["", "", "", "difference"]
                + [signed(c.difference) if c else "" for c in of_tasks]
                + [_average([c.difference if c else None for c in of_tasks], signed=True)]
            )
    return header, lines


def _ablation_lines(cells: Sequence[Cell]) -> tuple[list[str], tables.Lines]:
    have = [cell for cell in cells if cell.seeds]
    header = ["model", "task", "variant", "# params", "seeds", "best epoch", "last epoch"]
    with_paper = any(cell.paper is not None for cell in have)
    header += ["paper", "difference"] if with_paper else []
    lines = []
    for cell in have:
        names = [MODEL_TITLES[cell.model], TASK_TITLES[cell.task], cell.name.replace("_", " ")]
        scores = [_score(cell.best, cell.best_sd), _score(cell.last, cell.last_sd)]
        beside = [_score(cell.paper), signed(cell.difference)] if with_paper else []
        lines.append([*names, count(cell.parameters), str(cell.seeds), *scores, *beside])
    return header, lines


def method_title(name: str) -> str:
    """A method of the table in words: "vblora_qv" is "VB-LoRA qv"."""
    for ending in ("_qv", "_all"):
        if name.endswith(ending):
            return f"{TITLES[name.removesuffix(ending)]} {ending[1:]}"
    return TITLES[name]


def _score(value: float | None, sd: float | None = None, seeds: int | None = None, from_mnli: bool = False) -> str:
    """A score, its deviation, and in brackets how many seeds it is the median of; a dagger for an MNLI start."""
    text = number(value, sd)
    return text and text + (f" ({seeds})" if seeds is not None else "") + ("†" if from_mnli else "")


def _average(values: Sequence[float | None], signed: bool = False) -> str:
    """The mean over the tasks, where all of them are there."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return ""
    mean = sum(known) / len(known)
    return tables.signed(mean) if signed else _score(mean)


if __name__ == "__main__":
    commands.run(main, "table")
