"""The speech table: plan its runs, run those that have no record yet, print it.

    ./scripts/reproduce.sh asr --data_dir DIR --models_dir DIR             # tiny.en to Italian and Russian
    ./scripts/reproduce.sh asr --sizes large_v2_fleurs --plan              # what FLEURS takes with large-v2
    ./scripts/reproduce.sh asr --sizes base --languages it --methods recipe --seeds 0 --data_dir DIR --models_dir DIR
    ./scripts/reproduce.sh asr --methods lora recipe --targets decoder encoder both cross --data_dir DIR ...

--data_dir holds a folder for each language (it, ru; of FLEURS it_it and so on), each with train.tsv, dev.tsv and
test.tsv. The model as it is (zero_shot) is always a row, at the row's window and at the whole one of 30 seconds. A run
trains, transcribes and scores. --targets asks for a row for each of these sets of layers; all runs of a size see
equally many clips. Flags after "--" go to every run as they are (such as -- --window 6), those of training
(-- --rank 2, -- --learning_rate 1e-3) to every run that trains; the whole window's row keeps its own. Run it again to
go on: what has a record is not run again, what was interrupted goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import asr_secondary
from asr_rows import LANGUAGES, METHODS, MODELS, OF_TRAINING, ROWS, row
from vblora_experiments import campaign, commands, schedule, tables
from vblora_experiments.arguments import MethodArguments
from vblora_experiments.campaign import Groups
from vblora_experiments.rows import check_names
from vblora_experiments.runs import NEUTRAL, real_flags
from vblora_experiments.runs import Trial as AnyTrial
from vblora_experiments.whisper_counts import TARGETS

ROOT = Path(__file__).resolve().parents[1]
ZERO_SHOT, WHOLE_WINDOW = "zero_shot", 30
SEEDS = (0, 1, 2)
TITLES = {
    "zero_shot": "zero-shot",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "vera": "VeRA",
    "lora_xs": "LoRA-XS",
    "vblora": "VB-LoRA, the paper's settings",
    "recipe": "VB-LoRA, recipe",
    "recipe_small": "VB-LoRA, recipe, a twentieth",
}
MODEL_TITLES = {
    "tiny_en": "tiny.en",
    "base": "base",
    "large_v2_fleurs": "large-v2, FLEURS",
    "large_v2_common_voice": "large-v2, Common Voice",
}
TARGET_TITLES = {"cross": "cross-attention", "both": "both sides"}
# The rates of the table: which part, under which normaliser, words or characters.
SHOWN = {
    "WER": ("test", "unicode", "wer"),
    "CER": ("test", "unicode", "cer"),
    "WER as written": ("test", "raw", "wer"),
    "dev WER": ("dev", "unicode", "wer"),
}


@dataclass(frozen=True)
class Trial(AnyTrial):
    """A row MODEL/METHOD for one language and one seed; the variant is the language, and another window or layers."""

    def row_flags(self) -> dict[str, Any]:
        return row(self.row)

    @property
    def folder(self) -> str:
        """Of the language's tables."""
        return LANGUAGES[self.model][self.changes["language"]].folder


class Speech(campaign.RowCampaign):
    """The table."""

    rows = ROWS
    script = ROOT / "ASR" / "run_asr.py"
    experiment, models_flag, models = "asr", "sizes", campaign.by_own_names(MODELS)
    chosen = (("tiny_en",), list(METHODS), SEEDS)
    passed_on = ()
    runs = ROOT / "runs" / "asr"
    kind = "asr"
    filters = ("sizes", "methods", "seeds", "languages", "targets")
    own_flags = campaign.Campaign.own_flags | {"language", "language_token", "targets"}

    def add_places(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--languages", nargs="+", help="codes; all that the size has unless given")
        parser.add_argument("--targets", nargs="+", choices=TARGETS, help="layers to adapt; the row's unless given")
        parser.add_argument("--data_dir", type=Path, help="folder with a folder of tables for each language")

    def plan(self, options: argparse.Namespace, extra: Mapping[str, str]) -> list[Any]:
        check_names("method", options.methods, list(METHODS))
        known = list(dict.fromkeys(code for size in options.sizes for code in LANGUAGES[size]))
        check_names("language", options.languages or [], known)
        return list(_trials(options, real_flags(extra)))

    def check_places(self, trials: Sequence[Any], options: argparse.Namespace) -> None:
        if trials and not options.plan and options.data_dir is None:
            raise ValueError("--data_dir is needed: a folder with a folder of tables for each language (--help)")
        for trial in trials if options.data_dir else ():
            if not (table := options.data_dir / trial.folder / "test.tsv").is_file():
                raise ValueError(f"--data_dir {options.data_dir} has no {trial.folder}/{table.name}")
        super().check_places(trials, options)

    def estimate(self, trial: Any, found: Sequence[dict[str, Any]]) -> tuple[float | None, str]:
        targets = {**trial.row_flags(), **trial.changes}["targets"]
        return super().estimate(trial, [record for record in found if record["settings"]["targets"] == targets])

    def job(self, trial: Any, options: argparse.Namespace, extra: Mapping[str, str]) -> schedule.Job:
        job = super().job(trial, options, _taken(trial.row, extra, trial.changes))
        job.command += ["--data_dir", str((options.data_dir or Path("DATA_DIR")) / trial.folder)]  # a plan needs none
        job.command += [part for flag, value in trial.changes.items() for part in (f"--{flag}", value)]
        return job

    def grouped(self, trials: Sequence[Any], found: Sequence[dict[str, Any]]) -> Groups:
        return grouped(trials, found)

    def numbers(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], list[list[Any]]]:
        return CSV_HEADER, [_csv_row(name, group) for name, group in groups.items()]

    def lines(self, groups: Groups, options: argparse.Namespace) -> tuple[Sequence[str], tables.Lines, list[str]]:
        header = ["model", "language", "method", "# params", "", "WER", "95%", *list(SHOWN)[1:], "cut"]
        large = any(size.startswith("large") for size in options.sizes)
        lines = [_line(name, group) for name, group in groups.items()]
        return header, lines, [asr_secondary.NOTE] if large else []

    def kept(self, trial: Any, run: str) -> dict[str, str]:
        """Nothing beside the record: the texts are of others' recordings."""
        return {}


def _trials(options: argparse.Namespace, extra: Mapping[str, str]) -> Iterator[Trial]:
    """The rows of each size and language; zero-shot first, of one seed, as it has no chance in it."""
    methods = list(dict.fromkeys([ZERO_SHOT, *options.methods]))
    for size in options.sizes:
        for code, language in LANGUAGES[size].items():
            if options.languages and code not in options.languages:
                continue
            changes = {name: value for name, value in language.flags(code).items() if name not in extra}
            if int(row(f"{size}/{ZERO_SHOT}").get("window", WHOLE_WINDOW)) < WHOLE_WINDOW:
                whole = {**changes, "window": str(WHOLE_WINDOW)}
                name = f"{size}/{ZERO_SHOT}"
                yield Trial(name, f"{code}_window{WHOLE_WINDOW}", whole, extra=_taken(name, extra, whole))
            for method in methods:
                for mark, layers in _layers(row(f"{size}/{method}"), options.targets or []):
                    for seed in options.seeds if method != ZERO_SHOT else (0,):
                        name = f"{size}/{method}"
                        trial = {**changes, **layers}
                        yield Trial(name, code + mark, trial, seed, _taken(name, extra, trial))


def _taken(row_name: str, extra: Mapping[str, str], changes: Mapping[str, str]) -> Mapping[str, str]:
    """Of the flags for every run those that this trial takes: what trains nothing has no settings of training.

    The trial's own changes go before them: the whole window's row has the whole one whatever --window says.
    """
    extra = {name: value for name, value in extra.items() if name not in changes}
    if not extra or not row_name.endswith(f"/{ZERO_SHOT}"):
        return extra
    from transformers import TrainingArguments  # takes seconds

    of_training = {field.name for kind in (MethodArguments, TrainingArguments) for field in fields(kind)}
    of_training |= set(OF_TRAINING)
    return {name: value for name, value in extra.items() if name not in of_training or name in NEUTRAL}


def _layers(flags: Mapping[str, Any], wanted: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """For each wanted set of layers what the variant's name and its flags have more; nothing for the row's own."""
    if flags["method"] in (ZERO_SHOT, "full") or not wanted:
        return [("", {})]
    return [("", {}) if one == flags["targets"] else (f"_{one}", {"targets": one}) for one in wanted]


def grouped(trials: Sequence[Trial], found: Sequence[dict[str, Any]]) -> Groups:
    """The records of the trials by row and variant, a blank between, in the trials' order.

    Raises:
        ValueError: the records of a row were made on different data, and are not to be averaged.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if (record := next((r for r in found if trial.is_of(r)), None)) is not None:
            groups.setdefault(f"{trial.row} {trial.variant}", []).append(record)
    for name, group in groups.items():
        tested = {record["test"]["data"] for record in group if "data" in record["test"]}  # older records lack it
        if len(tested) > 1 or len({record["settings"]["data_fingerprint"] for record in group}) > 1:
            raise ValueError(f"the records of {name} were made on different data: remove those not meant")
    return groups


def _rates(group: Sequence[dict[str, Any]], name: str, key: str = "percent") -> list[float]:
    part, normaliser, kind = SHOWN[name]
    return [record[part]["rates"][normaliser][kind][key] for record in group]


def _line(name: str, group: Sequence[dict[str, Any]]) -> list[str]:
    """A row's line: means over the seeds and deviations; the interval is the mean of the seeds' own."""
    row_name, variant = name.split()
    (model, method), (language, _, mark) = row_name.split("/"), variant.partition("_")
    title = TITLES[method] + (f", {_in_words(mark)}" if mark else "")
    low, high = (mean(_rates(group, "WER", end)) for end in ("low", "high"))
    shown = [tables.number(mean(v), stdev(v) if len(v) > 1 else None) for v in (_rates(group, n) for n in SHOWN)]
    cut = sum(record["test"]["cut"] for record in group)
    texts = sum(record["test"]["clips"] for record in group)
    count = tables.count(group[0]["stored_parameters"]["parameters"])
    interval = f"{low:.1f} to {high:.1f}"
    first = [MODEL_TITLES[model], language, title, count, campaign.seeds_of(group)]
    return [*first, shown[0], interval, *shown[1:], f"{cut} of {texts}"]


def _in_words(mark: str) -> str:
    """What a variant has other than its row."""
    return f"{mark.removeprefix('window')} s" if mark.startswith("window") else TARGET_TITLES.get(mark, mark)


CSV_HEADER = ["model", "language", "method", "targets", "window", "parameters", "seeds"]
CSV_HEADER += [f"{name}{ending}" for name in SHOWN for ending in ("", "_sd", "_low", "_high")]


def _csv_row(name: str, group: Sequence[dict[str, Any]]) -> list[Any]:
    row_name, variant = name.split()
    (model, method), (language, _, _) = row_name.split("/"), variant.partition("_")
    settings, stored = group[0]["settings"], group[0]["stored_parameters"]["parameters"]
    values: list[Any] = [model, language, method, settings["targets"], settings["window"], stored, len(group)]
    for score in SHOWN:
        own = _rates(group, score)
        values += [mean(own), stdev(own) if len(own) > 1 else None]
        values += [mean(_rates(group, score, end)) for end in ("low", "high")]
    return values


def main(arguments: list[str]) -> None:
    campaign.run(Speech(), arguments)


if __name__ == "__main__":
    commands.run(main, "reproduce")
