"""MT-Bench: its questions, reference answers and judge prompts, and the files of answers and judgments.

Formats, file names and rules are those of FastChat's llm_judge (github.com/lm-sys/FastChat, fastchat/llm_judge), so
that either reads what the other wrote:

    question.jsonl                       {question_id, category, turns[, reference]}
    reference_answer/gpt-4.jsonl         as an answer; for the questions of math, reasoning and coding
    judge_prompts.jsonl                  {name, system_prompt, prompt_template, ...}; in FastChat one folder up
    model_answer/MODEL.jsonl             {question_id, answer_id, model_id, choices: [{index, turns}], tstamp}
    model_judgment/JUDGE_single.jsonl    {question_id, model, judge: [name, prompt], user_prompt, judgment, score,
                                          turn, tstamp}; score is -1 where the judge gave no rating

The first three are read from a folder, or downloaded once from a pinned commit and checked.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vblora.io import replacing
from vblora_experiments import progress

# FastChat's sampling temperatures; 0 is greedy.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
CATEGORIES = tuple(TEMPERATURES)
REFERENCED = ("math", "reasoning", "coding")  # judged beside a reference answer
# Questions whose reference answer (gpt-4.jsonl) is wrong in at least one of its two turns, as the authors of FastChat's
# pull request 3158 found when they checked all 30 by hand. They name questions, not turns: 104 is wrong in both (issue
# 3053), and for instance 113 and 120 only in the second (1 - 0.81 is 0.19, and f(2) is 0, as the references say).
KNOWN_WRONG = frozenset({104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130})
UNRATED = -1

COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
SOURCE = f"https://raw.githubusercontent.com/lm-sys/FastChat/{COMMIT}/fastchat/llm_judge/data"
CACHE = Path("~/.cache/vblora/mt_bench")
QUESTIONS, REFERENCES, PROMPTS = "question.jsonl", "reference_answer/gpt-4.jsonl", "judge_prompts.jsonl"
# Where each file is below SOURCE, and its SHA-256 at that commit.
FILES = {
    QUESTIONS: (f"mt_bench/{QUESTIONS}", "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"),
    REFERENCES: (f"mt_bench/{REFERENCES}", "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f"),
    PROMPTS: (PROMPTS, "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"),
}


class Question(NamedTuple):
    question_id: int
    category: str
    turns: list[str]

    @property
    def temperature(self) -> float:
        return TEMPERATURES[self.category]


class Prompt(NamedTuple):
    """What a judge is asked; the template's fields are FastChat's."""

    name: str
    system: str
    template: str


@dataclass
class Answer:
    """A model's answer to both turns of a question."""

    question_id: int
    answer_id: str
    model_id: str
    turns: list[str]
    tstamp: float

    def to_row(self) -> dict[str, Any]:
        return {
            "question_id": self.question_id,
            "answer_id": self.answer_id,
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": self.turns}],
            "tstamp": self.tstamp,
        }


@dataclass
class Judgment:
    """What a judge said about one turn of a model's answer."""

    question_id: int
    model: str
    judge: list[str]
    user_prompt: str
    judgment: str
    score: float
    turn: int
    tstamp: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        return (self.judge[0], self.model, self.question_id, self.turn)

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


# ------------------------------------------------------------------------------------------ the benchmark


@dataclass
class Bench:
    """The folder that holds the benchmark's files: as FastChat has them, or all in one folder."""

    folder: Path

    @classmethod
    def of(cls, bench_dir: Path | None) -> Bench:
        """The benchmark in this folder, or in a FastChat folder above it; downloaded unless a folder is given.

        Raises:
            ValueError: no questions there, or the download failed or is not the file of the pinned commit.
        """
        if bench_dir is None:
            return cls(download())
        for folder in (bench_dir, bench_dir / "mt_bench", bench_dir / "data" / "mt_bench"):
            if (folder / QUESTIONS).is_file():
                return cls(folder)
        raise ValueError(f"{bench_dir} holds no {QUESTIONS} of MT-Bench; without --bench_dir it is downloaded")

    def questions(self) -> dict[int, Question]:
        """All questions by number, in the order of the file."""
        found: dict[int, Question] = {}
        for where, row in read_lines(self.folder / QUESTIONS):
            question = Question(
                _take(row, "question_id", int, where), _take(row, "category", str, where), _texts(row, "turns", where)
            )
            if question.category not in TEMPERATURES:
                raise ValueError(f"{where}: no category of MT-Bench: {question.category!r}")
            if question.question_id in found:
                raise ValueError(f"{where}: question {question.question_id} stands there twice")
            found[question.question_id] = question
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the file of questions."""
        return hashlib.sha256((self.folder / QUESTIONS).read_bytes()).hexdigest()

    def references(self, judge: str) -> tuple[Path, dict[int, list[str]]]:
        """The reference answers by question, and their file: the judge's own, as FastChat takes it, or GPT-4's."""
        own = self.folder / "reference_answer" / f"{file_name(judge)}.jsonl"
        path = own if own.is_file() else self.folder / REFERENCES
        return path, {answer.question_id: answer.turns for answer in read_answers(path)}

    def prompts(self) -> dict[str, Prompt]:
        """The judge prompts by name."""
        beside = self.folder / PROMPTS
        path = beside if beside.is_file() else self.folder.parent / PROMPTS
        fields = ("name", "system_prompt", "prompt_template")
        prompts = [Prompt(*(_take(row, name, str, where) for name in fields)) for where, row in read_lines(path)]
        return {prompt.name: prompt for prompt in prompts}


def download() -> Path:
    """The folder that the benchmark's files were downloaded into; those that are missing or damaged are fetched.

    Raises:
        ValueError: a file cannot be had, or is not the one of the pinned commit. Nothing is kept of it then.
    """
    folder = CACHE.expanduser()
    for name, (place, digest) in FILES.items():
        path = folder / name
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            continue
        url = f"{SOURCE}/{place}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"{url}: {error}; name a folder with MT-Bench's files with --bench_dir DIR") from error
        if (found := hashlib.sha256(content).hexdigest()) != digest:
            raise ValueError(f"{url} is not the file it should be: SHA-256 {found}, not {digest}")
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return folder


# ------------------------------------------------------------------------------------ answers and judgments


def file_name(name: str) -> str:
    """The file name, without ending, that belongs to a model or judge; a name of the hub has its slash replaced.

    Raises:
        ValueError: a name that makes no file name.
    """
    made = name.replace("/", "--")
    if not made or made.startswith(".") or not made.isprintable() or "\\" in made:
        raise ValueError(f"{name!r} cannot name a file: take letters, digits, dots and dashes")
    return made


def answers_file(folder: Path, model_id: str) -> Path:
    return folder / "model_answer" / f"{file_name(model_id)}.jsonl"


def judgments_file(folder: Path, judge: str) -> Path:
    return folder / "model_judgment" / f"{file_name(judge)}_single.jsonl"


def read_answers(path: Path) -> list[Answer]:
    """The answers in a file; of a question that was answered twice the last, and of several choices the first.

    Raises:
        ValueError: a line that is no answer, by file and line; or answers of several models.
    """
    answers: dict[int, Answer] = {}
    for where, row in read_lines(path):
        choices = _take(row, "choices", list, where)
        if not choices or not isinstance(choices[0], dict):
            raise ValueError(f"{where}: choices must be a list of objects with turns")
        answer = Answer(
            question_id=_take(row, "question_id", int, where),
            answer_id=str(row.get("answer_id", "")),
            model_id=_take(row, "model_id", str, where),
            turns=_texts(choices[0], "turns", where),
            tstamp=_number({"tstamp": 0.0, **row}, "tstamp", where),
        )
        if any(other.model_id != answer.model_id for other in answers.values()):
            raise ValueError(f"{where}: the file holds answers of several models, {answer.model_id} among them")
        answers[answer.question_id] = answer
    return list(answers.values())


def read_judgments(path: Path, unfinished: bool = False) -> list[Judgment]:
    """The single-answer judgments in a file, in its order.

    Args:
        path: the file.
        unfinished: leave out what stands after the last line end: another process may be writing it.

    Raises:
        ValueError: a line that is none, by file and line.
    """
    judgments = []
    for where, row in read_lines(path, unfinished):
        judge = _texts(row, "judge", where)
        if (turn := _take(row, "turn", int, where)) not in (1, 2) or not judge:
            raise ValueError(f"{where}: turn must be 1 or 2, and judge name the judge; not {turn} and {judge}")
        judgments.append(
            Judgment(
                question_id=_take(row, "question_id", int, where),
                model=_take(row, "model", str, where),
                judge=judge,
                user_prompt=_take(row, "user_prompt", str, where),
                judgment=_take(row, "judgment", str, where),
                score=_number(row, "score", where),
                turn=turn,
                tstamp=_number({"tstamp": 0.0, **row}, "tstamp", where),
            )
        )
    return judgments


# ----------------------------------------------------------------------------------------------- JSON lines


def read_lines(path: Path, unfinished: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its place for messages; empty lines are skipped."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    # Not splitlines(): a text may hold other line ends than \n, and JSON need not escape them.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1] if unfinished else lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: no JSON object")
        yield where, row


def append_line(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a file, which is made if missing. In ASCII, as FastChat names no encoding when it reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    progress.append(path, (json.dumps(row) + "\n").encode("ascii"))


def mend_end(path: Path) -> None:
    """Make a file, if there is one, end with a whole line, so that more can follow: one that was cut off goes."""
    content = path.read_bytes() if path.exists() else b""
    whole, _, tail = content.rpartition(b"\n")
    if not tail:
        return
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        content = whole + b"\n" if whole else b""
    else:
        content += b"\n"  # whole, but written without a line end
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a file of JSON lines in place of what was there, in one step."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


def _take(row: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {name} must be {kind.__name__}, {_found(row, name)}")
    return value


def _number(row: dict[str, Any], name: str, where: str) -> float:
    """A number that can be reckoned with: JSON, as Python reads it, has NaN, Infinity and integers of any size."""
    value = row.get(name)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
    except OverflowError:
        pass
    raise ValueError(f"{where}: {name} must be a number, {_found(row, name)}")


def _found(row: dict[str, Any], name: str) -> str:
    """What stands there, for messages. A list is not shown: it may be nested deeper than Python can print."""
    if name not in row:
        return "and is missing"
    value = row[name]
    return f"not a {type(value).__name__}" if isinstance(value, list | dict) else f"not {str(value)[:40]!r}"


def _texts(row: dict[str, Any], name: str, where: str) -> list[str]:
    values: list[str] = _take(row, name, list, where)
    if not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: {name} must be a list of texts")
    return values
