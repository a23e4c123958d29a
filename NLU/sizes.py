"""What an adapter's bytes buy: score against bytes, for every method and for VB-LoRA's smaller files.

    python NLU/sizes.py [--task mrpc] [--records results/glue_minilm] [--packed results/packed_minilm.json]

prints a table and draws docs/figures/bytes.png. The methods' points are the medians of Table 1's records, at the best
epoch, with the bytes of the stored tensors; the packed ones are scored from their files (benchmarks/packed.py: one
run). Bytes are without the head, which is the same in all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

import paper
import table
from experiments import table1
from figures import OUTPUT, RECORDS, ROOT, STYLE, Point, draw_scores, save
from hyperparameters import METHODS, MODELS
from vblora.storage.files import read_json
from vblora.training import commands, tables

PACKED = ROOT / "results" / "packed_minilm.json"


class Size(NamedTuple):
    """One way to store an adapter; the score and its deviation over seeds in percent."""

    name: str
    bytes: int
    score: float
    deviation: float | None
    seeds: int


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=paper.TASKS, default="mrpc")
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--records", nargs="+", type=Path, default=[RECORDS])
    parser.add_argument("--packed", type=Path, default=PACKED, help="a record of benchmarks/packed.py")
    parser.add_argument("--output", type=Path, default=OUTPUT / "bytes.png")
    options = parser.parse_args(arguments)
    found = table.read(options.records, required=True)
    sizes = of_methods(options.model, options.task, found) + of_files(read_json(options.packed), options.task)
    print(render(sorted(sizes, key=lambda size: -size.bytes)))
    title = f"{table.MODEL_TITLES[options.model]}, {table.TASK_TITLES[options.task]}"
    points = [Point(s.name, s.bytes, s.score, s.deviation, s.name.startswith("VB-LoRA")) for s in sizes]
    with matplotlib.rc_context(STYLE):
        figure = draw_scores({title: points}, "score, best epoch (%)", "bytes of an adapter, without the head")
        save(figure, options.output)
    print(f"\n{options.output}")


def of_methods(model: str, task: str, found: Sequence[dict[str, Any]]) -> list[Size]:
    """The methods of Table 1 that have records."""
    sizes = []
    for method in METHODS:
        trials = table1([model], [method], [task], range(5))
        (cell,) = table.cells(trials, found)
        stored = [r["stored_parameters"]["bytes"] for trial in trials for r in found if trial.is_of(r)]
        if cell.best is not None:
            sizes.append(Size(table.method_title(method), stored[0], cell.best, cell.best_sd, cell.seeds))
    return sizes


def of_files(record: dict[str, Any], task: str) -> list[Size]:
    """The packed files of the task's runs, by what they hold.

    Raises:
        ValueError: the record has no run of the task.
    """
    sizes = []
    for run in record["adapters"].values():
        if run.get("task") != task:
            continue
        for row in run["rows"]:
            bits = "" if row["weights"] == "lossless" else f", weights {row['weights']} bits"
            what = row["bank"] if row["bank"] == "lossless" else f"{row['bank']} bank{bits}"
            sizes.append(Size(f"VB-LoRA packed, {what}", row["bytes_without_heads"], 100 * row["score"], None, 1))
    if not sizes:
        raise ValueError(f"no packed run of {task}; benchmarks/packed.py RUN --record FILE makes them")
    return sizes


def render(sizes: Sequence[Size]) -> str:
    rows = [[s.name, f"{s.bytes:,}", f"{tables.number(s.score, s.deviation)} ({s.seeds})"] for s in sizes]
    return tables.render(["method", "bytes", "score (seeds)"], rows, "markdown")


if __name__ == "__main__":
    commands.run(main, "sizes")
