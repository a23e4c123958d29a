"""Have a language model rate answers to MT-Bench, one at a time, from 1 to 10, as FastChat's single-answer grading.

    export OPENAI_API_KEY=...                  # and OPENAI_BASE_URL, for another endpoint than OpenAI's
    python instruction_tuning/mt_bench_judge.py data/mt_bench/model_answer/MODEL.jsonl --plan
    python instruction_tuning/mt_bench_judge.py data/mt_bench/model_answer/*.jsonl --judge gpt-4 --workers 4

Any endpoint with OpenAI's POST /chat/completions will do. The cost is estimated and asked about first (`--plan` stops
there, `--yes` does not ask). Adds to OUTPUT/model_judgment/JUDGE_single.jsonl, each judgment as it comes: what is
there already is not asked for again.

Prompts, temperature 0, at most 2048 tokens and the rating's two forms are those of FastChat's gen_judgment.py. A
judgment without a rating is asked for again (`--ask_again`), and then kept with score -1. Busy or broken endpoints are
tried again, more and more slowly; a refusal (a wrong key, an unknown model) ends the command.
"""

from __future__ import annotations

import argparse
import datetime
import email.utils
import http.client
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mt_bench import (
    KNOWN_WRONG,
    REFERENCED,
    REFERENCES,
    UNRATED,
    Answer,
    Bench,
    Judgment,
    Prompt,
    Question,
    append_line,
    judgments_file,
    mend_end,
    read_answers,
    read_judgments,
)
from vblora_experiments import commands

OPENAI = "https://api.openai.com/v1"
TEMPERATURE, MAX_TOKENS = 0, 2048  # FastChat's
TYPICAL_TOKENS = 250  # of a judgment, about a thousand characters; for the estimate alone
CHARACTERS_PER_TOKEN = 4
LONGEST_WAIT = 60.0  # seconds between two tries, unless the endpoint asks for more
LONGEST_ASKED = 900.0  # an endpoint that asks for a longer wait is left alone
RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def main(arguments: list[str]) -> Path:
    """Judge what has no judgment yet, and return the file of judgments."""
    options = parse(arguments)
    target = judgments_file(options.output, options.judge)
    tasks = make_tasks(Bench.of(options.bench_dir), read_models(options.answers), options.judge, options.turns)
    mend_end(target)
    missing = without_judgment(tasks, read_judgments(target) if target.exists() else [], options.judge, target)
    endpoint = Endpoint.from_environment(options)
    print(f"{target}: {len(tasks) - len(missing)} of {len(tasks)} judgments are there already")
    if missing:
        print(estimate(missing, endpoint, options.price_in, options.price_out))
    if options.plan or not missing:
        return target
    if not options.yes:
        confirm()
    judge_all(missing, endpoint, target, options.workers, options.ask_again)
    report_unrated(read_judgments(target), {task.key(options.judge) for task in tasks})
    return target


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(
            prog="mt_bench_judge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS.jsonl", help="a model's answers each")
    parser.add_argument("--judge", default="gpt-4", help="the endpoint's name of the judging model; gpt-4 unless given")
    parser.add_argument("--bench_dir", type=Path, help="folder with MT-Bench's files; downloaded once unless given")
    parser.add_argument("--output", type=Path, help="the folder that holds model_answer/ unless given")
    parser.add_argument("--turns", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--workers", type=int, default=1, help="requests under way at a time")
    parser.add_argument("--requests_per_minute", type=float, help="start no more than this; no limit unless given")
    parser.add_argument("--plan", action="store_true", help="print the estimate and stop")
    parser.add_argument("--yes", action="store_true", help="do not ask before the first request")
    parser.add_argument("--price_in", type=float, help="dollars for a million prompt tokens, for the estimate")
    parser.add_argument("--price_out", type=float, help="dollars for a million tokens of judgments")
    parser.add_argument("--ask_again", type=int, default=2, help="times to ask again for a rating")
    parser.add_argument("--tries", type=int, default=10, help="of a request, before the command gives up")
    parser.add_argument("--backoff", type=float, default=2.0, help="seconds before the second try; they double")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds to wait for the endpoint to say something"
    )
    options = parser.parse_args(arguments)
    for name, least in (("workers", 1), ("tries", 1), ("ask_again", 0), ("backoff", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(options, name)}")
    for name in ("timeout", "requests_per_minute"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, not {value}")
    if (options.price_in is None) != (options.price_out is None):
        raise ValueError("--price_in and --price_out go together")
    if options.output is None:
        folders = {path.resolve().parent for path in options.answers}
        if len(folders) > 1 or (folder := folders.pop()).name != "model_answer":
            raise ValueError("the answers are not all in one folder model_answer: say with --output where to write")
        options.output = folder.parent
    return options


# ------------------------------------------------------------------------------------------ what to judge


class Task(NamedTuple):
    """One turn of one answer, and what the judge is asked about it."""

    question: Question
    model: str
    turn: int
    prompt: Prompt
    user_prompt: str

    def key(self, judge: str) -> tuple[str, str, int, int]:
        return (judge, self.model, self.question.question_id, self.turn)


def read_models(paths: list[Path]) -> dict[str, list[Answer]]:
    """The answers by model.

    Raises:
        ValueError: a file without answers, or two of one model.
    """
    models: dict[str, list[Answer]] = {}
    for path in paths:
        answers = read_answers(path)
        if not answers:
            raise ValueError(f"{path} holds no answers")
        if answers[0].model_id in models:
            raise ValueError(f"{path}: another file has answers of a model called {answers[0].model_id} too")
        models[answers[0].model_id] = answers
    return models


def make_tasks(bench: Bench, models: dict[str, list[Answer]], judge: str, turns: Iterable[int]) -> list[Task]:
    """All there is to judge, turn by turn and model by model.

    Raises:
        ValueError: an answer to no question of the benchmark, or one without a turn; or a reference is missing.
    """
    questions, prompts, (file, references) = bench.questions(), bench.prompts(), bench.references(judge)
    for model, answers in models.items():
        if len(answers) < len(questions):
            print(f"{model}: {len(answers)} of the {len(questions)} questions are answered; the rest are not judged")
    tasks = []
    for turn in sorted(set(turns)):
        for model, answers in models.items():
            for answer in answers:
                if (question := questions.get(answer.question_id)) is None:
                    raise ValueError(f"{model} answers question {answer.question_id}, which {bench.folder} has not")
                if turn > len(question.turns):
                    continue  # as FastChat does
                tasks.append(make_task(question, answer, turn, prompts, references.get(question.question_id), file))
    doubtful = {task.question.question_id for task in tasks} & KNOWN_WRONG
    if doubtful and file == bench.folder / REFERENCES:
        numbers = ", ".join(map(str, sorted(doubtful)))
        print(f"{file.name} is known to be wrong on {len(doubtful)} of these questions (FastChat #3158): {numbers}")
    return tasks


def make_task(
    question: Question,
    answer: Answer,
    turn: int,
    prompts: dict[str, Prompt],
    reference: list[str] | None,
    reference_file: Path,
) -> Task:
    """The prompt that FastChat would send: with the reference answers in three categories, and for turn 2 with both."""
    fields: dict[str, str] = {}
    name = "single-math-v1" if question.category in REFERENCED else "single-v1"
    if question.category in REFERENCED:
        if reference is None or len(reference) < turn:
            raise ValueError(f"{reference_file} has no answer to question {question.question_id}, turn {turn}")
        fields |= {f"ref_answer_{number}": text for number, text in enumerate(reference, 1)}
    if len(answer.turns) < turn:
        raise ValueError(f"{answer.model_id} has no answer to turn {turn} of question {question.question_id}")
    if turn == 1:
        fields |= {"question": question.turns[0], "answer": answer.turns[0]}
    else:
        name += "-multi-turn"
        fields |= {f"question_{number}": text for number, text in enumerate(question.turns, 1)}
        fields |= {f"answer_{number}": text for number, text in enumerate(answer.turns, 1)}
    try:
        text = prompts[name].template.format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"the judge prompts have no {name}, or not with MT-Bench's fields: {error}") from error
    return Task(question, answer.model_id, turn, prompts[name], text)


def without_judgment(tasks: list[Task], judged: list[Judgment], judge: str, target: Path) -> list[Task]:
    """The tasks that are still to do.

    Raises:
        ValueError: a judgment is of another answer of a model with this name.
    """
    asked = {judgment.key: judgment.user_prompt for judgment in judged}
    for task in tasks:
        if asked.get(task.key(judge), task.user_prompt) != task.user_prompt:
            raise ValueError(
                f"{target} holds judgments of other answers of {task.model} (question {task.question.question_id}, "
                f"turn {task.turn}): remove them, or give another --output"
            )
    return [task for task in tasks if task.key(judge) not in asked]


def estimate(tasks: list[Task], endpoint: Endpoint, price_in: float | None, price_out: float | None) -> str:
    """Requests, tokens and price, in words."""
    characters = sum(len(task.prompt.system) + len(task.user_prompt) for task in tasks)
    tokens_in = characters // CHARACTERS_PER_TOKEN
    tokens_out, most = len(tasks) * TYPICAL_TOKENS, len(tasks) * MAX_TOKENS
    text = (
        f"{len(tasks)} requests to {endpoint.judge} at {endpoint.url}\n"
        f"an estimate, at {CHARACTERS_PER_TOKEN} characters a token: {tokens_in:,} tokens of prompts, and "
        f"{tokens_out:,} of judgments ({TYPICAL_TOKENS} each; at most {most:,})"
    )
    if price_in is None or price_out is None:
        return f"{text}\nwith --price_in and --price_out: what that costs"
    prices = [(tokens_in * price_in + tokens * price_out) / 1e6 for tokens in (tokens_out, most)]
    return f"{text}\nan estimate of the price: ${prices[0]:.2f} (at most ${prices[1]:.2f}), without requests sent again"


def confirm() -> None:
    """Ask before money is spent.

    Raises:
        ValueError: the answer is no, or nobody is there to give one.
    """
    if not sys.stdin.isatty():
        raise ValueError("nothing has been sent: add --yes to send the requests")
    if input("send them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing has been sent")


# ---------------------------------------------------------------------------------------------- judging


def judge_all(tasks: list[Task], endpoint: Endpoint, target: Path, workers: int, ask_again: int) -> None:
    """Judge, and add each judgment to the file as it comes.

    Raises:
        ValueError: the endpoint refuses or stays out of reach. What has been judged is in the file.
    """
    lock = threading.Lock()

    def one(task: Task) -> Judgment:
        try:
            judgment = judge_one(task, endpoint, ask_again)
            with lock:
                append_line(target, judgment.to_row())
        except Exception as error:
            endpoint.stop(str(error))  # here, before this thread begins its next task
            raise
        return judgment

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, task) for task in tasks]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                done = future.result()
                place = f"{done.model}, question {done.question_id}, turn {done.turn}"
                print(f"{number}/{len(tasks)}: {place}: {done.score}", flush=True)
        except BaseException:  # an interruption too: begin nothing more, and keep what is under way
            endpoint.stop("interrupted")
            pool.shutdown(cancel_futures=True)
            raise


def judge_one(task: Task, endpoint: Endpoint, ask_again: int) -> Judgment:
    """Ask for a judgment until one has a rating, at most so many times again."""
    messages = [{"role": "system", "content": task.prompt.system}, {"role": "user", "content": task.user_prompt}]
    for _ in range(1 + ask_again):
        text = endpoint.complete(messages)
        if (score := rating(text)) != UNRATED:
            break
    return Judgment(
        question_id=task.question.question_id,
        model=task.model,
        judge=[endpoint.judge, task.prompt.name],
        user_prompt=task.user_prompt,
        judgment=text,
        score=score,
        turn=task.turn,
        tstamp=time.time(),
    )


def rating(judgment: str) -> float:
    """The first number in double brackets, or else in single ones; -1 if there is none."""
    for pattern in RATING:
        if found := pattern.search(judgment):
            return float(found[1]) if "." in found[1] else int(found[1])
    return UNRATED


def report_unrated(judgments: list[Judgment], keys: set[tuple[str, str, int, int]]) -> None:
    """Say which judgments have no rating."""
    unrated = [judgment for judgment in judgments if judgment.key in keys and judgment.score == UNRATED]
    for judgment in unrated:
        print(f"no rating: {judgment.model}, question {judgment.question_id}, turn {judgment.turn}")
    print(f"{len(keys)} judgments, {len(unrated)} of them without a rating (score -1)")


# --------------------------------------------------------------------------------------------- the endpoint


class Refused(ValueError):
    """The endpoint will not answer this, however often it is asked."""


class Unanswered(Exception):
    """The endpoint did not answer; it may later, and perhaps said when."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: urllib would send the key on to wherever it leads."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint, asked patiently. Threads may share one."""

    url: str
    key: str = field(repr=False)
    judge: str
    tries: int = 10
    backoff: float = 2.0
    timeout: float = 120.0
    seconds_between: float = 0.0

    def __post_init__(self) -> None:
        self._stopped, self._why = threading.Event(), ""
        self._opener = urllib.request.build_opener(NoRedirect)
        self._lock = threading.Lock()
        self._next = 0.0

    @classmethod
    def from_environment(cls, options: argparse.Namespace) -> Endpoint:
        """The endpoint that OPENAI_BASE_URL and OPENAI_API_KEY name, asked as the command line says.

        Raises:
            ValueError: no address, or no key for OpenAI itself.
        """
        url = (os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"OPENAI_BASE_URL must begin with http:// or https://, not {url!r}")
        if not key and url == OPENAI and not options.plan:
            raise ValueError("OPENAI_API_KEY is not set; an endpoint without a key is named by OPENAI_BASE_URL")
        if not (key.isascii() and key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds characters that no key has")
        between = 60 / options.requests_per_minute if options.requests_per_minute else 0.0
        return cls(url, key, options.judge, options.tries, options.backoff, options.timeout, between)

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The model's reply to these messages.

        Raises:
            ValueError: the endpoint refuses, or has not answered in so many tries.
        """
        for attempt in range(self.tries):
            self._await_turn()
            try:
                return self._ask(messages)
            except Unanswered as failure:
                why = str(failure)
                if attempt + 1 < self.tries:
                    # Doubling, and spread so that several workers do not come back at once.
                    wait = min(LONGEST_WAIT, self.backoff * 2 ** min(attempt, 30)) * random.uniform(0.5, 1.0)
                    wait = max(wait, failure.wait)
                    print(f"try {attempt + 1} of {self.tries}: {why}; again in {wait:.1f} s", file=sys.stderr)
                    self._pause(wait)
        raise ValueError(f"{self.url} did not answer in {self.tries} tries: {why}; the same command goes on from here")

    def stop(self, why: str) -> None:
        """Send nothing more; whoever is about to, or waits to, is told the first reason given."""
        with self._lock:
            self._why = self._why or why
            self._stopped.set()

    def _await_turn(self) -> None:
        """Wait until another request may start."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self.seconds_between
        self._pause(start - time.monotonic())

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise Refused(self._why)

    def _ask(self, messages: list[dict[str, str]]) -> str:
        """One request.

        Raises:
            Refused: the endpoint said no.
            Unanswered: anything that may pass.
        """
        body = {"model": self.judge, "messages": messages, "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS, "n": 1}
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return _reply(response.read())
        except urllib.error.HTTPError as error:
            raise self._failure(error) from None
        except (OSError, http.client.HTTPException) as error:  # out of reach, cut off, or too slow
            raise Unanswered(self._shown(str(error) or type(error).__name__)) from error

    def _failure(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means: too many requests, a timeout or a broken server may pass; the rest will not."""
        try:
            text = error.read().decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        said = self._shown(f"{error.code} {error.reason}: {_message(text)}")
        spent = "insufficient_quota" in text  # OpenAI's 429 for an empty account
        if (error.code in (408, 429) and not spent) or error.code >= 500:
            wait = _seconds(error.headers.get("Retry-After"))
            return Unanswered(said, wait) if wait <= LONGEST_ASKED else Refused(f"{said} (to wait {wait:.0f} s)")
        if 300 <= error.code < 400:
            said += f" to {error.headers.get('Location')}: set OPENAI_BASE_URL to where it is"
        return Refused(f"{self.url} refuses: {said}")

    def _shown(self, text: str) -> str:
        """The text on one line and without the key."""
        text = " ".join(text.split())
        return (text.replace(self.key, "***") if self.key else text)[:500]


def _reply(content: bytes) -> str:
    """The text in a chat completion; a reply without text, such as a refusal to judge, is an empty one."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Unanswered(f"it answered with no chat completion: {content[:80].decode(errors='replace')!r}") from error
    return text if isinstance(text, str) else ""


def _message(text: str) -> str:
    """What an error page says: OpenAI's {"error": {"message": ...}} and its kind, or the page."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = value.get("error", value) if isinstance(value, dict) else value
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _seconds(retry_after: str | None) -> float:
    """The wait that a Retry-After header asks for, in seconds or as a date; 0 for none."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=datetime.timezone.utc)
    return max(0.0, (when - datetime.datetime.now(datetime.timezone.utc)).total_seconds())


if __name__ == "__main__":
    commands.run(main, "mt_bench_judge")
