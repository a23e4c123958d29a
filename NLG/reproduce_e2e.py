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
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import e2e_paper
from e2e_data import SETS
from e2e_rows import METHODS, ROWS, row
from vblora.io import replacing
from vblora.models import RECORD_FILE
from vblora_experiments import campaign, commands, runs, tables
from vblora_experiments.rows import check_names
from vblora_experiments.runs import real_flags

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"medium": "gpt2_medium", "large": "gpt2_large", "smollm2": "smollm2_135m"}
PAPER_SIZES = ("medium", "large")
SEEDS = (0, 1, 2)
TITLES = {"full": "full fine-tuning", "lora": "LoRA", "vera": "VeRA", "vblora": "VB-LoRA"}
MODEL_TITLES = {"gpt2_medium": "GPT-2 Medium", "gpt2_large": "GPT-2 Large", "smollm2_135m": "SmolLM2-135M"}
# What a score is multiplied by for the table, and its digits there.
SHOWN = {"BLEU": (100, 1), "NIST": (1, 2), "METEOR": (100, 1), "ROUGE_L": (100, 1), "CIDEr": (1, 2)}


@dataclass(frozen=True)
class Trial(runs.Trial):
    """A row MODEL/METHOD for one seed."""

    def row_flags(self) -> dict[str, Any]:
        return row(self.row)


class E2E(campaign.RowCampaign):
    """Table 2."""

    description = str(__doc__)
    rows = ROWS
    script = ROOT / "NLG" / "run_e2e.py"
    passed_on = ("data_dir",)
    runs = ROOT / "runs" / "e2e"
    kind = "e2e"
    own_flags = campaign.Campaign.own_flags | {"dataset"}

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("experiment", choices=["table2"])
        parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(PAPER_SIZES), help="medium large")
        parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"{' '.join(METHODS)} unless given")
        parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="0 1 2 unless given")
        parser.add_argument("--data_dir", type=Path, help="folder with the challenge's CSV files, not the hub")

    def plan(self, options: argparse.Namespace, extra: Mapping[str, str]) -> list[Trial]:
        check_names("method", options.methods, list(METHODS))
        return [
            Trial(f"{SIZES[size]}/{method}", seed=seed, extra=real_flags(extra))
            for seed in options.seeds
            for size in options.sizes
            for method in options.methods
        ]

    def check_places(self, trials: Sequence[Trial], options: argparse.Namespace) -> None:
        for names in SETS["e2e"].files.values() if trials and options.data_dir else ():
            if not any((options.data_dir / name).is_file() for name in names):
                raise ValueError(f"--data_dir {options.data_dir} has no {' or '.join(names)}")
        super().check_places(trials, options)

    def check_flags(self, command: list[str]) -> None:
        import run_e2e  # takes seconds, as transformers does
        import train

        train.parse(run_e2e.parse(command)[2])

    def estimate(self, trial: Trial, found: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
        minutes, source = super().estimate(trial, found)
        if minutes is None and (trial.model, trial.method) in e2e_paper.TABLE_2:
            epochs = float(trial.overrides.get("num_train_epochs", row(trial.row)["num_train_epochs"]))
            return e2e_paper.MINUTES * epochs / e2e_paper.EPOCHS, "paper: VB-LoRA on an A100"
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
        if options.format == "csv":
            return tables.as_csv(CSV_HEADER, [_csv_row(name, group) for name, group in groups.items()])
        lines = [line for name, group in groups.items() for line in _lines(name, group)]
        header = ["model", "method", "# params", "", *(name.replace("_", "-") for name in SHOWN)]
        return tables.render(header, lines, options.format, campaign.note_of(extra))

    def keep(self, trial: Trial, record_file: Path, folder: Path) -> None:
        """The texts, so that anybody can score them again."""
        texts = record_file.parent / "test.txt"
        if record_file.name != RECORD_FILE:  # collected before
            texts = record_file.parent / "texts" / f"{trial.name}.txt"
        kept = folder / "texts" / f"{trial.name}.txt"
        if texts.exists() and texts != kept:
            with replacing(kept) as temporary:
                shutil.copyfile(texts, temporary)


def _scores(group: Sequence[dict[str, Any]], name: str) -> list[float]:
    """One score of all seeds, as the table shows it; none where one of them lacks it."""
    values = [record["scores"][name] for record in group]
    return [] if None in values else [SHOWN[name][0] * value for value in values]


def _lines(name: str, group: Sequence[dict[str, Any]]) -> tables.Lines:
    """A row's lines: its means over the seeds and deviations; the paper's, and the differences, where it has any."""
    model, method = name.split("/")
    own = [_scores(group, score) for score in SHOWN]
    digits = [digits for _, digits in SHOWN.values()]
    means = [mean(values) if values else None for values in own]
    deviations = [stdev(values) if len(values) > 1 else None for values in own]
    count = tables.count(group[0]["stored_parameters"]["parameters"])
    lines = [
        [MODEL_TITLES[model], TITLES[method], count, campaign.seeds_of(group)]
        + [tables.number(*values) for values in zip(means, deviations, digits, strict=True)]
    ]
    if printed := e2e_paper.TABLE_2.get((model, method)):
        differences = [None if m is None else m - p for m, p in zip(means, printed, strict=True)]
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
        values += [mean(own) if own else None, stdev(own) if len(own) > 1 else None, of_paper]
    return values


def main(arguments: list[str]) -> None:
    campaign.run(E2E(), arguments)


if __name__ == "__main__":
    commands.run(main, "reproduce")
