"""Arithmetic word problems with worked answers, to try things without the data.

    python math_instruction_tuning/generate_problems.py DIR [--rows 1000] [--test 200] [--seed 0]

writes train.json in MetaMathQA's form ({"query", "response", "type", "original_question"}; a response ends with
"#### N" and "The answer is: N") and test.jsonl in GSM8K's ({"question", "answer"}; an answer ends with "#### N").
Problems take one to three steps, each worked out as one equation; no question is in both files, or twice in one.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vblora.io import replacing
from vblora_experiments import commands

NAMES = ("Amara", "Ben", "Chloe", "Diego", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Keiko", "Liam")
THINGS = ("apples", "books", "candles", "marbles", "pencils", "postcards", "stamps", "tickets")
TRIES = 1000  # draws for one new question before there seem to be no more


class Worked(NamedTuple):
    """A question, the sentences that work it out, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: int


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1000, help="problems for training")
    parser.add_argument("--test", type=int, default=200, help="problems for the test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write(options.folder, options.rows, options.test, options.seed)
    print(f"{options.folder}: train.json, test.jsonl")


def write(folder: str | Path, rows: int, test: int, seed: int) -> None:
    """Write the two files; the same seed gives the same files.

    Raises:
        ValueError: a size below 1, or more problems than there are.
    """
    for name, size in (("train.json", rows), ("test.jsonl", test)):
        if size < 1:
            raise ValueError(f"{name} needs at least 1 problem, not {size}")
    problems = generate(rows + test, seed)
    train = [metamath_row(problem) for problem in problems[:rows]]
    with replacing(Path(folder) / "train.json") as temporary:
        temporary.write_text(json.dumps(train, indent=1) + "\n", encoding="utf-8")
    with replacing(Path(folder) / "test.jsonl") as temporary:
        lines = (json.dumps(gsm8k_row(problem)) + "\n" for problem in problems[rows:])
        temporary.write_text("".join(lines), encoding="utf-8")


def generate(size: int, seed: int) -> list[Worked]:
    """That many problems with different questions.

    Raises:
        ValueError: more than there are.
    """
    rng = random.Random(seed)
    problems: dict[str, Worked] = {}
    while len(problems) < size:
        for _ in range(TRIES):
            problem = rng.choice(TEMPLATES)(rng)
            if problem.question not in problems:
                break
        else:
            raise ValueError(f"found {len(problems)} different problems, not {size}: ask for fewer")
        problems[problem.question] = problem
    return list(problems.values())


def metamath_row(problem: Worked) -> dict[str, str]:
    response = f"{gsm8k_row(problem)['answer']}\nThe answer is: {problem.answer}"
    query = problem.question
    return {"query": query, "response": response, "type": "GSM_Generated", "original_question": query}


def gsm8k_row(problem: Worked) -> dict[str, str]:
    return {"question": problem.question, "answer": "\n".join((*problem.steps, f"#### {problem.answer}"))}


# --------------------------------------------------------------------------------------------- templates


def _more(rng: random.Random) -> Worked:
    name, things, had, got = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 90), rng.randint(2, 90)
    question = f"{name} has {had} {things} and gets {got} more. How many {things} does {name} have now?"
    return Worked(question, (f"{name} has {had} + {got} = {had + got} {things}.",), had + got)


def _given_away(rng: random.Random) -> Worked:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    boxes, each = rng.randint(2, 12), rng.randint(3, 25)
    total = boxes * each
    given = rng.randint(1, total - 1)
    question = (
        f"{name} buys {boxes} boxes with {each} {things} in each, and gives {given} {things} away. "
        f"How many {things} are left?"
    )
    steps = (
        f"The boxes hold {boxes} * {each} = {total} {things}.",
        f"Then {total} - {given} = {total - given} are left.",
    )
    return Worked(question, steps, total - given)


def _change(rng: random.Random) -> Worked:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    count, price = rng.randint(2, 15), rng.randint(2, 12)
    cost = count * price
    paid = cost + rng.randint(1, 40)
    question = f"{name} buys {count} {things} for ${price} each and pays with ${paid}. How much change does {name} get?"
    steps = (
        f"The {things} cost {count} * {price} = {cost} dollars.",
        f"The change is {paid} - {cost} = {paid - cost} dollars.",
    )
    return Worked(question, steps, paid - cost)


def _shared(rng: random.Random) -> Worked:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, extra = rng.randint(2, 9), rng.randint(2, 30), rng.randint(1, 20)
    total = friends * each
    question = (
        f"{name} shares {total} {things} equally among {friends} friends, who had {extra} {things} each before. "
        f"How many {things} does each friend have now?"
    )
    steps = (
        f"Each friend gets {total} / {friends} = {each} {things}.",
        f"That makes {each} + {extra} = {each + extra} {things}.",
    )
    return Worked(question, steps, each + extra)


def _pages(rng: random.Random) -> Worked:
    name, first, times, fewer = rng.choice(NAMES), rng.randint(6, 60), rng.randint(2, 5), rng.randint(1, 5)
    second = first * times
    third = second - fewer
    question = (
        f"{name} reads {first} pages on Monday, {times} times as many on Tuesday, and {fewer} pages fewer on Wednesday "
        f"than on Tuesday. How many pages does {name} read on the three days together?"
    )
    steps = (
        f"On Tuesday it is {first} * {times} = {second} pages.",
        f"On Wednesday it is {second} - {fewer} = {third} pages.",
        f"Together it is {first} + {second} + {third} = {first + second + third} pages.",
    )
    return Worked(question, steps, first + second + third)


def _way(rng: random.Random) -> Worked:
    name, speed, hours, rest = rng.choice(NAMES), rng.randint(8, 95), rng.randint(2, 6), rng.randint(3, 80)
    done = speed * hours
    distance = done + rest
    question = (
        f"{name} has a way of {distance} kilometres to go and goes {speed} kilometres an hour. "
        f"How many kilometres are left after {hours} hours?"
    )
    steps = (
        f"In {hours} hours it is {speed} * {hours} = {done} kilometres.",
        f"So {distance} - {done} = {rest} kilometres are left.",
    )
    return Worked(question, steps, rest)


TEMPLATES: tuple[Callable[[random.Random], Worked], ...] = (_more, _given_away, _change, _shared, _pages, _way)


if __name__ == "__main__":
    commands.run(main, "generate_problems")
