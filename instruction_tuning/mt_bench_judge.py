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
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from judge_endpoint import MAX_TOKENS, Endpoint, PromptRefused
from mt_bench import UNRATED, Bench, Judgment, append_line, judgments_file, mend_end, read_judgments
from mt_bench_tasks import Task, make_tasks, read_models, without_judgment
from vblora_experiments import bars, commands, progress
from vblora_experiments.thoughts import without_thoughts

TYPICAL_TOKENS = 250  # of a judgment, about a thousand characters; for the estimate alone
CHARACTERS_PER_TOKEN = 4
RATING = tuple(
    re.compile(pattern, re.IGNORECASE)
    for number in (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")
    for pattern in (rf"rating[^\[\]\d]{{0,20}}{number}", number)
)


@dataclass
class Options:
    """What is judged by whom; each field is the flag of its name."""

    answers: list[Path]
    judge: str = "gpt-4"
    bench_dir: Path | None = None
    output: Path | None = None
    turns: Sequence[int] = (1, 2)
    workers: int = 1
    requests_per_minute: float | None = None
    plan: bool = False
    yes: bool = False
    price_in: float | None = None
    price_out: float | None = None
    ask_again: int = 2
    tries: int = 10
    backoff: float = 2.0
    timeout: float = 120.0
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        commands.check_least(self, workers=1, tries=1, max_tokens=1, ask_again=0, backoff=0)
        for name in ("timeout", "requests_per_minute"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name} must be above 0, not {value}")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("--price_in and --price_out go together")

    def folder(self) -> Path:
        """Where judgments are kept: the folder that holds model_answer/, unless --output names another.

        Raises:
            ValueError: the answers are not in one such folder.
        """
        if self.output is not None:
            return self.output
        folders = {path.resolve().parent for path in self.answers}
        if len(folders) > 1 or (folder := folders.pop()).name != "model_answer":
            raise ValueError("the answers are not all in one folder model_answer: say with --output where to write")
        return folder.parent


def main(arguments: list[str]) -> Path:
    """Judge what has no judgment yet, and return the file of judgments."""
    return judge_answers(parse(arguments))


def judge_answers(options: Options) -> Path:
    """Judge what has no judgment yet; the file of judgments."""
    target = judgments_file(options.folder(), options.judge)
    tasks = make_tasks(Bench.of(options.bench_dir), read_models(options.answers), options.judge, options.turns)
    missing = without_judgment(tasks, options.judge, target)
    endpoint = endpoint_of(options)
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


def endpoint_of(options: Options) -> Endpoint:
    """The endpoint that the judge is asked at.

    Raises:
        ValueError: as `Endpoint.from_environment`.
    """
    return Endpoint.from_environment(
        options.judge,
        needed=not options.plan,
        tries=options.tries,
        backoff=options.backoff,
        timeout=options.timeout,
        seconds_between=60 / options.requests_per_minute if options.requests_per_minute else 0.0,
        max_tokens=options.max_tokens,
    )


def parse(arguments: list[str]) -> Options:
    parser = commands.one_line_errors(
        argparse.ArgumentParser(
            prog="mt_bench_judge.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
    )
    parser.add_argument("answers", type=Path, nargs="+", metavar="ANSWERS.jsonl", help="a model's answers each")
    parser.add_argument("--judge", help="the endpoint's name of the judging model; gpt-4 unless given")
    parser.add_argument("--bench_dir", type=Path, help="folder with MT-Bench's files; downloaded once unless given")
    parser.add_argument("--output", type=Path, help="the folder that holds model_answer/ unless given")
    parser.add_argument("--turns", type=int, nargs="+", choices=(1, 2))
    parser.add_argument("--workers", type=int, help="requests under way at a time")
    parser.add_argument("--requests_per_minute", type=float, help="start no more than this; no limit unless given")
    parser.add_argument("--plan", action="store_true", help="print the estimate and stop")
    parser.add_argument("--yes", action="store_true", help="do not ask before the first request")
    parser.add_argument("--price_in", type=float, help="dollars for a million prompt tokens, for the estimate")
    parser.add_argument("--price_out", type=float, help="dollars for a million tokens of judgments")
    parser.add_argument("--ask_again", type=int, help="times to ask again for a rating")
    parser.add_argument("--tries", type=int, help="of a request, before the command gives up")
    parser.add_argument(
        "--backoff", type=float, help="seconds that the second try waits beyond the client's; they double"
    )
    parser.add_argument("--timeout", type=float, help="seconds to wait for the endpoint to say something")
    parser.add_argument("--max_tokens", type=int, help="tokens of a judgment at most, a model's thoughts included")
    return commands.parsed(parser, Options, arguments)


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
            judged = bars.bar(as_completed(futures), "judging", total=len(futures))
            for number, future in enumerate(judged, 1):
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


if __name__ == "__main__":
    commands.run(main, "mt_bench_judge")
