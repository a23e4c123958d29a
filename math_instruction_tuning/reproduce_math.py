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
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import math_paper
from math_rows import METHODS, MODELS, ROWS, row
from vblora.io import replacing
from vblora.models import RECORD_FILE
from vblora_experiments import campaign, commands, runs, tables
from vblora_experiments.rows import check_names
from vblora_experiments.runs import real_flags

ROOT = Path(__file__).resolve().parents[1]
PAPER_MODELS = ("mistral_7b", "gemma_7b")
PAPER_METHODS = ("full", "lora", "lora_xs", "vblora")
TITLES = {"full": "full fine-tuning", "lora": "LoRA", "vera": "VeRA", "lora_xs": "LoRA-XS", "vblora": "VB-LoRA"}
MODEL_TITLES = {"mistral_7b": "Mistral-7B", "gemma_7b": "Gemma-7B", "smollm2_135m": "SmolLM2-135M"}
RULES = ("authors", "corrected")


@dataclass(frozen=True)
class Trial(runs.Trial):
    """A row MODEL/METHOD for one seed, scored on some sets."""

    def row_flags(self) -> dict[str, Any]:
        return row(self.row)


class Mathematics(campaign.RowCampaign):
    """Table 4."""

    description = str(__doc__)
    rows = ROWS
    script = ROOT / "math_instruction_tuning" / "run_math.py"
    passed_on = ("data", "gsm8k", "math")
    runs = ROOT / "runs" / "math"
    kind = "math"
    filters = ("models", "methods", "seeds")
    folders = ("models_dir",)
    own_flags = campaign.Campaign.own_flags | {"data", "gsm8k", "math", "form"}

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("experiment", choices=["table4"])
        parser.add_argument("--models", nargs="+", choices=MODELS, default=list(PAPER_MODELS))
        parser.add_argument("--methods", nargs="+", default=list(PAPER_METHODS), help=f"of {' '.join(METHODS)}")
        parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="0 unless given")
        parser.add_argument("--data", help="a file of the problems to train on, not the hub")
        parser.add_argument("--gsm8k", help="a file with GSM8K's test problems, not the hub; or none")
        parser.add_argument("--math", help="a file with MATH's test problems, not the hub; or none")

    def plan(self, options: argparse.Namespace, extra: Mapping[str, str]) -> list[Trial]:
        check_names("method", options.methods, list(METHODS))
        sets = tuple(name for name in math_paper.SETS if getattr(options, name) != "none")
        return [
            Trial(f"{model}/{method}", seed=seed, extra=real_flags(extra), scores=sets)
            for seed in options.seeds
            for model in options.models
            for method in options.methods
        ]

    def check_places(self, trials: Sequence[Trial], options: argparse.Namespace) -> None:
        for flag in ("data", "gsm8k", "math") if trials else ():
            place = getattr(options, flag)
            if place not in (None, "none") and not Path(place).is_file():
                raise ValueError(f"--{flag} {place}: no such file")
        super().check_places(trials, options)

    def check_flags(self, command: list[str]) -> None:
        import finetune_math
        import run_math  # takes seconds, as transformers does
        from vblora_experiments import instruct

        own, rest = run_math.parse(command)
        instruct.parse(rest, finetune_math.FOLDER)
        run_math.check_sets(own)

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
        if options.format == "csv":
            return tables.as_csv(CSV_HEADER, [_csv_row(name, group) for name, group in groups.items()])
        lines = [line for name, group in groups.items() for line in _lines(name, group)]
        return tables.render(HEADER, lines, options.format, campaign.note_of(extra))

    def keep(self, trial: Trial, record_file: Path, folder: Path) -> None:
        """The answers, so that anybody can score them again."""
        for name in math_paper.SETS:
            answers = record_file.parent / f"{name}.jsonl"
            if record_file.name != RECORD_FILE:  # collected before
                answers = record_file.parent / "answers" / f"{trial.name}_{name}.jsonl"
            kept = folder / "answers" / f"{trial.name}_{name}.jsonl"
            if answers.exists() and answers != kept:
                with replacing(kept) as temporary:
                    shutil.copyfile(answers, temporary)


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
    means = [mean(values) if values else None for values in own]
    deviations = [stdev(values) if len(values) > 1 else None for values in own]
    count = tables.count(group[0]["stored_parameters"]["parameters"])
    unparsed = [_unparsed(group, one) for one in math_paper.SETS]
    lines = [
        [MODEL_TITLES[model], TITLES[method], count, campaign.seeds_of(group)]
        + [tables.number(*values, digits=2) for values in zip(means, deviations, strict=True)]
        + [", ".join(one for one in unparsed if one)]
    ]
    if printed := math_paper.TABLE_4.get((model, method)):
        differences = [None if m is None else m - p for m, p in zip(means, printed, strict=False)]
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
    values = [mean(one) if one else None for one in own]
    printed = math_paper.TABLE_4.get((model, method), (None, None))
    return [model, method, group[0]["stored_parameters"]["parameters"], len(group), *values, *printed]


def main(arguments: list[str]) -> None:
    campaign.run(Mathematics(), arguments)


if __name__ == "__main__":
    commands.run(main, "reproduce")
