"""One run of the speech table: train a row, transcribe the development and test parts, score them, write a record.

    python ASR/run_asr.py --row tiny_en/recipe --language it --data_dir DIR --model_name_or_path DIR --seed 0

Takes the flags of train_speech.py, of transcribe.py's search (--beam, --max_new_tokens) and --decode_batch_size. Flags
after --row override the row. The output folder receives what train_speech.py and transcribe.py write, and record.json:
settings, rates of both parts under each normaliser, stored parameters, times. A run that has a record is not run again,
and one that was interrupted goes on. The rates for choosing learning rates are the development part's.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vblora_experiments import commands  # it quiets what transformers imports

# isort: split
from transformers import TrainingArguments

import train_speech
import transcribe
import word_errors
from asr_rows import row
from features import features_of
from normalisers import normaliser
from speech_data import Set, fingerprint, load_split, read_outputs, read_table, sound_prints
from train_speech import SpeechArguments
from transcribe import Decoding
from vblora.io import read_json
from vblora_experiments import publishing, runs, training_run
from vblora_experiments.arguments import BatchArguments
from vblora_experiments.command_line import Settings
from whisper_models import whisper_config

PARTS = ("dev", "test")
NORMALISERS = ("raw", "unicode", "basic")
MAIN = "unicode"  # the rate that is shown first


SCRIPT = dataclasses.replace(
    train_speech.SCRIPT,
    name="run_asr.py",
    kinds=(BatchArguments, Decoding, *train_speech.SCRIPT.kinds),
    row=row,
    description=str(__doc__),
)


parse = SCRIPT.read


def main(arguments: list[str]) -> dict[str, Any]:
    """Run, and return the record; with --plan show what the run resolves, and return nothing."""
    return SCRIPT.start(arguments, run)


def run(settings: Settings) -> dict[str, Any]:
    """Train, transcribe and score, as far as that is not done; the record."""
    # Before the training: a wrong row or a damaged recording would be found hours later.
    sets = read_parts(settings.of(SpeechArguments))
    sounds = {part: sound_prints(found.clips) for part, found in sets.items()}
    trained = train_speech.train(settings, lambda: hear(settings.of(SpeechArguments), sets, sounds))
    if not trained:  # another process of this run writes
        return {}
    wanted = asdict(settings.of(Decoding))
    record = training_run.record_of(
        settings, "decoding", wanted, lambda: make_record(settings, trained, transcribe_parts(settings))
    )
    check_data(record, sets, sounds, settings.output_dir)
    runs.finish(settings.output_dir, record)
    print(summary(record))
    return publishing.published(settings.of(TrainingArguments), record)


def read_parts(speech: SpeechArguments) -> dict[str, Set]:
    """The parts that are transcribed, looked at."""
    return {part: load_split(speech.data_dir, part, speech.window, speech.long_clips) for part in PARTS}


def hear(speech: SpeechArguments, sets: dict[str, Set], sounds: dict[str, list[str]]) -> None:
    """Compute the features that transcribing will need, which decodes every recording.

    Raises:
        ValueError: a recording cannot be read to its end; with the table and line.
    """
    mels = whisper_config(speech.model_name_or_path, speech.window).num_mel_bins
    for part, found in sets.items():
        features_of(found.clips, sounds[part], found.seconds, mels, speech.window, Path(speech.cache_dir))


def check_data(record: dict[str, Any], sets: dict[str, Set], sounds: dict[str, list[str]], out: Path) -> None:
    """Refuse parts that are others than those that a record is of; an older record does not say.

    Raises:
        ValueError: naming the table.
    """
    for part, found in sets.items():
        data = fingerprint(found.clips, sounds[part])
        if record[part].get("data", data) != data:
            table = found.clips[0].where.rpartition(",")[0]
            raise ValueError(
                f"{out} holds a record of another {part} part: {table} or its recordings have changed; put them back, "
                "or give another --output_dir"
            )


def transcribe_parts(settings: Settings) -> float:
    """Transcribe the development and the test part; the seconds that it took."""
    began, speech = time.monotonic(), settings.of(SpeechArguments)
    for part in PARTS:
        transcribe.transcribe_split(
            transcribe.Options(
                settings.output_dir,
                Path(speech.data_dir),
                settings.of(Decoding),
                part,
                speech.model_name_or_path,
                settings.of(BatchArguments).decode_batch_size,
                cache_dir=Path(speech.cache_dir),
            )
        )
    return round(time.monotonic() - began, 1)


def make_record(settings: Settings, trained: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Everything there is to know of the run, no text of anybody's; transcribing took so many seconds."""
    out, data_dir = settings.output_dir, Path(settings.of(SpeechArguments).data_dir)
    parts = {part: scored(out, part, data_dir / f"{part}.tsv") for part in PARTS}
    return {
        **training_run.heading("asr", trained),
        "language": trained["settings"]["language"],
        "decoding": asdict(settings.of(Decoding)),
        "decode_seconds": seconds,
        **parts,
        "scores": {kind.upper(): rate["percent"] for kind, rate in parts["test"]["rates"][MAIN].items()},
        "bytes_on_disk": training_run.bytes_on_disk(out),
    }


def scored(out: Path, part: str, table: Path) -> dict[str, Any]:
    """What the record says of a part: its rates, and what was noted as it was transcribed.

    Raises:
        ValueError: the table calls a recording otherwise than it did then.
    """
    file, note = out / f"{part}.tsv", read_json(out / f"{part}.decoding.json")
    texts, references = read_outputs(file), {clip.name: clip.text for clip in read_table(table)}
    if unknown := next((name for name in texts if name not in references), None):
        raise ValueError(f"{table} has no row for {unknown}, which {file} has: remove {file}, and run it again")
    functions = {name: normaliser(name) for name in NORMALISERS}
    rates = word_errors.rates([references[name] for name in texts], list(texts.values()), functions, table)
    noted = {name: note[name] for name in ("cut", "left_out", "data")}
    return {"clips": len(texts), **noted, "rates": rates}


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
    commands.run(main, "run_asr")
