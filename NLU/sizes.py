"""What an adapter's bytes buy: score against bytes, for every method and for VB-LoRA's smaller files.

    python NLU/sizes.py [--task mrpc] [--records results/glue_minilm] [--packed results/packed_minilm.json]

prints a table and draws docs/figures/bytes.png. The methods' points are the medians of Table 1's records, at the best
epoch, with the bytes of the stored tensors. Files, packed and PEFT's, are those of one run (benchmarks/packed.py),
with names, settings and checksums, and scored from what is in them. Bytes are without the head, which is the same in
all of them, and those on a shared bank without the bank, which is there once for all.
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
from vblora.io import read_json
from vblora_experiments import commands, tables

PACKED = ROOT / "results" / "packed_minilm.json"
# What of the packed settings is drawn, by bank and weights: all of them would lie over each other.
LABELS: dict[tuple[str, str | int], str] = {
    ("lossless", "lossless"): "packed, lossless",
    ("int8", 8): "packed, int8",
    ("shared", 8): "packed, shared bank",
}


class Size(NamedTuple):
    """One way to store an adapter; the score and its deviation over seeds in percent. Without a label: not drawn."""

    name: str
    bytes: int
    score: float
    deviation: float | None
    seeds: int
    label: str


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=paper.TASKS, default="mrpc")
    parser.add_argument("--model", choices=MODELS, default="minilm")
    parser.add_argument("--records", nargs="+", type=Path, default=[RECORDS])
    parser.add_argument("--packed", type=Path, default=PACKED, help="a record of benchmarks/packed.py")
    parser.add_argument("--output", type=Path, default=OUTPUT / "bytes.png")
    parser.add_argument("--no_picture", action="store_true", help="the table alone")
    parser.add_argument("--short", action="store_true", help="a table of what the picture shows, no picture")
    options = parser.parse_args(arguments)
    found = table.read(options.records, required=True)
    sizes = of_methods(options.model, options.task, found) + of_files(read_json(options.packed), options.task)
    shown = [size for size in sizes if size.label or not options.short]
    print(render(sorted(shown, key=lambda size: -size.bytes)))
    if options.no_picture or options.short:
        return
    title = f"{table.MODEL_TITLES[options.model]}, {table.TASK_TITLES[options.task]}"
    points = [Point(s.label, s.bytes, s.score, s.deviation, s.name.startswith("VB-LoRA")) for s in sizes if s.label]
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
            name = table.method_title(method)
            sizes.append(Size(name, stored[0], cell.best, cell.best_sd, cell.seeds, name))
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
        if not any(row["bank"] == "shared" for row in run["rows"]):
            name = "VB-LoRA, top-k file of PEFT"
            sizes.append(Size(name, run["peft_bytes_without_heads"], 100 * run["trained_score"], None, 1, ""))
        for row in run["rows"]:
            if row["heads"] == "int8":  # without the head it is the file before
                continue
            bits = "" if row["weights"] == "lossless" else f", weights {row['weights']} bits"
            what = row["bank"] if row["bank"] == "lossless" else f"{row['bank']} bank{bits}"
            label = LABELS.get((row["bank"], row["weights"]), "")
            name = f"VB-LoRA packed, {what}"
            sizes.append(Size(name, row["bytes_without_heads"], 100 * row["score"], None, 1, label))
    if not sizes:
        raise ValueError(f"no packed run of {task}; benchmarks/packed.py RUN --record FILE makes them")
    return sizes


def render(sizes: Sequence[Size]) -> str:
    rows = [[s.name, f"{s.bytes:,}", f"{tables.number(s.score, s.deviation)} ({s.seeds})"] for s in sizes]
    return tables.render(["method", "bytes", "score (seeds)"], rows, "markdown")


if __name__ == "__main__":
    commands.run(main, "sizes")
