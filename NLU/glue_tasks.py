"""The GLUE tasks as one table, and the scores that count for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    ``labels`` are in GLUE's integer order and empty for a regression. ``metric`` is the score that counts;
    the ones in ``beside`` are reported with it. ``tsv_columns`` are the headers of the text columns and the
    label column in GLUE's .tsv files (CoLA's have no header), ``dev_names`` the development file's stems, the
    first one found counts.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str
    hub_config: str
    folder: str
    tsv_columns: tuple[str, ...]
    beside: tuple[str, ...] = ()
    dev_names: tuple[str, ...] = ("dev", "validation")

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1


HUB_DATASET = "nyu-mll/glue"
PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews_correlation", "cola", "CoLA", ()),
        Task(
            "sst2",
            ("sentence",),
            ("negative", "positive"),
            "accuracy",
            "sst2",
            "SST-2",
            ("sentence", "label"),
        ),
        Task(
            "mrpc",
            PAIR,
            ("not_equivalent", "equivalent"),
            "accuracy",
            "mrpc",
            "MRPC",
            ("#1 String", "#2 String", "Quality"),
            beside=("f1",),
        ),
        Task(
            "qnli",
            ("question", "sentence"),
            ENTAILMENT,
            "accuracy",
            "qnli",
            "QNLI",
            ("question", "sentence", "label"),
        ),
        Task("rte", PAIR, ENTAILMENT, "accuracy", "rte", "RTE", ("sentence1", "sentence2", "label")),
        Task(
            "stsb",
            PAIR,
            (),
            "pearson",
            "stsb",
            "STS-B",
            ("sentence1", "sentence2", "score"),
            beside=("spearman",),
        ),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            "accuracy",
            "mnli",
            "MNLI",
            ("sentence1", "sentence2", "gold_label"),
            dev_names=("dev_matched", "validation_matched", "dev", "validation"),
        ),
    )
}


def get_task(name: str) -> Task:
    """The task of that name; ValueError names the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return TASKS[name]


def _correlation(function: Any, predictions: np.ndarray, labels: np.ndarray) -> float:
    # The correlation with a constant is 0/0. A model that gives every pair the same score has found no
    # relation, and 0.0 says so; NaN would win or lose every comparison that looks for the best epoch,
    # depending on its direction.
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(function(predictions, labels)[0])


_SCORES = {
    "accuracy": lambda predictions, labels: float(metrics.accuracy_score(labels, predictions)),
    # scikit-learn itself gives 0.0 for constant predictions here.
    "matthews_correlation": lambda predictions, labels: float(metrics.matthews_corrcoef(labels, predictions)),
    "f1": lambda predictions, labels: float(metrics.f1_score(labels, predictions, pos_label=1, zero_division=0.0)),
    "pearson": lambda predictions, labels: _correlation(stats.pearsonr, predictions, labels),
    "spearman": lambda predictions, labels: _correlation(stats.spearmanr, predictions, labels),
}


def _checked(task: Task, what: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{task.name}: {what} are not numbers: {error}") from None
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{task.name}: {what} must be one number per example, not an array of shape {array.shape}")
    if array.size == 0:
        raise ValueError(f"{task.name}: there are no {what}")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{task.name}: {what} contain NaN or infinity (first at position {first})")
    if task.is_regression:
        return array
    classes = array.astype(np.int64)
    outside = (classes != array) | (classes < 0) | (classes >= task.num_labels)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise ValueError(
            f"{task.name}: {what} must be class numbers 0 to {task.num_labels - 1}, "
            f"not {array[first]:g} (position {first})"
        )
    return classes


def compute_metrics(
    task: str, predictions: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray
) -> dict[str, float]:
    """The scores of a task: the one that counts first, then those beside it.

    ``predictions`` are class numbers, or scores for a regression.
    """
    row = get_task(task)
    predicted, true = _checked(row, "predictions", predictions), _checked(row, "labels", labels)
    if len(predicted) != len(true):
        raise ValueError(f"{row.name}: {len(predicted)} predictions for {len(true)} labels")
    return {name: _SCORES[name](predicted, true) for name in (row.metric, *row.beside)}
