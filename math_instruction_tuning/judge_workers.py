"""Judge pairs of MATH answers in worker processes, each pair within a limit of time and one of memory.

Both rules hand answers to SymPy, which takes some of them for minutes and never comes back from others. The alarm
signal that math-verify sets against that works in a main thread on Unix only, and not inside a long computation in C;
ending a process always works. Each worker is this file run as a script: it reads one JSON list [rule, answer,
reference] per line and answers each with one line. A worker that is ended, or dies, is replaced by a new one.

An answer such as [0]*8*10**8 is an expression that takes gigabytes. A worker can have MEMORY_LIMIT beyond what it began
with, where the system can be told so (Linux); nor can it write a file. What memory is short for is judged once more in
a new worker, since pairs before it may have left things in the old one, and then counts as wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TIME_LIMIT = 10.0  # seconds for a pair
START_LIMIT = 120.0  # seconds for a worker to import SymPy and math-verify
MEMORY_LIMIT = 2**30  # bytes for a pair, beyond those of the imports
TIMED_OUT = "timed out"
OUT_OF_MEMORY = f"needed more than {MEMORY_LIMIT // 2**20} MiB of memory"
DIED = "the worker process died"


class Pair(NamedTuple):
    """The rule to judge by ("authors" or "corrected"), an answer, extracted from its output before, and a reference."""

    rule: str
    answer: str
    reference: str


class Verdict(NamedTuple):
    """Whether a pair is right, and what went wrong in judging it: nothing, TIMED_OUT, or an error in words."""

    correct: bool
    problem: str = ""


def judge(pairs: Sequence[Pair], workers: int = 1, time_limit: float = TIME_LIMIT) -> list[Verdict]:
    """A verdict for each pair, in order, whatever the number of workers. One that timed out or failed is wrong.

    Raises:
        ValueError: not at least 1 worker, a time limit not above 0, or workers that do not start.
    """
    from vblora_experiments import bars  # a worker has no use for it

    if workers < 1 or not time_limit > 0:
        raise ValueError(f"judging needs at least 1 worker and a time limit above 0, not {workers} and {time_limit}")
    verdicts = [Verdict(False)] * len(pairs)
    waiting = deque(enumerate(pairs))

    count, moving = bars.counter(len(pairs), "scoring"), threading.Lock()

    def work() -> None:
        worker = _Worker()
        try:
            while waiting:
                try:
                    place, pair = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                verdicts[place] = worker.judge(pair, time_limit)
                with moving:
                    count.update()
        finally:
            worker.end()

    with ThreadPoolExecutor(workers) as pool:
        working = [pool.submit(work) for _ in range(min(workers, len(pairs)))]
        try:
            for each in working:
                each.result()
        finally:
            waiting.clear()  # after an error or Ctrl-C, the other threads end with their present pair
    count.close()
    return verdicts


class _Worker:
    """A process that judges one pair at a time; it is started when there is a pair for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def judge(self, pair: Pair, time_limit: float) -> Verdict:
        used = self._process is not None
        verdict = self._judged(pair, time_limit)
        if used and verdict.problem in (OUT_OF_MEMORY, DIED):
            return self._judged(pair, time_limit)
        return verdict

    def _judged(self, pair: Pair, time_limit: float) -> Verdict:
        if self._process is None:
            self._process = self._start()
        reply, timed_out = self._ask(self._process, json.dumps(pair), time_limit)
        verdict = Verdict(False, TIMED_OUT if timed_out else DIED)
        if reply:
            verdict = Verdict(*json.loads(reply))
        if not reply or timed_out or verdict.problem == OUT_OF_MEMORY:
            self.end()
        return verdict

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the order in SymPy's sets, thus its steps
        )
        if not self._ask(process, json.dumps(None), START_LIMIT)[0]:
            process.kill()
            process.communicate()
            raise ValueError(f"a worker process did not start: `{sys.executable} {__file__}` ended")
        return process

    @staticmethod
    def _ask(process: subprocess.Popen[str], line: str, time_limit: float) -> tuple[str, bool]:
        """The answering line, empty where the process ended; and whether it was ended because of the time limit."""
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            process.kill()

        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(time_limit, end)
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:  # it died before it read the line
            reply = ""
        finally:
            timer.cancel()
            timer.join()
        return reply if reply.endswith("\n") else "", timed_out.is_set()


def _serve() -> None:
    """A worker's side: answer null with null once all is imported, and each pair with [correct, problem]."""
    import logging
    import warnings

    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no reply
    logging.disable()
    warnings.simplefilter("ignore")

    import math_verify  # noqa: F401  here, so that no pair's time or memory goes into it

    import authors_rule
    import corrected_rule  # noqa: F401

    authors_rule.equal("x", "y")  # imports what SymPy leaves for later
    _limit()
    for line in open(sys.stdin.fileno(), encoding="utf-8"):  # noqa: SIM115
        pair = json.loads(line)
        replies.write(json.dumps(None if pair is None else _verdict(Pair(*pair))) + "\n")
        replies.flush()


def _limit() -> None:
    """Bound what this process can take from here on; what a system does not know of stays unbounded."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


def _verdict(pair: Pair) -> Verdict:
    import authors_rule
    import corrected_rule

    judges = {"authors": authors_rule.same_math, "corrected": corrected_rule.is_same_math}
    try:
        return Verdict(judges[pair.rule](pair.answer, pair.reference))
    except MemoryError:
        return Verdict(False, OUT_OF_MEMORY)
    except Exception as error:  # whatever SymPy makes of an odd text, the other pairs go on
        return Verdict(False, f"{type(error).__name__}: {error}"[:200])


if __name__ == "__main__":
    _serve()
