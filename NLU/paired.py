"""Two methods over the same seeds: the mean difference, its 95% confidence interval, and a paired t-test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

LEVEL = 0.05


class Difference(NamedTuple):
    """Of one method's scores from another's, over the seeds that both have.

    Interval and p are None where all differences are equal: scores are multiples of one row of the data, so that a few
    may be, and without a spread there is no test.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int


def difference(scores: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """The paired difference scores - others, both by seed; None for fewer than two common seeds.

    t = mean(d) / (sd(d) / sqrt(n)) with n - 1 degrees of freedom (Student 1908), for normal differences.

    Raises:
        ValueError: a score is no finite number.
    """
    from scipy.stats import ttest_rel

    seeds = sorted(scores.keys() & others.keys())
    if len(seeds) < 2:
        return None
    pairs = [(scores[seed], others[seed]) for seed in seeds]
    if not all(math.isfinite(score) for pair in pairs for score in pair):
        raise ValueError(f"a score is no finite number: {pairs}")
    between = [score - other for score, other in pairs]
    if math.isclose(min(between), max(between), rel_tol=0, abs_tol=1e-9):  # but for rounding
        return Difference(mean(between), None, None, None, len(seeds))
    found = ttest_rel(*map(list, zip(*pairs, strict=True)))
    interval = found.confidence_interval(1 - LEVEL)
    return Difference(mean(between), float(interval.low), float(interval.high), float(found.pvalue), len(seeds))


def holm(values: Sequence[float]) -> list[float]:
    """p-values of several tests, so adjusted that one in twenty such families has a false difference (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda at: values[at])
    adjusted, last = [0.0] * len(values), 0.0
    for rank, at in enumerate(order):
        last = max(last, min(1.0, (len(values) - rank) * values[at]))
        adjusted[at] = last
    return adjusted


def columns(differences: Sequence[Difference | None]) -> list[tuple[str, str, str]]:
    """For a table: difference with interval, adjusted p, and what the tests carry at a level of 5%."""
    tested = {at: one.p for at, one in enumerate(differences) if one is not None and one.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [("", "", "") if one is None else _shown(one, adjusted.get(at)) for at, one in enumerate(differences)]


def _shown(one: Difference, p: float | None) -> tuple[str, str, str]:
    if p is None:
        return f"{one.mean:+.1f}", "", "no test: equal differences"
    carried = ("above" if one.mean > 0 else "below") if p < LEVEL else "none shown"
    return f"{one.mean:+.1f} [{one.low:+.1f}, {one.high:+.1f}]", f"{p:.2g}", carried
