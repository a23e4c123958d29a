from __future__ import annotations

import math

import numpy as np
import pytest

from glue_tasks import TASKS, compute_metrics, get_task


def test_every_task_has_a_metric_that_counts():
    expected = {
        "cola": "matthews_correlation",
        "sst2": "accuracy",
        "mrpc": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
        "stsb": "pearson",
        "mnli": "accuracy",
    }
    assert {name: task.metric for name, task in TASKS.items()} == expected
    assert {name for name, task in TASKS.items() if task.is_regression} == {"stsb"}
    assert {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2} == {
        "stsb": 1,
        "mnli": 3,
    }


def test_labels_are_in_glue_order():
    assert TASKS["rte"].labels == TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["mrpc"].labels.index("equivalent") == 1
    assert TASKS["sst2"].labels.index("positive") == 1


def test_unknown_task_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'wnli'.*cola, sst2"):
        get_task("wnli")


def test_matthews_from_the_confusion_matrix():
    labels, predictions = [1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1]
    tp, tn, fp, fn = 3, 1, 1, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute_metrics("cola", predictions, labels) == {"matthews_correlation": pytest.approx(expected)}


def test_mrpc_has_f1_beside_accuracy_of_the_class_equivalent():
    scores = compute_metrics("mrpc", [1, 1, 0, 0], [1, 0, 0, 1])
    assert list(scores) == ["accuracy", "f1"]
    assert compute_metrics("mrpc", [1, 1, 1], [1, 1, 0])["f1"] == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))


def test_stsb_correlations():
    labels = np.array([0.0, 1.0, 2.5, 5.0])
    scores = compute_metrics("stsb", np.exp(labels)[:, None], labels)
    assert list(scores) == ["pearson", "spearman"]
    assert scores["spearman"] == pytest.approx(1.0)
    centred = [values - values.mean() for values in (np.exp(labels), labels)]
    expected = (centred[0] * centred[1]).sum() / math.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
    assert scores["pearson"] == pytest.approx(expected)
    assert compute_metrics("stsb", -labels, labels)["pearson"] == pytest.approx(-1.0)


def test_constant_predictions_score_zero():
    assert compute_metrics("cola", [1, 1, 1], [1, 0, 1]) == {"matthews_correlation": 0.0}
    assert compute_metrics("stsb", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert compute_metrics("mrpc", [0, 0], [1, 0]) == {"accuracy": 0.5, "f1": 0.0}


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "words"),
    [
        ("cola", [1, 0], [1], "2 predictions for 1 labels"),
        ("cola", [], [], "no predictions"),
        ("cola", [1], [], "no labels"),
        ("stsb", [1.0, math.nan], [1.0, 2.0], "predictions contain NaN.*position 1"),
        ("stsb", [1.0, 2.0], [math.inf, 2.0], "labels contain NaN"),
        ("cola", [0, 2], [0, 1], "0 to 1, not 2"),
        ("rte", [0.5, 1], [0, 1], r"not 0\.5"),
        ("rte", [[0.1, 0.9]], [1], "shape"),
        ("rte", ["yes"], [1], "not numbers"),
    ],
)
def test_what_cannot_be_scored_says_so(task, predictions, labels, words):
    with pytest.raises(ValueError, match=words):
        compute_metrics(task, predictions, labels)
