"""Table 3 of the paper: plan its runs, run those that have no record yet, print it beside the paper's figures.

    ./scripts/reproduce.sh table3                                         # trains and answers; nobody judges yet
    OPENAI_API_KEY=... ./scripts/reproduce.sh table3 --judge gpt-4        # judges too, which costs money
    ./scripts/reproduce.sh table3 --plan                                  # what would be run, and how long it takes
    ./scripts/reproduce.sh table3 --models smollm2_135m --methods lora vblora --models_dir DIR --data FILE.json

A run trains, answers MT-Bench's 80 questions and, with --judge, has the answers judged through the endpoint of
OPENAI_BASE_URL. Flags after "--" go to every run as they are. Run it again to go on: what has a record is not run
again, what was interrupted goes on, and --judge adds scores to records without.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import instruct_paper
from instruct_rows import METHODS, MODELS, ROWS, row
from vblora.io import replacing
from vblora.models import RECORD_FILE
from vblora_experiments import campaign, commands, runs, tables
from vblora_experiments.rows import check_names
from vblora_experiments.runs import real_flags

ROOT = Path(__file__).resolve().parents[1]
PAPER_MODELS = ("llama2_7b", "llama2_13b")
PAPER_METHODS = ("lora", "vera", "vblora")
TITLES = {"lora": "LoRA", "vera": "VeRA", "lora_xs": "LoRA-XS", "vblora": "VB-LoRA"}
MODEL_TITLES = {"llama2_7b": "Llama2-7B", "llama2_13b": "Llama2-13B", "smollm2_135m": "SmolLM2-135M"}


@dataclass(frozen=True)
class Trial(runs.Trial):
    """A row MODEL/METHOD for one seed, judged by somebody or not yet."""

    def row_flags(self) -> dict[str, Any]:
        return row(self.row)


class Instructions(campaign.RowCampaign):
    """Table 3."""

    description = str(__doc__)
    rows = ROWS
    script = ROOT / "instruction_tuning" / "run_instruct.py"
    passed_on = ("data", "bench_dir", "judge")
    runs = ROOT / "runs" / "instruct"
    kind = "instruct"
    filters = ("models", "methods", "seeds")
    folders = ("models_dir", "bench_dir")
    own_flags = campaign.Campaign.own_flags | {"data", "form", "judge", "bench_dir"}

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("experiment", choices=["table3"])
        parser.add_argument("--models", nargs="+", choices=MODELS, default=list(PAPER_MODELS))
        parser.add_argument("--methods", nargs="+", default=list(PAPER_METHODS), help=f"of {' '.join(METHODS)}")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="0 unless given")
        parser.add_argument("--data", help="a file in Alpaca's form, not the hub")
        parser.add_argument("--bench_dir", type=Path, help="folder with MT-Bench's files; downloaded once unless given")
        parser.add_argument("--judge", default="", help="the judging model's name at the endpoint, such as gpt-4")

    def plan(self, options: argparse.Namespace, extra: Mapping[str, str]) -> list[Trial]:
        check_names("method", options.methods, list(METHODS))
        judges = (options.judge,) if options.judge else ()
        return [
            Trial(f"{model}/{method}", seed=seed, extra=real_flags(extra), scores=judges)
            for seed in options.seeds
            for model in options.models
            for method in options.methods
        ]

    def check_places(self, trials: Sequence[Trial], options: argparse.Namespace) -> None:
        if trials and options.data and not Path(options.data).is_file():
            raise ValueError(f"--data {options.data}: no such file")
        super().check_places(trials, options)

    def check_flags(self, command: list[str]) -> None:
        import finetune
        import run_instruct  # takes seconds, as transformers does
        from vblora_experiments import instruct

        instruct.parse(run_instruct.parse(command)[1], finetune.FOLDER)

    def estimate(self, trial: Trial, found: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
        minutes, source = super().estimate(trial, found)
        if minutes is None and (trial.model, trial.method) in instruct_paper.MINUTES:
            return instruct_paper.MINUTES[trial.model, trial.method], "paper: the training, on an A100"
        return minutes, source

    def table(
        self,
        trials: Sequence[Trial],
        found: Sequence[dict[str, Any]],
        options: argparse.Namespace,
        extra: Mapping[str, str],
    ) -> str | None:
        groups = campaign.records_of(trials, found)
        if not groups:
            return None
        rows = [_row(name, group, judge) for name, group in groups.items() for judge in _judges(group, options.judge)]
        if options.format == "csv":
            return tables.as_csv(HEADER, rows)
        lines = [[tables.number(v, digits=2) if v is None or isinstance(v, float) else str(v) for v in r] for r in rows]
        notes = [*campaign.note_of(extra), "Turn 1 is the paper's score; sound: without wrong reference answers."]
        return tables.render(HEADER, lines, options.format, notes)

    def keep(self, trial: Trial, record_file: Path, folder: Path) -> None:
        """The answers, so that anybody can have them judged."""
        answers = record_file.parent / "mt_bench" / "model_answer" / f"{record_file.parent.name}.jsonl"
        if record_file.name != RECORD_FILE:  # collected before
            answers = record_file.parent / "answers" / f"{trial.name}.jsonl"
        kept = folder / "answers" / f"{trial.name}.jsonl"
        if answers.exists() and answers != kept:
            with replacing(kept) as temporary:
                shutil.copyfile(answers, temporary)


def _judges(group: Sequence[dict[str, Any]], wanted: str) -> list[str]:
    """Whose scores are shown: the judge's asked for, else of everybody who judged all seeds, else of nobody."""
    common = set.intersection(*(set(record["scores"]) for record in group))
    return [wanted] if wanted else sorted(common) or [""]


HEADER = (
    *("model", "method", "# params", "seeds", "loss before", "loss after"),
    *("judge", "turn 1", "sd", "sound", "turn 2", "paper", "difference"),
)


def _row(name: str, group: Sequence[dict[str, Any]], judge: str) -> list[Any]:
    """A row's means over the seeds: the held-out loss, the judge's ratings, and the paper's beside them."""
    model, method = name.split("/")
    losses = [record["held_out_losses"] for record in group]
    ends = [_mean([loss[at]["loss"] for loss in losses if loss]) for at in (0, -1)]
    judged = [record["scores"][judge] for record in group] if judge else []
    ratings = {turn: [s[turn] for s in judged if s[turn] is not None] for turn in ("turn1", "turn1_sound", "turn2")}
    first, printed = _mean(ratings["turn1"]), instruct_paper.TABLE_3.get((model, method))
    deviation = stdev(ratings["turn1"]) if len(ratings["turn1"]) > 1 else None
    difference = None if first is None or printed is None else first - printed
    parameters = tables.count(group[0]["stored_parameters"]["parameters"])
    names = [MODEL_TITLES[model], TITLES[method], parameters, len(group), *ends, judge or "nobody yet"]
    return [*names, first, deviation, _mean(ratings["turn1_sound"]), _mean(ratings["turn2"]), printed, difference]


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def main(arguments: list[str]) -> None:
    campaign.run(Instructions(), arguments)


if __name__ == "__main__":
    commands.run(main, "reproduce")
