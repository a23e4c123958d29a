"""Table 2 of the paper: plan its runs, run those that have no record yet, print it beside the paper's figures.

    ./scripts/reproduce.sh table2                                         # 8 rows, 3 seeds
    ./scripts/reproduce.sh table2 --plan                                  # what would be run, and how long it takes
    ./scripts/reproduce.sh table2 --sizes medium --methods lora vblora --seeds 0
    ./scripts/reproduce.sh table2 --sizes smollm2 --data_dir DIR --models_dir DIR --methods lora vblora --seeds 0

A run trains, decodes the 630 test representations and scores them. Flags after "--" go to every run as they are (such
as -- --bf16 true). Run it again to go on: what has a record is not run again, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import e2e_paper
from e2e_data import SETS
from e2e_rows import ROWS, row
from vblora_experiments import campaign, commands, tables
from vblora_experiments.campaign import Groups, RowTrial
from vblora_experiments.tables import deviation_of, difference, mean_of

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"medium": "gpt2_medium", "large": "gpt2_large", "smollm2": "smollm2_135m"}
PAPER_SIZES = ("medium", "large")
PAPER_METHODS = ("full", "lora", "vera", "vblora")
SEEDS = (0, 1, 2)
TITLES = {"full": "full fine-tuning", "lora": "LoRA", "vera": "VeRA", "recipe": "VB-LoRA, recipe", "vblora": "VB-LoRA"}
MODEL_TITLES = {"gpt2_medium": "GPT-2 Medium", "gpt2_large": "GPT-2 Large", "smollm2_135m": "SmolLM2-135M"}
# What a score is multiplied by for the table, and its digits there.
SHOWN = {"BLEU": (100, 1), "NIST": (1, 2), "METEOR": (100, 1), "ROUGE_L": (100, 1), "CIDEr": (1, 2)}


class E2E(campaign.RowCampaign):
    """Table 2."""

    rows = ROWS
    experiment = "table2"
    models_flag, models = "sizes", SIZES
    chosen = (PAPER_SIZES, PAPER_METHODS, SEEDS)
    script = ROOT / "NLG" / "run_e2e.py"
    passed_on = ("data_dir",)
    runs = ROOT / "runs" / "e2e"
    kind = "e2e"
    own_flags = campaign.Campaign.own_flags | {"dataset"}

    def add_places(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data_dir", type=Path, help="folder with the challenge's CSV files, not the hub")

    def check_places(self, trials: Sequence[RowTrial], options: argparse.Namespace) -> None:
        for names in SETS["e2e"].files.values() if trials and options.data_dir else ():
            if not any((options.data_dir / name).is_file() for name in names):
                raise ValueError(f"--data_dir {options.data_dir} has no {' or '.join(names)}")
        super().check_places(trials, options)

    def estimate(self, trial: RowTrial, found: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
        minutes, source = super().estimate(trial, found)
        if minutes is None and (trial.model, trial.method) in e2e_paper.TABLE_2:
            epochs = float(trial.overrides.get("num_train_epochs", row(trial.row)["num_train_epochs"]))
            return e2e_paper.MINUTES * epochs / e2e_paper.EPOCHS, "paper: VB-LoRA on an A100"
        return minutes, source

    def numbers(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], list[list[Any]]]:
        return CSV_HEADER, [_csv_row(name, group) for name, group in groups.items()]

    def lines(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], tables.Lines, list[str]]:
        header = ["model", "method", "# params", "", *(name.replace("_", "-") for name in SHOWN)]
        return header, [line for name, group in groups.items() for line in _lines(name, group)], []

    def kept(self, trial: RowTrial, run: str) -> dict[str, str]:
        """The texts, so that anybody can score them again."""
        return {"test.txt": f"texts/{trial.name}.txt"}


def _scores(group: Sequence[dict[str, Any]], name: str) -> list[float]:
    """One score of all seeds, as the table shows it; none where one of them lacks it."""
    values = [record["scores"][name] for record in group]
    return [] if None in values else [SHOWN[name][0] * value for value in values]


def _lines(name: str, group: Sequence[dict[str, Any]]) -> tables.Lines:
    """A row's lines: its means over the seeds and deviations; the paper's, and the differences, where it has any."""
    model, method = name.split("/")
    own = [_scores(group, score) for score in SHOWN]
    digits = [digits for _, digits in SHOWN.values()]
    means = [mean_of(values) for values in own]
    deviations = [deviation_of(values) for values in own]
    count = tables.count(group[0]["stored_parameters"]["parameters"])
    lines = [
        [MODEL_TITLES[model], TITLES[method], count, campaign.seeds_of(group)]
        + [tables.number(*values) for values in zip(means, deviations, digits, strict=True)]
    ]
    if printed := e2e_paper.TABLE_2.get((model, method)):
        differences = [difference(*pair) for pair in zip(means, printed, strict=True)]
        lines += [
            ["", "", f"{e2e_paper.PARAMETERS[model, method]:g}M", "paper"]
            + [f"{value:.{places}f}" for value, places in zip(printed, digits, strict=True)],
            ["", "", "", "difference", *(tables.signed(*pair) for pair in zip(differences, digits, strict=True))],
        ]
    return lines


CSV_HEADER = [
    "model",
    "method",
    "parameters",
    "seeds",
    *(f"{name}{ending}" for name in SHOWN for ending in ("", "_sd", "_paper")),
]


def _csv_row(name: str, group: Sequence[dict[str, Any]]) -> list[Any]:
    model, method = name.split("/")
    printed = e2e_paper.TABLE_2.get((model, method), (None,) * len(SHOWN))
    values: list[Any] = [model, method, group[0]["stored_parameters"]["parameters"], len(group)]
    for score, of_paper in zip(SHOWN, printed, strict=True):
        own = _scores(group, score)
        values += [mean_of(own), deviation_of(own), of_paper]
    return values


def main(arguments: list[str]) -> None:
    campaign.run(E2E(), arguments)


if __name__ == "__main__":
    commands.run(main, "reproduce")
