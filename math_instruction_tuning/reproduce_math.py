"""Table 4 of the paper: plan its runs, run those that have no record yet, print it beside the paper's figures.

    ./scripts/reproduce.sh table4                                         # 8 rows, one seed, as the paper
    ./scripts/reproduce.sh table4 --plan                                  # what would be run
    ./scripts/reproduce.sh table4 --models gemma_7b --methods vblora lora_xs --models_dir DIR -- --engine vllm
    ./scripts/reproduce.sh table4 --models smollm2_135m --methods lora vblora --models_dir DIR --data FILE \\
        --gsm8k test.jsonl --math none -- --test_samples 100

A run trains, answers the 1,319 problems of GSM8K and the 5,000 of MATH, and scores the answers by two rules: the
authors' published one, which the paper's figures are by, and a corrected one. Flags after "--" go to every run as they
are. Run it again to go on: what has a record is not run again, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import math_paper
from math_rows import MODELS, ROWS
from vblora_experiments import campaign, commands, tables
from vblora_experiments.campaign import Groups, RowTrial
from vblora_experiments.tables import deviation_of, difference, mean_of

ROOT = Path(__file__).resolve().parents[1]
PAPER_MODELS = ("mistral_7b", "gemma_7b")
PAPER_METHODS = ("full", "lora", "lora_xs", "vblora")
TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "vera": "VeRA",
    "lora_xs": "LoRA-XS",
    "recipe": "VB-LoRA, recipe",
    "vblora": "VB-LoRA",
}
MODEL_TITLES = {"mistral_7b": "Mistral-7B", "gemma_7b": "Gemma-7B", "smollm2_135m": "SmolLM2-135M"}
RULES = ("authors", "corrected")


class Mathematics(campaign.RowCampaign):
    """Table 4."""

    rows = ROWS
    experiment = "table4"
    models = campaign.by_own_names(MODELS)
    chosen = (PAPER_MODELS, PAPER_METHODS, [0])
    script = ROOT / "math_instruction_tuning" / "run_math.py"
    passed_on = files = ("data", "gsm8k", "math")
    runs = ROOT / "runs" / "math"
    kind = "math"
    filters = ("models", "methods", "seeds")
    folders = ("models_dir",)
    own_flags = campaign.Campaign.own_flags | {"data", "gsm8k", "math", "data_format"}

    def add_places(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", help="a file of the problems to train on, not the hub")
        parser.add_argument("--gsm8k", help="a file with GSM8K's test problems, not the hub; or none")
        parser.add_argument("--math", help="a file with MATH's test problems, not the hub; or none")

    def scores(self, options: argparse.Namespace) -> tuple[str, ...]:
        return tuple(name for name in math_paper.SETS if getattr(options, name) != "none")

    def numbers(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], list[list[Any]]]:
        return CSV_HEADER, [_csv_row(name, group) for name, group in groups.items()]

    def lines(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], tables.Lines, list[str]]:
        return HEADER, [line for name, group in groups.items() for line in _lines(name, group)], []

    def kept(self, trial: RowTrial, run: str) -> dict[str, str]:
        """The answers, so that anybody can score them again."""
        return {f"{name}.jsonl": f"answers/{trial.name}_{name}.jsonl" for name in math_paper.SETS}


def _accuracies(group: Sequence[dict[str, Any]], name: str, rule: str) -> list[float]:
    """Of one set by one rule, over the seeds; none where one of them has not answered it."""
    values = [record["scores"].get(name) for record in group]
    return [] if None in values else [value["rules"][rule]["accuracy"] for value in values if value]


def _unparsed(group: Sequence[dict[str, Any]], name: str) -> str:
    """Answers without a number or a formula by the corrected rule, of all."""
    found = [record["scores"][name]["rules"]["corrected"] for record in group if name in record["scores"]]
    return f"{sum(one['unparsed'] for one in found)}/{sum(one['of'] for one in found)}" if found else ""


HEADER = ["model", "method", "# params", "", "GSM8K", "MATH", "GSM8K corrected", "MATH corrected", "unparsed"]


def _lines(name: str, group: Sequence[dict[str, Any]]) -> tables.Lines:
    """A row's means over the seeds; the paper's, and the differences, where it has any."""
    model, method = name.split("/")
    own = [_accuracies(group, one, rule) for rule in RULES for one in math_paper.SETS]
    means = [mean_of(values) for values in own]
    deviations = [deviation_of(values) for values in own]
    count = tables.count(group[0]["stored_parameters"]["parameters"])
    unparsed = [_unparsed(group, one) for one in math_paper.SETS]
    lines = [
        [MODEL_TITLES[model], TITLES[method], count, campaign.seeds_of(group)]
        + [tables.number(*values, digits=2) for values in zip(means, deviations, strict=True)]
        + [", ".join(one for one in unparsed if one)]
    ]
    if printed := math_paper.TABLE_4.get((model, method)):
        differences = [difference(*pair) for pair in zip(means, printed, strict=False)]
        count = f"{math_paper.PARAMETERS[model, method]:g}M"
        lines += [
            ["", "", count, "paper", *(tables.number(value, digits=2) for value in printed), "", "", ""],
            ["", "", "", "difference", *(tables.signed(value, 2) for value in differences), "", "", ""],
        ]
    return lines


COLUMNS = [f"{one}_{rule}" for rule in RULES for one in math_paper.SETS]
CSV_HEADER = ["model", "method", "parameters", "seeds", *COLUMNS, *(f"{one}_paper" for one in math_paper.SETS)]


def _csv_row(name: str, group: Sequence[dict[str, Any]]) -> list[Any]:
    model, method = name.split("/")
    own = [_accuracies(group, one, rule) for rule in RULES for one in math_paper.SETS]
    values = [mean_of(one) for one in own]
    printed = math_paper.TABLE_4.get((model, method), (None, None))
    return [model, method, group[0]["stored_parameters"]["parameters"], len(group), *values, *printed]


def main(arguments: list[str]) -> None:
    campaign.run(Mathematics(), arguments)


if __name__ == "__main__":
    commands.run(main, "reproduce")
