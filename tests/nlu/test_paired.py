"""The paired test, its interval and its adjustment, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from paired import Difference, columns, difference, holm


def test_a_difference_by_hand():
    """d = 1, 2, 3: mean 2, sd 1, t = 2 sqrt(3) with 2 degrees of freedom; the 97.5% quantile of t_2 is 4.302653."""
    found = difference({0: 2.0, 1: 4.0, 2: 6.0, 9: 50.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert found.mean == pytest.approx(2) and found.seeds == 3
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - half), pytest.approx(2 + half))
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))  # the closed form for two degrees of freedom


def test_equal_differences_and_too_few_seeds():
    assert difference({0: 1.0}, {0: 2.0}) is None and difference({0: 1.0}, {1: 2.0}) is None
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == Difference(0, None, None, None, 2)
    # Two more pairs of MRPC's 408 are right with either seed: the floats differ in their last digits.
    found = difference({0: 100 * 320 / 408, 1: 100 * 325 / 408}, {0: 100 * 318 / 408, 1: 100 * 323 / 408})
    assert found == Difference(pytest.approx(200 / 408), None, None, None, 2)
    shown = columns([found, Difference(2, 1, 3, 0.03, 5)])  # it takes no part in Holm's adjustment
    assert shown == [("+0.5", "", "no test: equal differences"), ("+2.0 [+1.0, +3.0]", "0.03", "above")]


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="a score is no finite number"):
        difference({0: math.nan, 1: 2.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 4.0})


def test_holms_adjustment():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_only_a_difference_that_the_test_carries_is_called_one():
    shown = columns(
        [Difference(2, 1, 3, 0.01, 5), None, Difference(-9, -20, 2, 0.04, 5), Difference(-1, -2, 0, 0.001, 5)]
    )
    assert shown == [
        ("+2.0 [+1.0, +3.0]", "0.02", "above"),
        ("", "", ""),
        ("-9.0 [-20.0, +2.0]", "0.04", "below"),
        ("-1.0 [-2.0, +0.0]", "0.003", "below"),
    ]
    assert columns([Difference(2, 1, 3, 0.03, 5)] * 2)[0] == ("+2.0 [+1.0, +3.0]", "0.06", "none shown")
