"""MT-Bench scores by model: turn 1 (the figure of the paper's Table 3), turn 2, both, and the eight categories.

    python instruction_tuning/mt_bench_report.py data/mt_bench/model_judgment/gpt-4_single.jsonl --format markdown

Reads single-answer judgments, this project's or FastChat's. A score is a mean over questions of ratings from 1 to 10.
As in FastChat's show_result.py a judgment without a rating (score -1) is left out of the mean, and "both" is the mean
over all judgments of both turns. "sound" is the mean without the 13 questions whose reference answer by GPT-4 is known
to be wrong (FastChat #3158). Of several judgments of the same answer by the same judge the last counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mt_bench import CATEGORIES, KNOWN_WRONG, UNRATED, Bench, Judgment, read_judgments
from vblora_experiments import commands, tables

TURNS = {"1": (1,), "2": (2,), "both": (1, 2)}
HEADER = ("model", "judge", "turn", "score", "sound", "judged", "unrated", *CATEGORIES)
SCALE = (1, 10)


def main(arguments: list[str]) -> str:
    """Print the table, and return it."""
    options = parse(arguments)
    categories = {number: question.category for number, question in Bench.of(options.bench_dir).questions().items()}
    judgments, notes = collect(options.judgments, categories)
    rows = make_rows(judgments, categories)
    notes += remarks(judgments, len(categories))
    if options.format == "csv":
        text = tables.as_csv(HEADER, rows)
        print("\n".join(notes), file=sys.stderr)
    else:
        lines = [[str(v) if isinstance(v, str | int) else tables.number(v, digits=2) for v in row] for row in rows]
        text = tables.render(HEADER, lines, options.format, notes)
    print(text)
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(
            prog="mt_bench_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("judgments", type=Path, nargs="+", metavar="JUDGMENTS.jsonl")
    parser.add_argument("--bench_dir", type=Path, help="folder with MT-Bench's files; downloaded once unless given")
    parser.add_argument("--format", choices=tables.FORMATS, default="markdown")
    return parser.parse_args(arguments)


def collect(paths: list[Path], categories: dict[int, str]) -> tuple[list[Judgment], list[str]]:
    """The judgments of all files, one of each answer, and a note if there were more.

    Raises:
        ValueError: there are none, or one is of a question that the benchmark has not.
    """
    everything = [judgment for path in paths for judgment in read_judgments(path)]
    if not everything:
        raise ValueError(f"{', '.join(map(str, paths))}: no judgments in there")
    if unknown := sorted({judgment.question_id for judgment in everything} - categories.keys()):
        raise ValueError(f"judgments of question {unknown[0]}, which these questions of MT-Bench do not have")
    judgments = list({judgment.key: judgment for judgment in everything}.values())
    repeated = len(everything) - len(judgments)
    return judgments, [f"{repeated} judgments were made again; the last counts."] if repeated else []


def make_rows(judgments: list[Judgment], categories: dict[int, str]) -> list[list[Any]]:
    """A row for each judge, model and turn, with the best in turn 1 first."""
    groups: dict[tuple[str, str], list[Judgment]] = {}
    for judgment in judgments:
        groups.setdefault((judgment.judge[0], judgment.model), []).append(judgment)

    def place(group: tuple[str, str]) -> tuple[str, float, str]:
        first = mean([j for j in groups[group] if j.turn == 1])
        return group[0], -(UNRATED if first is None else first), group[1]

    rows = []
    for judge, model in sorted(groups, key=place):
        for title, turns in TURNS.items():
            members = [judgment for judgment in groups[judge, model] if judgment.turn in turns]
            if not members or (title == "both" and len({judgment.turn for judgment in members}) < 2):
                continue
            sound = [judgment for judgment in members if judgment.question_id not in KNOWN_WRONG]
            unrated = sum(judgment.score == UNRATED for judgment in members)
            parts = [mean([j for j in members if categories[j.question_id] == category]) for category in CATEGORIES]
            rows.append([model, judge, title, mean(members), mean(sound), len(members), unrated, *parts])
    return rows


def mean(judgments: list[Judgment]) -> float | None:
    """The mean rating of those that have one; None if none has."""
    scores = [judgment.score for judgment in judgments if judgment.score != UNRATED]
    return sum(scores) / len(scores) if scores else None


def remarks(judgments: list[Judgment], questions: int) -> list[str]:
    """What a reader of the table has to know."""
    notes = ["Turn 1 is the paper's score. sound: without the questions whose reference answer is known to be wrong."]
    parts: dict[tuple[str, str, int], int] = {}
    for judgment in judgments:
        part = (judgment.model, judgment.judge[0], judgment.turn)
        parts[part] = parts.get(part, 0) + 1
    for (model, judge, turn), count in sorted(parts.items()):
        if count < questions:
            notes.append(f"{model} by {judge}, turn {turn}: {count} of {questions} questions are judged.")
    for judgment in judgments:
        place = f"{judgment.model} by {judgment.judge[0]}, question {judgment.question_id}, turn {judgment.turn}"
        if judgment.score == UNRATED:
            notes.append(f"{place}: no rating.")
        elif not SCALE[0] <= judgment.score <= SCALE[1]:
            notes.append(f"{place}: rated {judgment.score}, outside of {SCALE[0]} to {SCALE[1]}.")
    return notes


if __name__ == "__main__":
    commands.run(main, "mt_bench_report")
