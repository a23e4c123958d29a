"""Word and character error rates of anybody's transcripts.

    python ASR/score_speech.py OUTPUTS.tsv REFERENCES.tsv [--normalisers raw unicode basic] [--json FILE]

OUTPUTS.tsv has the columns path and text, as transcribe.py writes it. REFERENCES.tsv is a table of FLEURS, of Common
Voice or of path and text, whose recordings need not be there; every one of them must have an output, but with
--only_outputs, which scores the outputs and says how many recordings have none.

A rate is in percent, with the interval that 95% of 1,000 draws of the recordings lie in; it can exceed 100. `raw`
compares texts as they are, `unicode` without case and punctuation; `basic` is Whisper's for all languages, which takes
Hindi its vowel signs and French its apostrophes; `english` is Whisper's for English (--spellings: its normalizer.json).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import word_errors
from normalisers import NAMES, normaliser
from speech_data import read_outputs, read_table
from vblora.io import write_json
from vblora_experiments import commands


def main(arguments: list[str]) -> dict[str, Any]:
    """Score, print, and return what --json writes."""
    parser = commands.one_line_errors(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="a table with the columns path and text")
    parser.add_argument("references", type=Path, metavar="REFERENCES", help="the table of the recordings")
    parser.add_argument("--normalisers", nargs="+", choices=NAMES, default=["raw", "unicode", "basic"])
    parser.add_argument("--spellings", type=Path, help="normalizer.json of a Whisper, for the english normaliser")
    parser.add_argument("--only_outputs", action="store_true", help="leave out recordings without an output")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rates, unrounded, to this file")
    chosen = parser.parse_args(arguments)
    if chosen.json is not None and chosen.json.is_dir():
        raise ValueError(f"--json {chosen.json} is a folder: name a file in it")
    functions = {name: normaliser(name, chosen.spellings) for name in chosen.normalisers}
    hypotheses, references = matched(chosen.outputs, chosen.references, chosen.only_outputs)
    rates = word_errors.rates(references, hypotheses, functions, chosen.references)
    empty = sum(not text for text in hypotheses)
    if empty:
        print(f"score_speech: warning: {empty} of {len(hypotheses)} outputs are empty, and count", file=sys.stderr)
    print(f"{len(references)} recordings")
    for name, pair in rates.items():
        shown = [f"{kind.upper()} {r['percent']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for kind, r in pair.items()]
        print(f"{name:8} {'  '.join(shown)}")
    result = {"recordings": len(references), "empty_outputs": empty, "rates": rates}
    if chosen.json is not None:
        write_json(chosen.json, result)
    return result


def matched(outputs: Path, references: Path, only_outputs: bool = False) -> tuple[list[str], list[str]]:
    """The texts of both files by recording.

    Raises:
        ValueError: a recording is in one of them alone; with only_outputs, in the outputs alone.
    """
    said = read_outputs(outputs)
    meant = {clip.name: clip.text for clip in read_table(references)}
    if only_outputs and (without := meant.keys() - said.keys()):
        print(f"{len(without)} of {len(meant)} recordings of {references} have no output and are left out")
        meant = {name: text for name, text in meant.items() if name in said}
    for name in [*meant, *said]:
        if name not in said or name not in meant:
            lacking, other = (outputs, references) if name not in said else (references, outputs)
            raise ValueError(
                f"{lacking} has no row for {name}, which {other} has: score against a table of the same recordings"
                + (", or --only_outputs (--long_clips leave_out leaves some out)" if lacking is outputs else "")
            )
    return [said[name] for name in meant], list(meant.values())


if __name__ == "__main__":
    commands.run(main, "score_speech")
