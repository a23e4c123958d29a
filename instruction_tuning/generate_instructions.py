"""Short instructions with answers, in Alpaca's form, to try the instruction tuning without data.

    python instruction_tuning/generate_instructions.py FILE.json [--rows 1000] [--seed 0]

Tasks on words and lists with one right answer each, which follows from the instruction. No row comes twice; a part of
them have an input, as in Alpaca.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

from vblora.io import replacing
from vblora_experiments import commands

NOUNS = """
apple river candle window garden silver planet basket winter pocket bridge market forest ladder mirror orange paper
rocket saddle table umbrella valley walnut yellow zebra anchor button castle dragon engine
"""
WORDS = tuple(NOUNS.split())
Task = Callable[[random.Random], dict[str, str]]


def row(instruction: str, output: str, given: str = "") -> dict[str, str]:
    return {"instruction": instruction, "input": given, "output": output}


def capitals(draw: random.Random) -> dict[str, str]:
    words = draw.sample(WORDS, 2)
    return row(f"Write {words[0]} {words[1]} in capital letters.", f"{words[0]} {words[1]}".upper())


def sort(draw: random.Random) -> dict[str, str]:
    words = draw.sample(WORDS, draw.randint(3, 5))
    return row("Sort these words from A to Z.", ", ".join(sorted(words)), ", ".join(words))


def longest(draw: random.Random) -> dict[str, str]:
    """The longest word; of several the first."""
    words = draw.sample(WORDS, 4)
    return row(
        "Which of these words has the most letters? If several do, name the first.",
        max(words, key=len),
        ", ".join(words),
    )


def count(draw: random.Random) -> dict[str, str]:
    words = draw.sample(WORDS, 2)
    letters = len("".join(words))
    return row(
        f"How many letters do {words[0]} and {words[1]} have together?", f"They have {letters} letters together."
    )


def backwards(draw: random.Random) -> dict[str, str]:
    words = draw.sample(WORDS, 3)
    return row(f"Say these words in reverse order: {', '.join(words)}.", ", ".join(reversed(words)) + ".")


def repeat(draw: random.Random) -> dict[str, str]:
    word, times, sign = draw.choice(WORDS), draw.randint(2, 6), draw.choice(["comma", "space", "dash"])
    return row(
        f"Repeat the word {word} {times} times with a {sign} between.",
        {"comma": ", ", "space": " ", "dash": "-"}[sign].join([word] * times),
    )


def first_letters(draw: random.Random) -> dict[str, str]:
    words = draw.sample(WORDS, 4)
    return row(f"Take the first letters of {', '.join(words)} in order.", "".join(word[0] for word in words))


def contains(draw: random.Random) -> dict[str, str]:
    words, letter = draw.sample(WORDS, 5), draw.choice("aeio")
    found = [word for word in words if letter in word]
    return row(
        f"List the words that contain the letter {letter}.", ", ".join(found) or "None of them.", ", ".join(words)
    )


TASKS: tuple[Task, ...] = (capitals, sort, longest, count, backwards, repeat, first_letters, contains)


def generate(rows: int, seed: int) -> list[dict[str, str]]:
    """That many distinct rows, the same for the same seed.

    Raises:
        ValueError: fewer than one.
    """
    if rows < 1:
        raise ValueError(f"--rows must be at least 1, not {rows}")
    draw = random.Random(seed)
    found: dict[tuple[str, str], dict[str, str]] = {}
    while len(found) < rows:
        one = draw.choice(TASKS)(draw)
        found.setdefault((one["instruction"], one["input"]), one)
    return list(found.values())


def main(arguments: list[str]) -> None:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.file.suffix != ".json":
        raise ValueError(f"{options.file}: the file's name must end in .json")
    write(options.file, options.rows, options.seed)
    print(f"{options.file}: {options.rows} rows")


def write(file: Path, rows: int, seed: int = 0) -> None:
    """Write that many rows into a file."""
    made = generate(rows, seed)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    commands.run(main, "generate_instructions")
