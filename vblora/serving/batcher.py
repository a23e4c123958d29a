"""Texts of many requests in batches of one model: whatever waits when a batch is done goes into the next one.

    batcher = Batcher(engine)
    future = batcher.submit([Text("alice", "a text"), Text("bob", "another")])[0]
    future.result()                                        # what the engine answers

One thread runs the model, so that a batch is as large as the load makes it: a lone request waits for nobody, and under
load rows of all requests and adapters share a batch. What waits has a bound, beyond which `Full` is raised.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

logger = logging.getLogger(__name__)

LOOKED_AT = 4  # batches of the longest waiting rows, among which the next one's are chosen
UNEVEN = 2  # rows this many times as long or as short as another are not padded to it


class Text(NamedTuple):
    """What one row is asked for: an adapter's name, and a text or a pair of texts."""

    adapter: str
    text: str
    text_pair: str | None = None


class Full(Exception):
    """More would wait than may."""


class Stopped(Exception):
    """Nothing further is taken."""


class Engine(Protocol):
    """What answers rows. An exception in an answer's place is that row's own; one that is raised is all rows'."""

    def tokenize(self, texts: Sequence[Text]) -> list[Any]:
        """Each row's tokens, whose `len` is how many there are, or an exception."""

    def run(self, adapters: Sequence[str], tokens: Sequence[Any]) -> Sequence[Any]:
        """The answers of one batch, row by row."""


@dataclass(eq=False)
class _Row:
    text: Text
    answer: Future[Any] = field(default_factory=Future)
    tokens: Any = None

    def give(self, answer: Any) -> None:
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        else:
            self.answer.set_result(answer)


class Batcher:
    """A queue of rows and the thread that empties it.

    Args:
        engine: tokenises rows and runs batches; both in the batcher's own thread.
        max_rows: of a batch.
        max_tokens: of a batch, padding included; a row longer than that has a batch of its own.
        max_waiting: rows that wait for a batch.
        on_batch: is called with the rows of each batch that has been run.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_rows: int = 32,
        max_tokens: int = 4096,
        max_waiting: int = 1024,
        on_batch: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.engine = engine
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.max_waiting = max_waiting
        self.on_batch = on_batch
        self._waiting: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[Text]) -> list[Future[Any]]:
        """The answers to come, of all these rows or of none. One that is cancelled before its batch begins is not run.

        Raises:
            Full: with these more than `max_waiting` rows would wait.
            Stopped: `stop` was called.
        """
        rows = [_Row(text) for text in texts]
        with self._changed:
            if self._is_stopping:
                raise Stopped
            if len(self._waiting) + len(rows) > self.max_waiting:
                raise Full
            self._waiting.extend(rows)
            self._changed.notify()
        return [row.answer for row in rows]

    def waiting(self) -> int:
        """Rows that wait for a batch."""
        return len(self._waiting)

    def stop(self) -> None:
        """Take nothing further, answer what waits, and return."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping)
                if not self._waiting:
                    return
            self._run(self._next())

    def _next(self) -> list[_Row]:
        """Take the next batch out of the queue; this thread alone takes rows out."""
        with self._changed:
            window = list(islice(self._waiting, LOOKED_AT * self.max_rows))
        self._tokenize([row for row in window if row.tokens is None and not row.answer.cancelled()])
        batch = choose([row for row in window if not row.answer.done()], self.max_rows, self.max_tokens)
        running = [row for row in batch if row.answer.set_running_or_notify_cancel()]
        with self._changed:
            chosen = set(batch)
            self._waiting = deque(row for row in self._waiting if row not in chosen and not row.answer.done())
        return running

    def _tokenize(self, rows: list[_Row]) -> None:
        """Each row's tokens; a row that has none is answered with the reason."""
        if not rows:
            return
        try:
            found = self.engine.tokenize([row.text for row in rows])
        except Exception as error:
            logger.exception("rows that could not be tokenised")
            found = [error] * len(rows)
        for row, tokens in zip(rows, found, strict=True):
            row.tokens = tokens
            if isinstance(tokens, Exception) and row.answer.set_running_or_notify_cancel():
                row.give(tokens)

    def _run(self, rows: list[_Row]) -> None:
        if not rows:
            return
        try:
            answers = self.engine.run([row.text.adapter for row in rows], [row.tokens for row in rows])
        except Exception as error:
            logger.exception("a batch of %d rows failed", len(rows))
            if len(rows) > 1:  # one of them may be to blame
                for row in rows:
                    self._run([row])
                return
            answers = [error]
        self.on_batch(len(rows))  # first, so that whoever has an answer finds it counted
        for row, answer in zip(rows, answers, strict=True):
            row.give(answer)


def choose(rows: Sequence[Any], max_rows: int, max_tokens: int) -> list[Any]:
    """The first row, which has waited longest, and the others closest to it in length that fit beside it.

    Args:
        rows: each with `tokens`.
        max_rows, max_tokens: of the batch, with every row padded to the longest.
    """
    if not rows:
        return []
    first = len(rows[0].tokens)
    batch: list[Any] = []
    shortest = longest = first
    for row in sorted(rows, key=lambda row: abs(len(row.tokens) - first)):  # stable: the first row stays first
        length = len(row.tokens)
        low, high = min(shortest, length), max(longest, length)
        if batch and (len(batch) == max_rows or high > UNEVEN * low or high * (len(batch) + 1) > max_tokens):
            break
        batch.append(row)
        shortest, longest = low, high
    return batch
