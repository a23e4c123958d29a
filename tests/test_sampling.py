"""Batches of rows of like length."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from vblora.sampling import LengthGroupedSampler, LongestFirstSampler

LENGTHS = random.Random(0).choices(range(3, 60), k=1003)


def batches(sampler, size=8):
    order = list(sampler)
    return [order[at : at + size] for at in range(0, len(order), size)]


def padding(groups):
    return sum(len(g) * max(LENGTHS[i] for i in g) - sum(LENGTHS[i] for i in g) for g in groups)


def test_every_row_comes_once_and_the_batch_that_is_not_full_comes_last():
    order = batches(LengthGroupedSampler(LENGTHS, 8, seed=1))
    assert sorted(i for batch in order for i in batch) == list(range(len(LENGTHS)))
    assert [len(batch) for batch in order] == [8] * 125 + [3]


def test_rows_of_a_batch_are_alike_and_batches_are_mixed():
    order = batches(LengthGroupedSampler(LENGTHS, 8, seed=1))
    shuffled = random.Random(1).sample(range(len(LENGTHS)), len(LENGTHS))
    assert padding(order) < 0.1 * padding([shuffled[at : at + 8] for at in range(0, len(shuffled), 8)])
    longest = [max(LENGTHS[i] for i in batch) for batch in order]
    rises = sum(one < other for one, other in pairwise(longest))
    assert 0.35 * len(longest) < rises < 0.65 * len(longest)  # sorted batches would rise always or never


def test_the_order_follows_from_seed_and_epoch():
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    first = list(sampler)
    assert list(sampler) == first == list(LengthGroupedSampler(LENGTHS, 8, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=2)) != first


def test_evaluation_goes_from_the_longest_row_to_the_shortest():
    order = list(LongestFirstSampler(LENGTHS))
    assert sorted(order) == list(range(len(LENGTHS)))
    assert [LENGTHS[i] for i in order] == sorted(LENGTHS, reverse=True)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LengthGroupedSampler(LENGTHS, 0, seed=1)
