"""What the record of a run shows, by its experiment: scores, a curve, and the command that makes it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vblora_experiments.runs import todays
from vblora_experiments.secrets import without_secrets

Record = Mapping[str, Any]
Scores = dict[str, float]
METRICS = {"matthews_correlation": "Matthews", "accuracy": "accuracy", "pearson": "Pearson"}
E2E = {"BLEU": 100, "NIST": 1, "METEOR": 100, "ROUGE_L": 100, "CIDEr": 1}  # what each is multiplied by
MATHEMATICS = {"gsm8k": "GSM8K", "math": "MATH"}
RULES = {"authors": "", "corrected": ", corrected rule"}
RATES = {"WER": ("test", "unicode", "wer"), "CER": ("test", "unicode", "cer"), "dev WER": ("dev", "unicode", "wer")}
# What a command would begin with, and a record has a fingerprint of.
FOLDERS = ("start_from", "bank_from")
NO_FLAGS = {"seed", "row", "data_fingerprint", "model_fingerprint", "method_file", *FOLDERS}


class Curve(NamedTuple):
    """Points (x, y) of a run, and what they are."""

    x: str
    y: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Kind:
    """How records of one experiment are shown.

    Attributes:
        title: of the experiment.
        script: that makes a run.
        scores: by their titles, as they are printed, the one that counts first.
        curve: over the training; None where the record has none.
        part: what of the experiment a record is of, such as the task.
    """

    title: str
    script: str
    scores: Callable[[Record], Scores]
    curve: Callable[[Record], Curve | None]
    part: Callable[[Record], str] = lambda record: ""


def _glue_scores(record: Record) -> Scores:
    name = record["scores"]["metric"]
    return {f"{_metric(record)}, {when} epoch": 100 * record["scores"][when][name] for when in ("best", "last")}


def _glue_curve(record: Record) -> Curve | None:
    epochs, name = record["scores"].get("epochs", []), record["scores"]["metric"]
    return Curve("epoch", _metric(record), [(float(one["epoch"]), 100 * one[name]) for one in epochs])


def _metric(record: Record) -> str:
    name = record["scores"]["metric"]
    return METRICS.get(name, name)


def _e2e_scores(record: Record) -> Scores:
    found = {name.replace("_", "-"): (record["scores"].get(name), times) for name, times in E2E.items()}
    return {name: times * value for name, (value, times) in found.items() if value is not None}


def _e2e_curve(record: Record) -> Curve | None:
    losses = record.get("validation_losses", [])
    return Curve("epoch", "validation loss", [(float(at), loss) for at, loss in enumerate(losses, 1)])


def _instruct_scores(record: Record) -> Scores:
    found: Scores = {}
    for judge, scores in record["scores"].items():
        for turn, title in (("turn1", "turn 1"), ("turn1_sound", "turn 1, sound"), ("turn2", "turn 2")):
            if scores.get(turn) is not None:
                found[f"{title}, {judge}"] = scores[turn]
    return found | _held_out(record)


def _mathematics_scores(record: Record) -> Scores:
    found = {}
    for rule, words in RULES.items():
        for name, title in MATHEMATICS.items():
            if name in record["scores"]:
                found[title + words] = record["scores"][name]["rules"][rule]["accuracy"]
    return found | _held_out(record)


def _held_out(record: Record) -> Scores:
    losses = record.get("held_out_losses") or []
    return {"held-out loss": losses[-1]["loss"]} if losses else {}


def _held_out_curve(record: Record) -> Curve | None:
    losses = record.get("held_out_losses") or []
    return Curve("step", "held-out loss", [(float(one["step"]), one["loss"]) for one in losses])


def _speech_scores(record: Record) -> Scores:
    found = {}
    for name, (part, normaliser, kind) in RATES.items():
        if part in record:
            found[name] = record[part]["rates"][normaliser][kind]["percent"]
    return found


def _speech_curve(record: Record) -> Curve | None:
    points = record.get("curve") or []
    return Curve("step", "development loss", [(float(one["step"]), one["loss"]) for one in points])


KINDS: dict[str, Kind] = {
    "glue": Kind("GLUE (Table 1)", "NLU/run_glue.py", _glue_scores, _glue_curve, lambda record: record["task"]),
    "e2e": Kind("E2E (Table 2)", "NLG/run_e2e.py", _e2e_scores, _e2e_curve),
    "instruct": Kind("MT-Bench (Table 3)", "instruction_tuning/run_instruct.py", _instruct_scores, _held_out_curve),
    "math": Kind("Mathematics (Table 4)", "math_instruction_tuning/run_math.py", _mathematics_scores, _held_out_curve),
    "asr": Kind("Speech", "ASR/run_asr.py", _speech_scores, _speech_curve, lambda record: record["language"]),
}


def finite(value: Any) -> float:
    """A number from a record.

    Raises:
        ValueError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} where a number belongs")
    return value


def flags_of(record: Record) -> dict[str, str]:
    """The flags that made the run beside its row and seed: those recorded or, of early records, all its settings.

    The rates that a recipe gave are among them, and whether its vectors are by kind: another version's recipe may give
    others. FOLDER stands for what a run starts from.
    """
    flags = record.get("overrides")
    if flags is None:
        settings = todays(record["settings"])
        flags = {name: value for name, value in settings.items() if isinstance(value, (str, int, float))}
    recipe = record.get("recipe") or {"rates": {}}
    given = {f"learning_rate_{name.removeprefix('lr_')}": rate for name, rate in recipe["rates"].items()}
    if "config" in recipe:
        given["init_by_kind"] = recipe["config"].get("init_by_kind", False)
    flags = {**given, **flags}
    flags = without_secrets({name: str(value) for name, value in flags.items() if name not in NO_FLAGS})
    flags |= {name: "FOLDER" for name in FOLDERS if name in record["settings"]}
    return {name: value.lower() if value in ("True", "False") else value for name, value in flags.items()}


def command_of(record: Record, kind: Kind) -> str:
    """The command that makes a run."""
    flags = flags_of(record)
    if record.get("row"):
        flags = {"row": str(record["row"]), **flags}
    else:
        flags = {"model_name_or_path": str(record["model"]), **flags}
    flags["seed"] = str(record["seed"])
    return " ".join(["python", kind.script, *(f"--{name} {shlex.quote(value)}" for name, value in flags.items())])
