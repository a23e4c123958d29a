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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import instruct_paper
from instruct_rows import MODELS, ROWS
from vblora_experiments import campaign, commands, tables
from vblora_experiments.campaign import Groups, RowTrial
from vblora_experiments.tables import deviation_of, difference, mean_of

ROOT = Path(__file__).resolve().parents[1]
PAPER_MODELS = ("llama2_7b", "llama2_13b")
PAPER_METHODS = ("lora", "vera", "vblora")
TITLES = {"lora": "LoRA", "vera": "VeRA", "lora_xs": "LoRA-XS", "recipe": "VB-LoRA, recipe", "vblora": "VB-LoRA"}
MODEL_TITLES = {"llama2_7b": "Llama2-7B", "llama2_13b": "Llama2-13B", "smollm2_135m": "SmolLM2-135M"}


class Instructions(campaign.RowCampaign):
    """Table 3."""

    rows = ROWS
    experiment = "table3"
    models = campaign.by_own_names(MODELS)
    chosen = (PAPER_MODELS, PAPER_METHODS, [0])
    script = ROOT / "instruction_tuning" / "run_instruct.py"
    passed_on = ("data", "bench_dir", "judge")
    files = ("data",)
    runs = ROOT / "runs" / "instruct"
    kind = "instruct"
    filters = ("models", "methods", "seeds")
    folders = ("models_dir", "bench_dir")
    own_flags = campaign.Campaign.own_flags | {"data", "data_format", "judge", "bench_dir"}

    def add_places(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", help="a file in Alpaca's form, not the hub")
        parser.add_argument("--bench_dir", type=Path, help="folder with MT-Bench's files; downloaded once unless given")
        parser.add_argument("--judge", default="", help="the judging model's name at the endpoint, such as gpt-4")

    def scores(self, options: argparse.Namespace) -> tuple[str, ...]:
        return (options.judge,) if options.judge else ()

    def estimate(self, trial: RowTrial, found: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
        minutes, source = super().estimate(trial, found)
        if minutes is None and (trial.model, trial.method) in instruct_paper.MINUTES:
            return instruct_paper.MINUTES[trial.model, trial.method], "paper: the training, on an A100"
        return minutes, source

    def numbers(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], list[list[Any]]]:
        judges = {name: _judges(group, options.judge) for name, group in groups.items()}
        return HEADER, [_row(name, group, judge) for name, group in groups.items() for judge in judges[name]]

    def lines(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], tables.Lines, list[str]]:
        _, rows = self.numbers(groups, options)
        lines = [[tables.number(v, digits=2) if v is None or isinstance(v, float) else str(v) for v in r] for r in rows]
        return HEADER, lines, ["Turn 1 is the paper's score; sound: without wrong reference answers."]

    def kept(self, trial: RowTrial, run: str) -> dict[str, str]:
        """The answers, so that anybody can have them judged."""
        return {f"mt_bench/model_answer/{run}.jsonl": f"answers/{trial.name}.jsonl"}


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
    ends = [mean_of([loss[at]["loss"] for loss in losses if loss]) for at in (0, -1)]
    judged = [record["scores"][judge] for record in group] if judge else []
    ratings = {turn: [s[turn] for s in judged if s[turn] is not None] for turn in ("turn1", "turn1_sound", "turn2")}
    first, printed = mean_of(ratings["turn1"]), instruct_paper.TABLE_3.get((model, method))
    deviation = deviation_of(ratings["turn1"])
    parameters = tables.count(group[0]["stored_parameters"]["parameters"])
    names = [MODEL_TITLES[model], TITLES[method], parameters, len(group), *ends, judge or "nobody yet"]
    return [
        *names,
        first,
        deviation,
        mean_of(ratings["turn1_sound"]),
        mean_of(ratings["turn2"]),
        printed,
        difference(first, printed),
    ]


def main(arguments: list[str]) -> None:
    campaign.run(Instructions(), arguments)


if __name__ == "__main__":
    commands.run(main, "reproduce")
