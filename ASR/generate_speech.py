"""Spoken sentences to try the folder with, by the synthesiser espeak-ng.

    python ASR/generate_speech.py DIR --language it

DIR receives train.tsv, dev.tsv and test.tsv with the columns path and text, and the recordings. Sentences are drawn
from a small grammar, no sentence twice; --texts takes them from a file instead, one a line, in any language that
espeak-ng speaks. A synthesised voice is no speech: it shows that the commands work, and nothing about word error rates.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vblora.io import new_directory
from vblora_experiments import commands

PROGRAM = "espeak-ng"
GRAMMAR: dict[str, tuple[tuple[str, ...], ...]] = {
    "en": (
        ("the teacher", "my brother", "the old sailor", "a young doctor"),
        ("opens", "paints", "forgets", "looks for"),
        ("the red door", "a small boat", "the green window", "a long letter"),
        ("in the morning", "before dinner", "at the station", "without a word"),
    ),
    "it": (
        ("il maestro", "mio fratello", "il vecchio marinaio", "una giovane dottoressa"),
        ("apre", "dipinge", "dimentica", "cerca"),
        ("la porta rossa", "una piccola barca", "la finestra verde", "una lunga lettera"),
        ("di mattina", "prima di cena", "alla stazione", "senza una parola"),
    ),
}
SIZES = {"train": 40, "dev": 8, "test": 8}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--language", default="it", help="a voice of espeak-ng; of the grammar: it or en")
    parser.add_argument("--texts", type=Path, help="sentences, one a line, instead of the grammar's")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    write(chosen.folder, chosen.language, sentences(chosen.language, chosen.texts, chosen.seed))


def sentences(language: str, file: Path | None, seed: int) -> list[str]:
    """Sentences in an order drawn by the seed.

    Raises:
        ValueError: no grammar of this language and no file, or too few sentences in it.
    """
    if file is not None:
        found = list(
            dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").split("\n") if line.strip())
        )
    elif language in GRAMMAR:
        found = [" ".join(parts) for parts in itertools.product(*GRAMMAR[language])]
    else:
        raise ValueError(f"--language {language}: the grammar has {', '.join(GRAMMAR)}; give sentences with --texts")
    if len(found) < len(SIZES):
        raise ValueError(f"{file}: {len(found)} sentences; each of {', '.join(SIZES)} needs one")
    random.Random(seed).shuffle(found)
    return found[: sum(SIZES.values())]


def write(folder: Path, language: str, texts: Sequence[str]) -> None:
    """Speak the sentences and write the tables; fewer than wanted are divided in the same shares.

    Raises:
        ValueError: espeak-ng is missing, has no such voice, or the folder exists.
    """
    if shutil.which(PROGRAM) is None:
        raise ValueError(f"{PROGRAM} is not installed (Debian: apt-get install {PROGRAM})")
    rest = {part: max(1, len(texts) * size // sum(SIZES.values())) for part, size in SIZES.items() if part != "train"}
    sizes = {"train": len(texts) - sum(rest.values()), **rest}
    left = iter(texts)
    with new_directory(folder) as new:
        for part, size in sizes.items():
            rows = []
            for number, text in enumerate(itertools.islice(left, size)):
                speak(text, language, new / f"{part}_{number:03d}.wav")
                rows.append(f"{part}_{number:03d}.wav\t{text}\n")
            (new / f"{part}.tsv").write_text(f"path\ttext\n{''.join(rows)}", encoding="utf-8")
    print(f"{folder}: {', '.join(f'{part} {size}' for part, size in sizes.items())}")


def speak(text: str, voice: str, path: Path) -> None:
    done = subprocess.run([PROGRAM, "-v", voice, "-w", str(path), "--", text], capture_output=True, text=True)
    if done.returncode or not path.is_file():
        raise ValueError(f"{PROGRAM} -v {voice} failed: {' '.join(done.stderr.split()) or 'no recording'}")


if __name__ == "__main__":
    commands.run(main, "generate_speech")
