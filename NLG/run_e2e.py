"""One run of Table 2: train a row, decode the test set, score it, and write a record.

    python NLG/run_e2e.py --row gpt2_medium/vblora --seed 0
    python NLG/run_e2e.py --row smollm2_135m/lora --model_name_or_path DIR --data_dir DIR --max_train_samples 1000

Takes the flags of train.py, of decode.py's search (--beam and so on) and --decode_batch_size. Flags after --row
override the row. The output folder receives what train.py and decode.py write, and record.json: settings, the five
scores of the challenge's script on the test set, stored parameters, times. A run that has a record is not run again,
and one that was interrupted goes on; where Java was missing, a second call adds the scores that need it.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

import decode
import e2e_scores
import train
from e2e_data import group, load_split
from e2e_rows import row
from generation import Decoding
from score import read_outputs
from train import TextArguments
from vblora_experiments import commands, runs
from vblora_experiments.arguments import with_row


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record."""
    own, decoding, rest = parse(arguments)
    text, _, training = train.parse(rest)
    out = Path(str(training.output_dir))
    trained = train.main([*rest, "--output_dir", str(out)])
    if not trained:  # another process of this run writes
        return {}
    record = runs.finished(out, "decoding", decoding.to_dict())
    if record is None:
        seconds = decode_test(out, text, own, decoding)
        record = make_record(out, text, trained, decoding) | {"decode_seconds": seconds}
        record |= {"row": own.row, "overrides": runs.overrides(arguments)}
    if any(value is None for value in record["scores"].values()):
        record["scores"] = e2e_scores.score(*outputs_and_references(out, text))
    runs.finish(out, record)
    print(summary(record))
    return record


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Decoding, list[str]]:
    """This script's own flags, those of the search, and train.py's."""
    arguments = with_row(arguments, row)
    parser = commands.one_line_errors(HfArgumentParser(Decoding, prog="run_e2e.py", allow_abbrev=False, add_help=False))  # type: ignore[arg-type]
    parser.add_argument("--row", help="MODEL/METHOD: take the flags of this row of e2e_rows.py")
    parser.add_argument("--decode_batch_size", type=int, default=16)
    own, rest = parser.parse_known_args(arguments)
    decoding = Decoding(**{name: getattr(own, name) for name in Decoding.__dataclass_fields__})
    decoding.check()
    if own.decode_batch_size < 1:
        raise ValueError(f"--decode_batch_size must be at least 1, not {own.decode_batch_size}")
    return own, decoding, rest


def decode_test(out: Path, text: TextArguments, own: argparse.Namespace, decoding: Decoding) -> float:
    """Decode the test set; the seconds that it took."""
    began = time.monotonic()
    command = [str(out), "--model_name_or_path", text.model_name_or_path, "--batch_size", str(own.decode_batch_size)]
    command += ["--data_dir", text.data_dir] if text.data_dir is not None else []
    command += [part for name, value in decoding.to_dict().items() for part in (f"--{name}", str(value))]
    decode.main(command)
    return round(time.monotonic() - began, 1)


def outputs_and_references(out: Path, text: TextArguments) -> tuple[list[str], list[tuple[str, ...]]]:
    groups = group(load_split(text.dataset, "test", text.data_dir))
    return read_outputs(out / "test.txt"), [g.references for g in groups]


def make_record(out: Path, text: TextArguments, trained: dict[str, Any], decoding: Decoding) -> dict[str, Any]:
    """Everything there is to know of the run."""
    outputs, references = outputs_and_references(out, text)
    settings = trained["settings"]
    return {
        "experiment": "e2e",
        "model": settings["model_name_or_path"],
        "method": settings["method"],
        "seed": settings["seed"],
        **trained,
        "decoding": decoding.to_dict(),
        "outputs": len(outputs),
        "empty_outputs": sum(not output for output in outputs),
        "scores": e2e_scores.score(outputs, references),
        "bytes_on_disk": sum(p.stat().st_size for p in (out / "last").glob("*.safetensors")),
    }


def summary(record: dict[str, Any]) -> str:
    scores = ", ".join(f"{n} {'not computed' if v is None else f'{v:.4f}'}" for n, v in record["scores"].items())
    return f"{record['method']}: {scores}; {record['stored_parameters']['parameters']:,} stored parameters"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    commands.run(main, "run_e2e")
