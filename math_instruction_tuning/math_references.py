"""The problems and reference answers of GSM8K and MATH, from a file or from the hub.

A file is .jsonl (one row per line) or .json (a list of rows). Rows are of one of three forms:

    {"question": ..., "answer": "... #### 42"}                                  GSM8K
    {"instruction": ..., "output": "... \\boxed{42}", "type": ..., "level": ...}  MATH, as MetaMath and VB-LoRA keep it
    {"problem": ..., "solution": "... \\boxed{42}", "type": ..., "level": ...}    MATH, as published

Type and level may be missing. In place of a file, the names in HUB stand for the test sets on the hub.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vblora_experiments.text_files import parsed_json

KINDS = ("gsm8k", "math")
# Name on the hub to the kind and its parts; each row of MATH's parts carries its own type and level.
HUB: dict[str, tuple[str, tuple[str, ...]]] = {
    "openai/gsm8k": ("gsm8k", ("main",)),
    "EleutherAI/hendrycks_math": (
        "math",
        (
            "algebra",
            "counting_and_probability",
            "geometry",
            "intermediate_algebra",
            "number_theory",
            "prealgebra",
            "precalculus",
        ),
    ),
}
COLUMNS = {"gsm8k": (("question", "answer"),), "math": (("instruction", "output"), ("problem", "solution"))}


class Problem(NamedTuple):
    """One problem; numbers begin at 1, in the order of the set. ``level`` and ``subject`` are empty where not given."""

    number: int
    question: str
    reference: str
    kind: str
    level: str = ""
    subject: str = ""


def read(source: str | Path, kind: str | None = None) -> list[Problem]:
    """The problems of a file, or of a set on the hub (its test part).

    Args:
        source: a .jsonl or .json file, or a name in HUB.
        kind: "gsm8k" or "math"; None takes the first row's.

    Raises:
        ValueError: no such file, no problems, or a row that is not of the kind's form, named by file and line.
    """
    problems: list[Problem] = []
    for where, row in _from_hub(str(source)) if str(source) in HUB else records(Path(source)):
        kind = kind or _kind(row, where)
        problems.append(_problem(row, kind, len(problems) + 1, where))
    if not problems:
        raise ValueError(f"{source}: no problems")
    return problems


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Each JSON value of a .jsonl file or of the list in a .json file, with its place in words, without blank lines.

    Raises:
        ValueError: no such file, not UTF-8 text, not JSON, or no list.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file (names on the hub: {', '.join(HUB)})") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder, not a file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if path.suffix.lower() == ".json":
        rows = parsed_json(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path}: not a JSON list; rows on lines of their own belong in a .jsonl file")
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1):
        if line.strip():
            yield f"{path}, line {number}", parsed_json(line, f"{path}, line {number}")


def last_box(text: str) -> str | None:
    r"""What stands in the last whole \boxed{...} or \fbox{...}; None without one.

    Braces are counted, escaped ones (\{ and \}) left out. Without braces, as in "\boxed 2", it is the next character
    or command, as in LaTeX. A box that is never closed, as in a text cut short, is passed over.
    """
    found = find_last_box(text)
    return None if found is None else found[1]


def find_last_box(text: str) -> tuple[int, str] | None:
    """Where the last whole box begins, and what stands in it, as ``last_box`` says."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text))
    ends = _closing_braces(text) if boxes else {}
    for found in reversed(boxes):
        if text.startswith("{", found.end()):
            inside = text[found.end() + 1 : ends[found.end()]] if found.end() in ends else None
        else:
            single = re.compile(r"\\[A-Za-z]+|[^\s}$\\]").match(text, found.end())
            inside = single.group() if single else None
        if inside is not None:
            return found.start(), inside.strip()
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """For the place of each brace that is closed, where."""
    ends, opened = {}, []
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text):
        if found.group() == "{":
            opened.append(found.start())
        elif found.group() == "}" and opened:
            ends[opened.pop()] = found.start()
    return ends


def _from_hub(name: str) -> Iterator[tuple[str, Any]]:
    from vblora.hub import from_hub

    for part in HUB[name][1]:
        rows = from_hub(functools.partial(_load_part, name, part), name, "a .jsonl file of the set")
        yield from ((f"{name} ({part}), row {number}", row) for number, row in enumerate(rows, 1))


def _load_part(name: str, part: str) -> Any:
    from datasets import load_dataset

    return load_dataset(name, part, split="test")


def _kind(row: Any, where: str) -> str:
    for kind, choices in COLUMNS.items():
        if isinstance(row, dict) and any(set(columns) <= set(row) for columns in choices):
            return kind
    raise ValueError(f"{where}: neither GSM8K's keys (question, answer) nor MATH's (instruction, output)")


def _problem(row: Any, kind: str, number: int, where: str) -> Problem:
    columns = next((one for one in COLUMNS[kind] if isinstance(row, dict) and set(one) <= set(row)), None)
    if columns is None:
        wanted = " or ".join(" and ".join(one) for one in COLUMNS[kind])
        raise ValueError(f"{where}: not a row of {kind}: needs the keys {wanted}")
    question, worked = row[columns[0]], row[columns[1]]
    if not isinstance(question, str) or not isinstance(worked, str):
        raise ValueError(f"{where}: {columns[0]} and {columns[1]} must be texts")
    reference = final_number(worked) if kind == "gsm8k" else last_box(worked)
    if not reference:
        lacking = 'a last line "#### " and a number' if kind == "gsm8k" else "a \\boxed{} with something in it"
        raise ValueError(f"{where}: {columns[1]} has no reference answer: it lacks {lacking}")
    for key in ("level", "type"):
        if isinstance(row.get(key), list | dict):
            raise ValueError(f"{where}: {key} must be a text")
    level, subject = (str(row.get(key) or "") for key in ("level", "type"))
    return Problem(number, question, reference, kind, level, subject)


def final_number(worked: str) -> str | None:
    """The number after the last "####" of a worked answer in GSM8K's form, as written; None without one."""
    found = re.search(r"####\s*([-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?)\s*$", worked.rpartition("\n")[2])
    return found.group(1) if found else None
