"""Accuracy of outputs on GSM8K or MATH by both rules; score_math.py is the command for it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import authors_rule
import corrected_rule
import judge_workers
import math_references
from judge_workers import Pair, Verdict
from math_references import Problem

KEYS = ("output", "text", "response", "completion", "prediction")
UNPARSED = "unparsed"


class Judged(NamedTuple):
    """A problem's verdict by one rule: right or not, the answer extracted, where it stood, what was the trouble."""

    correct: bool
    answer: str | None
    place: str
    trouble: str  # empty, "unparsed", "timed out", or an error in words


def read_outputs(path: Path) -> list[str]:
    """The outputs in a file of any of this script's forms; empty ones too.

    Raises:
        ValueError: no such file, no outputs, or a row without an output, named by file and line.
    """
    if path.suffix.lower() in (".jsonl", ".json"):
        outputs = [_output(row, where) for where, row in math_references.records(path)]
    else:
        try:
            lines = re.split(r"\r\n|\n|\r", path.read_bytes().decode("utf-8-sig"))
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"{path}: no such file") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        outputs = lines if lines[-1] else lines[:-1]  # the last line may end with a newline or without
    if not outputs:
        raise ValueError(f"{path}: no outputs")
    return outputs


def _output(row: Any, where: str) -> str:
    value = row if isinstance(row, str) else None
    if isinstance(row, dict):
        value = next((row[key] for key in KEYS if key in row), None)
    if not isinstance(value, str):
        raise ValueError(f"{where}: no output: neither a text nor an object with a text under {', '.join(KEYS)}")
    return value


# ---------------------------------------------------------------------------------------------- scoring


def score(
    outputs: Sequence[str],
    problems: Sequence[Problem],
    workers: int = 1,
    time_limit: float = judge_workers.TIME_LIMIT,
) -> dict[str, Any]:
    """Accuracy of outputs by both rules.

    Returns:
        kind; problems, their number; rules, for each rule's name its correct, of, accuracy (percent), unparsed,
        timed_out and failed (errors in judging); disagreements; extracted_from, how many answers of the corrected rule
        stood where; levels and subjects, for MATH the corrected rule's correct, of and accuracy in each; and listed,
        a row for each problem to look at.

    Raises:
        ValueError: no problems, not as many outputs, problems of two kinds, a GSM8K reference that is no number, or,
            for MATH, no math-verify.
    """
    if not problems or len(outputs) != len(problems):
        raise ValueError(f"{len(outputs)} outputs and {len(problems)} problems: each problem needs one output")
    kinds = {problem.kind for problem in problems}
    if len(kinds) > 1:
        raise ValueError("problems of GSM8K and of MATH are scored apart")
    kind = kinds.pop()
    judged = _judge_gsm8k(outputs, problems) if kind == "gsm8k" else _judge_math(outputs, problems, workers, time_limit)
    authors, corrected = judged["authors"], judged["corrected"]
    result: dict[str, Any] = {
        "kind": kind,
        "problems": len(problems),
        "rules": {rule: _totals(verdicts) for rule, verdicts in judged.items()},
        "disagreements": sum(a.correct != b.correct for a, b in zip(authors, corrected, strict=True)),
        "extracted_from": dict(sorted(Counter(verdict.place for verdict in corrected).items())),
        "levels": {},
        "subjects": {},
        "listed": _listed(problems, authors, corrected),
    }
    if kind == "math":
        result["levels"] = _parts((problem.level for problem in problems), corrected)
        result["subjects"] = _parts((problem.subject for problem in problems), corrected)
    return result


def _judge_gsm8k(outputs: Sequence[str], problems: Sequence[Problem]) -> dict[str, list[Judged]]:
    authors, corrected = [], []
    for text, problem in zip(outputs, problems, strict=True):
        seen = authors_rule.extract(text, "gsm8k")
        right = authors_rule.is_correct(text, problem.reference, "gsm8k")
        authors.append(Judged(right, seen, "marker", "" if seen is not None else UNPARSED))
        answer = corrected_rule.extract(text, "gsm8k")
        right = corrected_rule.is_correct_gsm8k(text, problem.reference)
        corrected.append(Judged(right, *answer, "" if answer.text is not None else UNPARSED))
    return {"authors": authors, "corrected": corrected}


def _judge_math(
    outputs: Sequence[str], problems: Sequence[Problem], workers: int, time_limit: float
) -> dict[str, list[Judged]]:
    """Pairs whose texts are plainly the same are settled here, all others by the workers."""
    corrected_rule.require_math_verify()
    seen: dict[str, list[corrected_rule.Answer]] = {
        "authors": [corrected_rule.Answer(authors_rule.extract(text, "math"), "marker") for text in outputs],
        "corrected": [corrected_rule.extract(text, "math") for text in outputs],
    }
    settled: dict[Pair, Verdict] = {}
    for rule, answers in seen.items():
        for answer, problem in zip(answers, problems, strict=True):
            if answer.text is not None:
                same = rule == "corrected" and corrected_rule.plain(answer.text) == corrected_rule.plain(
                    problem.reference
                )
                settled[Pair(rule, answer.text, problem.reference)] = Verdict(same)
    open_pairs = [pair for pair, verdict in settled.items() if not verdict.correct]
    settled |= zip(open_pairs, judge_workers.judge(open_pairs, workers, time_limit), strict=True)
    return {
        rule: [
            Judged(False, None, answer.place, UNPARSED)
            if answer.text is None
            else _judged(answer, settled[Pair(rule, answer.text, problem.reference)])
            for answer, problem in zip(answers, problems, strict=True)
        ]
        for rule, answers in seen.items()
    }


def _judged(answer: corrected_rule.Answer, verdict: Verdict) -> Judged:
    return Judged(verdict.correct, *answer, verdict.problem)


def _totals(verdicts: Sequence[Judged]) -> dict[str, Any]:
    troubles = Counter(verdict.trouble for verdict in verdicts)
    unparsed, timed_out = troubles[UNPARSED], troubles[judge_workers.TIMED_OUT]
    failed = len(verdicts) - troubles[""] - unparsed - timed_out
    return {**_accuracy(verdicts), "unparsed": unparsed, "timed_out": timed_out, "failed": failed}


def _accuracy(verdicts: Sequence[Judged]) -> dict[str, Any]:
    correct = sum(verdict.correct for verdict in verdicts)
    return {"correct": correct, "of": len(verdicts), "accuracy": 100 * correct / len(verdicts)}


def _parts(names: Iterable[str], verdicts: Sequence[Judged]) -> dict[str, Any]:
    parts: dict[str, list[Judged]] = {}
    for name, verdict in zip(names, verdicts, strict=True):
        parts.setdefault(name or "not given", []).append(verdict)
    return {name: _accuracy(parts[name]) for name in sorted(parts)}


def _listed(
    problems: Sequence[Problem], authors: Sequence[Judged], corrected: Sequence[Judged]
) -> list[dict[str, Any]]:
    rows = []
    for problem, first, second in zip(problems, authors, corrected, strict=True):
        reasons = [
            f"{rule}: {verdict.trouble}"
            for rule, verdict in (("authors", first), ("corrected", second))
            if verdict.trouble
        ]
        if first.correct != second.correct:
            reasons.append(f"right by the {'authors' if first.correct else 'corrected'} rule only")
        if reasons:
            rows.append(
                {
                    "number": problem.number,
                    "reference": problem.reference,
                    "authors": first.answer,
                    "corrected": second.answer,
                    "taken_from": second.place,
                    "reason": "; ".join(reasons),
                }
            )
    return rows
