"""A whole table of the paper: plan its runs, run those that have no record yet, print it beside the paper's figures.

    ./scripts/reproduce.sh table1                                         # everything: 18 rows, 6 tasks, 5 seeds
    ./scripts/reproduce.sh table1 --sizes large --tasks cola rte --methods vblora_qv lora_qv --seeds 0 1 2
    ./scripts/reproduce.sh table1 --sizes minilm --tasks cola --glue_dir DIR --jobs 2    # without GPU and hub
    ./scripts/reproduce.sh table5 --plan                                  # what would be run, and how long it takes
    ./scripts/reproduce.sh table1 --no_runs --records results/glue_minilm --format latex

Flags after "--" go to every run as they are (such as -- --bf16 true). Run it again to go on: what has a record is not
run again, what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import paper
import table
from experiments import ABLATIONS, EXPERIMENTS, TABLE_1, TABLE_1_MODELS, Trial, ablation, table1
from glue_tasks import TASKS as GLUE_TASKS
from hyperparameters import METHODS, MODELS, TASKS, row
from vblora.io import read_json
from vblora.models import RECORD_FILE
from vblora_experiments import campaign, commands, records, schedule
from vblora_experiments.rows import check_names
from vblora_experiments.runs import is_on, real_flags

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"base": "roberta_base", "large": "roberta_large", "minilm": "minilm"}
SEEDS = (0, 1, 2, 3, 4)


class Glue(campaign.Campaign):
    """Table 1, and the ablations."""

    runs = ROOT / "runs" / "glue"
    kind = "glue"
    script = ROOT / "NLU" / "run_glue.py"
    filters = ("sizes", "tasks", "methods", "variants", "seeds")
    folders = ("glue_dir", "models_dir")
    own_flags = campaign.Campaign.own_flags | {"task", "start_from", "bank_from", "form"}

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("experiment", choices=EXPERIMENTS, help="table2, table3 and table4 are other folders'")
        parser.add_argument("--sizes", nargs="+", choices=SIZES, help="models; the paper's unless given")
        parser.add_argument("--tasks", nargs="+", help="GLUE tasks; the paper's unless given")
        parser.add_argument("--methods", nargs="+", help=f"of table1: {', '.join(METHODS)}; all unless given")
        parser.add_argument("--variants", nargs="+", help="of an ablation; all unless given")
        parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="0 1 2 3 4 unless given")
        parser.add_argument("--mnli_start", action="store_true", help="table1: start MRPC, RTE and STS-B from MNLI")
        parser.add_argument("--glue_dir", type=Path, help="folder with GLUE's folders (CoLA, MRPC...), not the hub")

    def title(self, options: argparse.Namespace) -> str:
        return ABLATIONS[options.experiment].title if options.experiment in ABLATIONS else ""

    def plan(self, options: argparse.Namespace, extra: Mapping[str, str]) -> list[Trial]:
        name = options.experiment
        for flag, is_for_table1 in (("methods", True), ("mnli_start", True), ("variants", False)):
            if getattr(options, flag) and (name == TABLE_1) != is_for_table1:
                raise ValueError(f"--{flag} is {'for table1 only' if is_for_table1 else 'not for table1'}")
        check_names("task", options.tasks or [], TASKS[:-1])
        models = [SIZES[size] for size in options.sizes or []]
        if name == TABLE_1:
            check_names("method", options.methods or [], list(METHODS))
            models = models or list(TABLE_1_MODELS)
            methods, tasks = options.methods or list(METHODS), options.tasks or list(paper.TASKS)
            trials = table1(models, methods, tasks, options.seeds, options.mnli_start)
        else:
            study = ABLATIONS[name]
            models, tasks = models or [study.model], options.tasks or [study.task]
            trials = ablation(name, models, tasks, options.variants, options.seeds)
        if any(trial.bank_of for trial in trials) and is_on(extra.get("recipe")) and extra.get("topk", "1") == "1":
            raise ValueError("--recipe selects one vector, which leaves nothing to train on a given bank: --topk 2")
        return [dataclasses.replace(trial, extra=real_flags(extra)) for trial in trials]

    def starts(self, trials: Sequence[Trial], options: argparse.Namespace) -> tuple[list[Trial], list[Trial]]:
        found = [start for trial in trials if (start := trial.start()) is not None]
        starts = list({start.name: start for start in found}.values())
        # A start counts as done where its adapter is: its record alone is no use.
        return starts, [s for s in starts if not _has_adapter(s, options.runs)]

    def check_places(self, trials: Sequence[Trial], options: argparse.Namespace) -> None:
        for trial in trials:
            if options.glue_dir and not (options.glue_dir / GLUE_TASKS[trial.task].folder).is_dir():
                raise ValueError(f"--glue_dir {options.glue_dir} has no folder {GLUE_TASKS[trial.task].folder}")
            name = MODELS[trial.model].name_or_path
            if options.models_dir and trial.model != "minilm" and not (options.models_dir / name).is_dir():
                raise ValueError(f"--models_dir {options.models_dir} has no folder {name}")

    def estimate(self, trial: Trial, found: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
        of_row = [r for r in found if r.get("row") == trial.row]
        alike = of_row or [r for r in found if (r.get("row") or "").startswith(f"{trial.model}/{trial.task}/")]
        given = trial.overrides.get("num_train_epochs", row(trial.row)["num_train_epochs"])
        epochs = _number("num_train_epochs", given)
        if alike:
            per_epoch = median(r["train_seconds"] / r["scores"]["last"]["epoch"] for r in alike) / 60
            return per_epoch * epochs, "from this row's records" if of_row else "from this task's records"
        targets = "all" if trial.method.endswith("all") else "qv"
        printed = paper.minutes(trial.model, targets, trial.task)
        if printed is None:
            return None, ""
        vb_epochs = row(f"{trial.model}/{trial.task}/vblora_{targets}")["num_train_epochs"]
        return printed * epochs / vb_epochs, "paper: VB-LoRA on an A100, padded to the maximum"

    def job(self, trial: Trial, options: argparse.Namespace, extra: Mapping[str, str]) -> schedule.Job:
        command = [sys.executable, str(self.script), "--row", trial.row, "--seed", str(trial.seed)]
        command += ["--output_dir", str(options.runs / trial.name)]
        if options.glue_dir is not None:
            command += ["--data_dir", str(options.glue_dir / GLUE_TASKS[trial.task].folder)]
        if options.models_dir is not None and trial.model != "minilm":
            command += ["--model_name_or_path", str(options.models_dir / MODELS[trial.model].name_or_path)]
        for flag, value in {**extra, **trial.changes}.items():
            command += [f"--{flag}", value]
        after = []
        if (start := trial.start()) is not None:
            after = [start.name]
            flag = "--start_from" if trial.from_mnli else "--bank_from"
            command += [flag, str(options.runs / start.name / "best")]
        return schedule.Job(trial.name, command, options.runs / f"{trial.name}.log", after)

    def table(
        self,
        trials: Sequence[Trial],
        found: Sequence[dict[str, Any]],
        options: argparse.Namespace,
        extra: Mapping[str, str],
    ) -> str | None:
        cells = table.cells(trials, found, options.experiment)
        if not any(cell.seeds for cell in cells):
            return None
        return table.render_cells(cells, options.experiment, options.format, extra)

    def kept(self, trial: Trial, run: str) -> dict[str, str]:
        """The selections of seed 0, which the figures are made from."""
        return {records.SELECTIONS_FILE: f"selections/{trial.name}.safetensors"} if trial.seed == 0 else {}


def main(arguments: list[str]) -> None:
    campaign.run(Glue(), arguments)


def _has_adapter(start: Trial, runs: Path) -> bool:
    """Whether the run that others start from is finished, and its adapter is there."""
    record = runs / start.name / RECORD_FILE
    return record.exists() and start.is_of(read_json(record)) and (runs / start.name / "best").is_dir()


def _number(flag: str, value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"--{flag} {value!r} is no number") from None


if __name__ == "__main__":
    commands.run(main, "reproduce")
