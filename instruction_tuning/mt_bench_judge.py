"""Have a language model rate answers to MT-Bench, one at a time, from 1 to 10, as FastChat's single-answer grading.

    export OPENAI_API_KEY=...                  # and OPENAI_BASE_URL, for another endpoint than OpenAI's
    python instruction_tuning/mt_bench_judge.py data/mt_bench/model_answer/MODEL.jsonl --plan
    python instruction_tuning/mt_bench_judge.py data/mt_bench/model_answer/*.jsonl --judge gpt-4 --workers 4

Any endpoint with OpenAI's POST /chat/completions will do. The cost is estimated and asked about first (`--plan` stops
there, `--yes` does not ask). Adds to OUTPUT/model_judgment/JUDGE_single.jsonl, each judgment as it comes: what is
there already is not asked for again. Of several commands on one file each waits for the one before.

Prompts, temperature 0, at most 2048 tokens and the rating's two forms are those of FastChat's gen_judgment.py. Two
things differ. A model that refuses temperature 0 or max_tokens is asked without, or with max_completion_tokens. And
where a text has several ratings FastChat takes the first; here the last one counts, and none within <think>...</think>,
as a judge that thinks aloud weighs other ratings before it gives its own.

A judgment without a rating is asked for again (`--ask_again`), and then kept with score -1. Busy or broken endpoints
are tried again, more and more slowly. A prompt that is refused (by a content filter, or as too long) is passed over,
and named at the end; a refusal of everything (a wrong key, an unknown model) ends the command.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import random
import re
import sys
import threading
import time
import urllib.parse
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
from vblora_experiments import commands, progress
from vblora_experiments.thoughts import without_thoughts

OPENAI = "https://api.openai.com/v1"
TEMPERATURE, MAX_TOKENS = 0, 2048  # FastChat's
TYPICAL_TOKENS = 250  # of a judgment, about a thousand characters; for the estimate alone
CHARACTERS_PER_TOKEN = 4
LONGEST_WAIT = 60.0  # seconds that are added before a try, at most
REFUSED_FIRST = 10  # prompts refused before any is answered: the reason is not in the prompts
RATING = tuple(
    re.compile(pattern, re.IGNORECASE)
    for number in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")
    for pattern in (rf"rating[^\[\]\d]{{0,20}}{number}", number)
)


def main(arguments: list[str]) -> Path:
    """Judge what has no judgment yet, and return the file of judgments."""
    options = parse(arguments)
    target = judgments_file(options.output, options.judge)
    tasks = make_tasks(Bench.of(options.bench_dir), read_models(options.answers), options.judge, options.turns)
    missing = without_judgment(tasks, options.judge, target)
    endpoint = Endpoint.from_environment(options)
    print(f"{target}: {len(tasks) - len(missing)} of {len(tasks)} judgments are there already")
    if missing:
        print(estimate(missing, endpoint, options.price_in, options.price_out))
    if options.plan or not missing:
        return target
    if not options.yes:
        confirm()
    with progress.alone(target, wait=True):
        mend_end(target)
        missing = without_judgment(missing, options.judge, target)  # another command may have come first
        refused = judge_all(missing, endpoint, target, options.workers, options.ask_again)
    judgments = read_judgments(target, unfinished=True) if target.exists() else []
    report(judgments, {task.key(options.judge) for task in tasks}, refused)
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
    parser.add_argument(
        "--backoff", type=float, default=2.0, help="seconds that the second try waits beyond the client's; they double"
    )
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds to wait for the endpoint to say something"
    )
    parser.add_argument(
        "--max_tokens", type=int, default=MAX_TOKENS, help="tokens of a judgment at most, a model's thoughts included"
    )
    options = parser.parse_args(arguments)
    for name, least in (("workers", 1), ("tries", 1), ("max_tokens", 1), ("ask_again", 0), ("backoff", 0)):
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

    @property
    def place(self) -> str:
        return f"{self.model}, question {self.question.question_id}, turn {self.turn}"

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


def without_judgment(tasks: list[Task], judge: str, target: Path) -> list[Task]:
    """The tasks that the file of judgments, if there is one, has no judgment of.

    Raises:
        ValueError: a judgment is of another answer of a model with this name.
    """
    judged = read_judgments(target, unfinished=True) if target.exists() else []
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
    tokens_out, most = len(tasks) * TYPICAL_TOKENS, len(tasks) * endpoint.max_tokens
    text = (
        f"{len(tasks)} requests to {endpoint.judge} at {endpoint.place}\n"
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


def judge_all(
    tasks: list[Task], endpoint: Endpoint, target: Path, workers: int, ask_again: int
) -> list[tuple[Task, str]]:
    """Judge, and add each judgment to the file as it comes; gives the tasks whose prompt was refused, and why.

    Raises:
        ValueError: the endpoint refuses or stays out of reach. What has been judged is in the file.
    """
    lock = threading.Lock()

    def one(task: Task) -> tuple[Task, str, str]:
        """The task, its score in words, and why it has none."""
        try:
            judgment = judge_one(task, endpoint, ask_again)
            with lock:
                append_line(target, judgment.to_row())
        except PromptRefused as refusal:
            return task, "refused", str(refusal)
        except Exception as error:
            endpoint.stop(str(error))  # here, before this thread begins its next task
            raise
        return task, str(judgment.score), ""

    refused = []
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, task) for task in tasks]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                task, score, why = future.result()
                print(f"{number}/{len(tasks)}: {task.place}: {score}", flush=True)
                if why:
                    refused.append((task, why))
        except BaseException:  # an interruption too: begin nothing more, and keep what is under way
            endpoint.stop("interrupted")
            pool.shutdown(cancel_futures=True)
            raise
    return refused


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
    """The last number in double brackets, or else in single ones; -1 if there is none. Thoughts do not count.

    One after the word "rating", as the prompts ask for, goes before others of its kind.
    """
    said = without_thoughts(judgment)
    for pattern in RATING:
        if found := pattern.findall(said):
            return float(found[-1]) if "." in found[-1] else int(found[-1])
    return UNRATED


def report(judgments: list[Judgment], keys: set[tuple[str, str, int, int]], refused: list[tuple[Task, str]]) -> None:
    """Say which judgments have no rating, and which are missing."""
    present = [judgment for judgment in judgments if judgment.key in keys]
    unrated = [judgment for judgment in present if judgment.score == UNRATED]
    for judgment in unrated:
        print(f"no rating: {judgment.model}, question {judgment.question_id}, turn {judgment.turn}")
    for task, why in refused:
        print(f"no judgment: {task.place}: {why}")
    print(f"{len(present)} judgments, {len(unrated)} of them without a rating (score -1)")
    if refused:
        print(f"{len(refused)} judgments are missing, as their prompts were refused; the same command asks again")


# --------------------------------------------------------------------------------------------- the endpoint


class Refused(ValueError):
    """The endpoint will not answer, however often it is asked."""


class PromptRefused(Exception):
    """The endpoint will not answer this prompt."""


# A refusal with status 400 that has nothing to do with the prompt.
_OF_ALL = re.compile(
    r"api[ _-]?key|model_not_found|invalid_model|model\b.{0,80}\b(?:not exist|not found|not a valid|unknown)"
    r"|credit|billing|quota|unauthori[sz]ed|authenticat",
    re.IGNORECASE | re.DOTALL,
)
_OF_CONTENT = re.compile(r"moderat|flagged|content|filter|policy|safety|inspection", re.IGNORECASE)
_NOT_TAKEN = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|unexpected|invalid|extra[ _](?:inputs|forbidden)|not permitted"
    r"|not allowed|deprecated|no longer|must be|\bonly\b|strictly",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(r"context[ _]length|context window|too (?:long|large|many)|maximum context", re.IGNORECASE)


def _of_prompt(status: int, text: str) -> bool:
    """Whether a refusal is of the prompt that was sent, and not of the key, the model or the account."""
    if status in (403, 451):
        return bool(_OF_CONTENT.search(text))
    of_all = _OF_ALL.search(text) and not _OF_CONTENT.search(text) and not _TOO_LONG.search(text)
    return status in (400, 413, 422) and not of_all


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint, asked patiently through OpenAI's client. Threads may share one."""

    url: str
    key: str = field(repr=False)
    judge: str
    tries: int = 10
    backoff: float = 2.0
    timeout: float = 120.0
    seconds_between: float = 0.0
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        self._stopped, self._why = threading.Event(), ""
        self._lock = threading.Lock()
        self._next = 0.0
        self._client: Any = None
        self._not_taken: set[str] = set()  # parameters that the model refuses
        self._answered, self._refused = False, 0

    @classmethod
    def from_environment(cls, options: argparse.Namespace) -> Endpoint:
        """The endpoint that OPENAI_BASE_URL and OPENAI_API_KEY name, asked as the command line says.

        Raises:
            ValueError: no address, no key for OpenAI itself, or no client.
        """
        url = (os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"OPENAI_BASE_URL must begin with http:// or https://, not {masked(url, key)!r}")
        if not key and url == OPENAI and not options.plan:
            raise ValueError("OPENAI_API_KEY is not set; an endpoint without a key is named by OPENAI_BASE_URL")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("OPENAI_API_KEY holds characters that no key has")
        if not options.plan and importlib.util.find_spec("openai") is None:
            raise ValueError("judging needs OpenAI's client: pip install openai")
        between = 60 / options.requests_per_minute if options.requests_per_minute else 0.0
        names = (options.judge, options.tries, options.backoff, options.timeout, between, options.max_tokens)
        return cls(url, key, *names)

    @property
    def place(self) -> str:
        """The address for messages: without a name, a password or a query in it."""
        address = urllib.parse.urlsplit(self.url)
        host = address.netloc.rpartition("@")[2]
        return masked(f"{address.scheme}://{host}{address.path}", self.key, words=False)

    def complete(self, messages: list[dict[str, str]]) -> str:
        """The model's reply to these messages.

        Raises:
            PromptRefused: the endpoint refuses these messages.
            ValueError: the endpoint refuses to answer at all, or has not answered in so many tries.
        """
        import openai

        while True:
            sent = self._parameters()
            headers = None if self.key else {"Authorization": openai.Omit()}
            try:
                response = self._connected().chat.completions.with_raw_response.create(
                    model=self.judge, messages=messages, extra_headers=headers, **sent
                )
            except openai.APIStatusError as error:
                if self._goes_without(error.response.status_code, error.response.text, sent):
                    continue
                raise self._failure(error.response) from None
            except openai.APIConnectionError as error:  # out of reach, cut off, too slow, or no chat completion
                cause = error.__cause__ or error
                raise self._given_up(self._shown(str(cause) or type(cause).__name__)) from None
            except openai.OpenAIError as error:
                raise Refused(self._shown(str(error))) from None
            self._answered = True
            return masked(reply(response.http_response.content), self.key, words=False)

    def stop(self, why: str) -> None:
        """Send nothing more; whoever is about to, or waits to, is told the first reason given."""
        with self._lock:
            self._why = self._why or why
            self._stopped.set()

    # ---------------------------------------------------------------------------------- the client

    def _connected(self) -> Any:
        """The client. It tries again by itself; what it does before and after each try is said here."""
        import openai

        with self._lock:
            if self._client is None:
                # A redirection is an error: the key would be sent on to wherever it leads.
                hooks: dict[str, list[Any]] = {"request": [self._before], "response": [self._after]}
                try:
                    self._client = openai.OpenAI(
                        api_key=self.key or "none",
                        base_url=self.url,
                        max_retries=self.tries - 1,
                        timeout=self.timeout,
                        http_client=openai.DefaultHttpxClient(follow_redirects=False, event_hooks=hooks),
                    )
                except Exception as error:  # an address or a proxy that is none, in several libraries' words
                    raise Refused(f"{self.place} cannot be asked: {self._shown(str(error))}") from None
        return self._client

    def _before(self, request: Any) -> None:
        """Wait until a request may start; beyond the client's own waiting before another try."""
        if tried := int(request.headers.get("x-stainless-retry-count", 0)):
            # Doubling, and spread so that several workers do not come back at once.
            wait = min(LONGEST_WAIT, self.backoff * 2 ** min(tried - 1, 30)) * random.uniform(0.5, 1.0)
            print(f"{self.place} did not answer: try {tried + 1} of {self.tries}", file=sys.stderr)
            self._pause(wait)
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self.seconds_between
        self._pause(start - time.monotonic())

    def _after(self, response: Any) -> None:
        """Make an error of an answer that the client would take for a good one, and end what it would try in vain."""
        import httpx2  # the client's own library

        response.read()
        if response.status_code == 429 and "insufficient_quota" in response.text:  # OpenAI's for an empty account
            raise self._failure(response)
        if response.status_code == 200:
            try:
                reply(response.content)
            except ValueError as error:
                raise httpx2.DecodingError(str(error), request=response.request) from None

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(max(0.0, seconds)):
            raise Refused(self._why)

    # ---------------------------------------------------------------------------------- parameters

    def _parameters(self) -> dict[str, Any]:
        """FastChat's, but for those that the model has refused."""
        limit = next((n for n in ("max_tokens", "max_completion_tokens") if n not in self._not_taken), None)
        return {
            **({} if "temperature" in self._not_taken else {"temperature": TEMPERATURE}),
            **({limit: self.max_tokens} if limit else {}),
        }

    def _goes_without(self, status: int, text: str, sent: dict[str, Any]) -> bool:
        """Whether a refusal was of a parameter that was sent; it is not sent again in this run."""
        if status not in (400, 422) or not _NOT_TAKEN.search(text) or _TOO_LONG.search(text) or "content_" in text:
            return False
        named = {name: found for name in sent if (found := re.search(rf"\b{name}\b", text))}
        if not named:
            return False
        name = min(named, key=lambda name: named[name].start())  # "use max_completion_tokens instead" comes second
        with self._lock:
            if name not in self._not_taken:
                self._not_taken.add(name)
                print(f"{self.judge} does not take {name}={sent[name]}: asked without it from here on", file=sys.stderr)
        return True

    # ---------------------------------------------------------------------------------- refusals

    def _failure(self, response: Any) -> Exception:
        """What an HTTP status means, once the client has given up."""
        status = response.status_code
        said = self._shown(f"{response.reason_phrase}: {_message(response.text)}")
        if 300 <= status < 400:
            said += f" to {self._shown(response.headers.get('Location', ''))}: set OPENAI_BASE_URL to where it is"
        elif (status in (408, 409, 429) or status >= 500) and "insufficient_quota" not in response.text:
            tried = 1 + int(response.request.headers.get("x-stainless-retry-count", 0))
            if tried >= self.tries:
                return self._given_up(f"{status} {said}")
            if wait := response.headers.get("Retry-After"):
                said += f" (it asks to wait: {self._shown(wait)})"
        elif _of_prompt(status, response.text):
            return self._prompt_refused(f"{status} {said}")
        return Refused(f"{self.place} refuses: {status} {said}")

    def _prompt_refused(self, said: str) -> Exception:
        with self._lock:
            self._refused += 1
            if not self._answered and self._refused >= REFUSED_FIRST:
                return Refused(f"{self.place} refuses the first {self._refused} prompts: {said}")
        return PromptRefused(said)

    def _given_up(self, why: str) -> Refused:
        return Refused(f"{self.place} did not answer in {self.tries} tries: {why}; the same command goes on from here")

    def _shown(self, text: str) -> str:
        """What the endpoint said: on one line, without the key."""
        text = "".join(letter if letter.isprintable() else " " for letter in masked(text, self.key))
        return masked(" ".join(text.split()), self.key)[:500]


SHORT_KEY = 8  # characters; parts of a key that are as long give it away, and shorter ones are found in any text


def masked(text: str, key: str, words: bool = True) -> str:
    """The text with *** for the key and long parts of it, also as it is written in addresses, JSON and Base64.

    A key below SHORT_KEY characters is masked where it stands as a word, or with `words` unset not at all: its letters
    are those of other words.
    """
    if not key:
        return text
    if len(key) < SHORT_KEY:
        return re.sub(rf"(?<![A-Za-z0-9]){re.escape(key)}(?![A-Za-z0-9])", "***", text) if words else text
    coded = base64.b64encode(key.encode(errors="replace")).decode()
    forms = (key, urllib.parse.quote(key, safe=""), json.dumps(key)[1:-1], coded.rstrip("="))
    parts = {form.lower()[at : at + SHORT_KEY] for form in forms for at in range(len(form) - SHORT_KEY + 1)}
    folded = "".join(letter.lower() if letter.isascii() else letter for letter in text)  # as long as the text
    shown, at, hidden_to = "", 0, 0
    while at < len(text):
        if folded[at : at + SHORT_KEY] in parts:
            shown += "" if at <= hidden_to and hidden_to else "***"
            hidden_to = at + SHORT_KEY
        elif at >= hidden_to:
            shown += text[at]
        at += 1
    return shown


def reply(content: bytes) -> str:
    """The text in a chat completion, which may come in parts; one without text, such as a refusal, may be empty.

    Raises:
        ValueError: this is no chat completion.
    """
    try:
        message = json.loads(content)["choices"][0]["message"]
        said = _text(message.get("content")) or _text(message.get("refusal"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        said = None
    if said is None:
        raise ValueError(f"it answered with no chat completion: {content[:2000].decode(errors='replace')!r}")
    return said


def _text(content: Any) -> str:
    """The text of a message's content: a text, or parts; those that hold thoughts or no text are left out."""
    if isinstance(content, str):
        return content
    said = []
    for part in content if isinstance(content, list) else [content]:
        value = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        value = value.get("value") if isinstance(value, dict) else value
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if isinstance(value, str) and kind in ("text", "output_text", "refusal"):
            said.append(value)
    return "".join(said)


def _message(text: str) -> str:
    """What an error page says: OpenAI's {"error": {"message": ...}} and its kind, or the page."""
    try:
        value = json.loads(text)
        error = value.get("error", value) if isinstance(value, dict) else value
        return str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        return text


if __name__ == "__main__":
    commands.run(main, "mt_bench_judge")
