"""Score outputs on GSM8K or MATH, by the published rule of VB-LoRA's scripts and by a corrected one.

    python math_instruction_tuning/score_math.py OUTPUTS REFERENCES [--set gsm8k|math] [--json FILE] [--list FILE]
        [--workers N] [--time_limit SECONDS]

OUTPUTS has one output per problem, in order, and is one of

    *.jsonl         one JSON text per line, or one {"output": "..."} (or text, response, completion, prediction)
    *.json          a list of these
    anything else   one output per line, as it stands: an output of several lines needs one of the forms above

REFERENCES is a .jsonl or .json file of problems, or a name on the hub: see math_references. authors_rule and
corrected_rule say what is right. Accuracies are in percent of all problems; an unparsed answer is a wrong one. --list
writes the problems to look at, one per line: unparsed, not judged in time, or judged differently by the two rules.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import judge_workers
import math_references
from math_scores import read_outputs, score
from vblora_experiments import commands


def main(arguments: list[str]) -> dict[str, Any]:
    """Score, print, and return what --json writes."""
    parser = argparse.ArgumentParser(prog="score_math", description="Accuracy on GSM8K or MATH by two rules.")
    parser.add_argument("outputs", type=Path, metavar="OUTPUTS", help="one output per problem: .jsonl, .json or text")
    parser.add_argument("references", metavar="REFERENCES", help="a .jsonl or .json file, or a name on the hub")
    parser.add_argument("--set", choices=math_references.KINDS, help="default: by the keys of the references")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the scores, unrounded, to this file")
    parser.add_argument("--list", type=Path, metavar="FILE", help="also write the problems to look at, one per line")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes (MATH only)")
    parser.add_argument("--time_limit", type=float, default=judge_workers.TIME_LIMIT, help="seconds a pair (MATH only)")
    chosen = parser.parse_args(arguments)
    for flag in ("json", "list"):
        if getattr(chosen, flag) is not None and getattr(chosen, flag).is_dir():
            raise ValueError(f"--{flag} {getattr(chosen, flag)}: is a folder, not a file")

    problems = math_references.read(chosen.references, chosen.set)
    outputs = read_outputs(chosen.outputs)
    if len(outputs) != len(problems):
        raise ValueError(
            f"{chosen.outputs} has {len(outputs)} outputs and {chosen.references} has {len(problems)} problems: "
            "each problem needs one output"
        )
    result = score(outputs, problems, chosen.workers, chosen.time_limit)
    listed = result.pop("listed")
    print_table(result)
    if chosen.list is not None:
        from vblora.io import replacing  # imports torch

        with replacing(chosen.list) as temporary:
            lines = (json.dumps(row) + "\n" for row in listed)
            temporary.write_text("".join(lines), encoding="utf-8")
    if chosen.json is not None:
        from vblora.io import write_json

        write_json(chosen.json, result)
    return result


def print_table(result: dict[str, Any]) -> None:
    """The table of a result of ``score``; what went wrong in judging goes to stderr."""
    print(f"{'rule':<28}{'correct':>9}{'of':>7}{'accuracy':>10}{'unparsed':>10}")
    for rule, row in result["rules"].items():
        print(_line(rule, row) + f"{row['unparsed']:>10}")
        for trouble in ("timed_out", "failed"):
            if row[trouble]:
                words = f"{row[trouble]} answers {trouble.replace('_', ' ')} in judging, and count as wrong"
                print(f"score_math: warning: {rule}: {words}", file=sys.stderr)
    for heading in ("levels", "subjects"):
        if result[heading]:
            print(f"{heading}, corrected rule")
            for name, row in result[heading].items():
                print(_line("  " + name, row))
    print(f"the rules disagree on {result['disagreements']} of {result['problems']} problems")


def _line(name: str, row: dict[str, Any]) -> str:
    return f"{name:<28}{row['correct']:>9}{row['of']:>7}{row['accuracy']:>10.2f}"


if __name__ == "__main__":
    commands.run(main, "score_math")
