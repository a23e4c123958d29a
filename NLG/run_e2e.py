"""One run of Table 2: train a row, decode the test set, score it, and write a record.

    python NLG/run_e2e.py --row gpt2_medium/vblora --seed 0
    python NLG/run_e2e.py --row smollm2_135m/lora --model_name_or_path DIR --data_dir DIR --max_train_samples 1000

Takes the flags of train.py, of decode.py's search (--beam and so on) and --decode_batch_size. Flags after --row
override the row. The output folder receives what train.py and decode.py write, and record.json: settings, the five
scores of the challenge's script on the test set, stored parameters, times. A run that has a record is not run again,
and one that was interrupted goes on; where Java was missing, a second call adds the scores that need it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from vblora_experiments import commands  # it quiets what transformers imports

# isort: split
from transformers import TrainingArguments

import decode
import e2e_scores
import train
from e2e_data import group, load_split
from generation import Decoding
from score import read_outputs
from train import TextArguments
from vblora_experiments import publishing, runs, training_run
from vblora_experiments.arguments import BatchArguments
from vblora_experiments.command_line import Settings

SCRIPT = dataclasses.replace(
    train.SCRIPT, name="run_e2e.py", kinds=(BatchArguments, Decoding, *train.SCRIPT.kinds), description=str(__doc__)
)
parse = SCRIPT.read


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record; with --plan show what the run resolves, and return nothing."""
    return SCRIPT.start(arguments, run)


def run(settings: Settings) -> dict[str, Any]:
    """Train, decode and score, as far as that is not done; the record."""
    text, decoding, out = settings.of(TextArguments), settings.of(Decoding), settings.output_dir
    trained = train.train(settings)
    if not trained:  # another process of this run writes
        return {}
    record = training_run.record_of(
        settings, "decoding", decoding.to_dict(), lambda: make_record(settings, trained, decode_test(settings))
    )
    if any(value is None for value in record["scores"].values()):
        record["scores"] = e2e_scores.score(*outputs_and_references(out, text))
    runs.finish(out, record)
    print(summary(record))
    return publishing.published(settings.of(TrainingArguments), record)


def decode_test(settings: Settings) -> float:
    """Decode the test set; the seconds that it took."""
    began, text = time.monotonic(), settings.of(TextArguments)
    decode.decode_split(
        decode.Options(
            settings.output_dir,
            settings.of(Decoding),
            data_dir=text.data_dir,
            model_name_or_path=text.model_name_or_path,
            batch_size=settings.of(BatchArguments).decode_batch_size,
        )
    )
    return round(time.monotonic() - began, 1)


def outputs_and_references(out: Path, text: TextArguments) -> tuple[list[str], list[tuple[str, ...]]]:
    groups = group(load_split(text.dataset, "test", text.data_dir))
    return read_outputs(out / "test.txt"), [g.references for g in groups]


def make_record(settings: Settings, trained: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Everything there is to know of the run; decoding took so many seconds."""
    out, decoding = settings.output_dir, settings.of(Decoding)
    outputs, references = outputs_and_references(out, settings.of(TextArguments))
    return {
        **training_run.heading("e2e", trained),
        "decoding": decoding.to_dict(),
        "decode_seconds": seconds,
        "outputs": len(outputs),
        "empty_outputs": sum(not output for output in outputs),
        "scores": e2e_scores.score(outputs, references),
        "bytes_on_disk": training_run.bytes_on_disk(out),
    }


def summary(record: dict[str, Any]) -> str:
    scores = ", ".join(f"{n} {'not computed' if v is None else f'{v:.4f}'}" for n, v in record["scores"].items())
    return f"{record['method']}: {scores}; {record['stored_parameters']['parameters']:,} stored parameters"


if __name__ == "__main__":
    commands.run(main, "run_e2e")
