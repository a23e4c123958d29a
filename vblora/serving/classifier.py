"""A classifier of transformers with adapters by name: rows of texts become logits.

    classifier = Classifier.load("sentence-transformers/all-MiniLM-L6-v2", "adapters/")
    tokens = classifier.tokenize([Text("alice", "a text"), Text("bob", "another")])
    alice, bob = classifier.run(["alice", "bob"], tokens)   # logits: lists of numbers

It is the engine of `vblora.serving.batcher.Batcher`. A row whose adapter cannot be used has an exception in the place
of its answer, and the others of its batch their answers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vblora.files import packed
from vblora.files.content import Content
from vblora.hub import from_hub
from vblora.sampling import positions
from vblora.serving.batcher import Text
from vblora.serving.store import AdapterStore, packed_files

logger = logging.getLogger(__name__)

# The tensors of transformers' heads that have a row for each label.
LABELS = tuple(f"{head}.{of}" for head in ("classifier.out_proj", "classifier", "score") for of in ("weight", "bias"))
REFUSED_FOR = 5.0  # seconds after which an adapter that could not be used is tried again, unless its file changes
MOST_TOKENS = 512  # of a text, where the model has no number of positions


class TooLong(ValueError):
    """A text has more tokens than are taken."""


class NoTokens(ValueError):
    """A text has no tokens."""


class NotServed(ValueError):
    """There is no such adapter, or it cannot be used."""


class Classifier:
    """A model with a head for sequences, its tokenizer, and a store of adapters for it.

    Args:
        model, tokenizer: transformers'.
        store: over this model.
        max_tokens: of a text; None: as many as the model has positions.

    Raises:
        ValueError: the model has fewer positions than `max_tokens`.
    """

    def __init__(self, model: Any, tokenizer: Any, store: AdapterStore, max_tokens: int | None = None) -> None:
        most = positions(model) or getattr(model.config, "max_position_embeddings", None) or MOST_TOKENS
        if max_tokens is not None and max_tokens > most:
            raise ValueError(f"--max_tokens {max_tokens} are more than the model's {most} positions")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.store = store
        self.max_tokens = max_tokens or most
        self._refused: dict[str, tuple[float, Any, NotServed]] = {}  # until when, the file's stamp, and why

    @classmethod
    def load(
        cls,
        name: str,
        folder: str | Path,
        *,
        max_tokens: int | None = None,
        max_composed: int = 64,
        max_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Classifier:
        """The model of this name or folder, with the packed adapters of a folder, each of which is checked.

        Raises:
            ValueError: no such model or folder, no adapter in it, or one that does not fit the model.
        """
        files = packed_files(Path(folder))
        if not files:
            raise ValueError(
                f"{folder} has no packed adapter (NAME.vblora.safetensors): vblora pack DIR {folder}/NAME.vblora."
                "safetensors makes one"
            )
        model, tokenizer, new = _load(name, _labels(files.values()), dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        store = AdapterStore(
            model.to(device),
            folder,
            max_composed=max_composed,
            max_bytes=max_bytes,
            strict_base=True,
            check=partial(_require_heads, new=new, name=name),
            shorter=LABELS,
        )
        for adapter in store.names():
            store.check(adapter)
        loaded = cls(model, tokenizer, store, max_tokens)
        adapter = store.names()[0]
        loaded.run([adapter] * 2, loaded.tokenize([Text(adapter, "a first batch")] * 2))  # finds out about rows
        return loaded

    def tokenize(self, texts: Sequence[Text]) -> list[Any]:
        """Each row's tokens, or `TooLong` for a row of more than `max_tokens`, `NoTokens` for one of none."""
        pairs = [text.text if text.text_pair is None else (text.text, text.text_pair) for text in texts]
        found = self.tokenizer(pairs, padding=False, truncation=False, verbose=False)
        return [self._checked(_Tokens(dict(zip(found, row, strict=True)))) for row in zip(*found.values(), strict=True)]

    def _checked(self, tokens: _Tokens) -> _Tokens | TooLong | NoTokens:
        if not len(tokens):
            return NoTokens("a text has no tokens")
        if len(tokens) > self.max_tokens:
            return TooLong(f"a text of {len(tokens)} tokens is longer than the {self.max_tokens} that are taken")
        return tokens

    def run(self, adapters: Sequence[str], tokens: Sequence[Any]) -> list[Any]:
        """The logits of each row, or `NotServed` for one whose adapter cannot be used."""
        now = time.monotonic()
        self._refused = {name: found for name, found in self._refused.items() if found[0] > now}
        refused = {name: self._still_refused(name) for name in set(adapters)}
        answers: list[Any] = [refused[name] for name in adapters]
        rows = [row for row, answer in enumerate(answers) if answer is None]
        if not rows:
            return answers
        try:
            logits = self._forward([adapters[row] for row in rows], [tokens[row] for row in rows])
        except ValueError:
            if not self._refuse({adapters[row] for row in rows}):
                raise
            return self.run(adapters, tokens)  # without those that are refused
        for row, values in zip(rows, logits, strict=True):
            answers[row] = values
        return answers

    @torch.no_grad()
    def _forward(self, adapters: list[str], tokens: list[_Tokens]) -> list[list[float]]:
        batch = self.tokenizer.pad([row.fields for row in tokens], return_tensors="pt").to(self.model.device)
        with self.store.rows(adapters):
            return [_own(row) for row in self.model(**batch).logits.float().tolist()]

    def _still_refused(self, name: str) -> NotServed | None:
        _, stamp, why = self._refused.get(name, (0.0, None, None))
        return why if why is not None and self.store.stamp(name) == stamp else None

    def _refuse(self, adapters: Collection[str]) -> bool:
        """Find those of the adapters that cannot be used; whether there are any."""
        until, found = time.monotonic() + REFUSED_FOR, False
        for name in adapters:
            stamp = self.store.stamp(name)
            try:
                with self.store.rows([name]):
                    pass
            except ValueError as error:
                logger.warning("%s", error)
                why = NotServed(f"adapter {name!r} cannot be used: the server's log says why")
                self._refused[name] = (until, stamp, why)
                found = True
        return found


@dataclass(frozen=True)
class _Tokens:
    """A row as its tokenizer gives it."""

    fields: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.fields["input_ids"])


def _own(logits: list[float]) -> list[float]:
    """Without the NaN that stand behind them where the adapter has fewer labels than others."""
    count = len(logits)
    while count and math.isnan(logits[count - 1]):
        count -= 1
    return logits[: count or None]


def _labels(files: Iterable[Path]) -> int | None:
    """How many labels the largest head of the adapters has; None where none has one.

    Raises:
        ValueError: a file is damaged.
    """
    heads = (packed.read(file, packed.MOST_BYTES).heads for file in files)
    return max((len(tensor) for head in heads for key, tensor in head.items() if key.endswith(LABELS)), default=None)


def _load(name: str, labels: int | None, dtype: torch.dtype) -> tuple[Any, Any, set[str]]:
    """The model, its tokenizer, and the modules that it has no weights for.

    Raises:
        ValueError: no such model, or none with such a head.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # else it reports the heads that the adapters bring
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if labels is not None:
        options["num_labels"] = labels
    flag = "MODEL DIR"
    tokenizer: Any = from_hub(lambda: AutoTokenizer.from_pretrained(name), name, flag)
    tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # rows are padded once they have met
    loaded: Any = from_hub(lambda: AutoModelForSequenceClassification.from_pretrained(name, **options), name, flag)
    model, found = loaded
    absent = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    return model, tokenizer, {key.rpartition(".")[0] for key in absent}


def _require_heads(content: Content, new: Collection[str], name: str) -> None:
    """Refuse an adapter that leaves a module of the model at random numbers.

    Raises:
        ValueError: naming the module.
    """
    for module in sorted(new):
        if not any(key.startswith(f"{module}.") for key in content.heads):
            raise ValueError(
                f"it has no {module} (modules_to_save), and {name} has no weights for it: answers would be random"
            )
