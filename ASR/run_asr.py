"""One run of the speech table: train a row, transcribe the development and test parts, score them, write a record.

    python ASR/run_asr.py --row tiny_en/recipe --language it --data_dir DIR --model_name_or_path DIR --seed 0

Takes the flags of train_speech.py, of transcribe.py's search (--beam, --max_new_tokens) and --decode_batch_size. Flags
after --row override the row. The output folder receives what train_speech.py and transcribe.py write, and record.json:
settings, rates of both parts under each normaliser, stored parameters, times. A run that has a record is not run again,
and one that was interrupted goes on. The rates for choosing learning rates are the development part's.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

import train_speech
import transcribe
import word_errors
from asr_rows import row
from normalisers import normaliser
from speech_data import read_outputs, read_table
from train_speech import SpeechArguments
from transcribe import Decoding
from vblora.io import read_json
from vblora_experiments import commands, runs
from vblora_experiments.arguments import with_row

PARTS = ("dev", "test")
NORMALISERS = ("raw", "unicode", "basic")
MAIN = "unicode"  # the rate that is shown first


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record."""
    own, decoding, rest = parse(arguments)
    speech, _, training = train_speech.parse(rest)
    out = Path(str(training.output_dir))
    trained = train_speech.main([*rest, "--output_dir", str(out)])
    if not trained:  # another process of this run writes
        return {}
    record = runs.finished(out, "decoding", asdict(decoding))
    if record is None:
        began = time.monotonic()
        for part in PARTS:
            transcribe.main(command(out, part, speech, own, decoding))
        seconds = round(time.monotonic() - began, 1)
        record = make_record(out, speech, trained, decoding) | {"decode_seconds": seconds}
        record |= {"row": own.row, "overrides": runs.overrides(arguments)}
    runs.finish(out, record)
    print(summary(record))
    return record


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Decoding, list[str]]:
    """This script's own flags, those of the search, and train_speech.py's."""
    arguments = with_row(arguments, row)
    parser = commands.one_line_errors(HfArgumentParser(Decoding, prog="run_asr.py", allow_abbrev=False, add_help=False))  # type: ignore[arg-type]
    parser.add_argument("--row", help="MODEL/METHOD: take the flags of this row of asr_rows.py")
    parser.add_argument("--decode_batch_size", type=int, default=16)
    own, rest = parser.parse_known_args(arguments)
    decoding = Decoding(**{name: getattr(own, name) for name in Decoding.__dataclass_fields__})
    decoding.check()
    if own.decode_batch_size < 1:
        raise ValueError(f"--decode_batch_size must be at least 1, not {own.decode_batch_size}")
    return own, decoding, rest


def command(out: Path, part: str, speech: SpeechArguments, own: argparse.Namespace, decoding: Decoding) -> list[str]:
    """What transcribe.py is called with."""
    flags = {
        "split": part,
        "data_dir": speech.data_dir,
        "model_name_or_path": speech.model_name_or_path,
        "batch_size": own.decode_batch_size,
        "cache_dir": speech.cache_dir,
        **asdict(decoding),
    }
    return [str(out), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def make_record(out: Path, speech: SpeechArguments, trained: dict[str, Any], decoding: Decoding) -> dict[str, Any]:
    """Everything there is to know of the run; no text of anybody's."""
    settings = trained["settings"]
    parts = {}
    for part in PARTS:
        texts = read_outputs(out / f"{part}.tsv")
        references = {clip.name: clip.text for clip in read_table(Path(speech.data_dir) / f"{part}.tsv")}
        functions = {name: normaliser(name) for name in NORMALISERS}
        rates = word_errors.rates([references[name] for name in texts], list(texts.values()), functions)
        note = read_json(out / f"{part}.decoding.json")
        parts[part] = {"clips": len(texts), "cut": note["cut"], "left_out": note["left_out"], "rates": rates}
    return {
        "experiment": "asr",
        "model": settings["model_name_or_path"],
        "method": settings["method"],
        "language": settings["language"],
        "seed": settings["seed"],
        **trained,
        "decoding": asdict(decoding),
        **parts,
        "scores": {kind.upper(): rate["percent"] for kind, rate in parts["test"]["rates"][MAIN].items()},
        "bytes_on_disk": sum(p.stat().st_size for p in (out / "last").glob("*.safetensors")),
    }


def summary(record: dict[str, Any]) -> str:
    rates = record["test"]["rates"][MAIN]
    shown = ", ".join(
        f"{name.upper()} {rate['percent']:.1f} ({rate['low']:.1f} to {rate['high']:.1f})"
        for name, rate in rates.items()
    )
    dev = record["dev"]["rates"][MAIN]["wer"]["percent"]
    stored = record["stored_parameters"]["parameters"]
    return f"{record['method']}: {shown}; dev WER {dev:.1f}; {stored:,} stored parameters"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    commands.run(main, "run_asr")
