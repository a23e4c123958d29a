"""Several threads run one adapted model at once, forward and backward."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from core_helpers import adapt, build, run


@pytest.fixture
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def batches(count, rows=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 5, 5, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_of_all_threads_add_up(reentrant):
    model = build("stack").double()
    model.use_reentrant = reentrant
    adapter = adapt(model)
    model.double().train()
    given = batches(40)
    for x in given:
        run(model, {"x": x}).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in adapter.parameters()]
    model.zero_grad()

    def work(x):
        run(model, {"x": x}).square().mean().backward()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, given))
    for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-12, rtol=1e-10)


def test_a_thread_that_evaluates_sees_the_values_of_now_beside_one_that_trains(switching_often):
    model = build("stack").double()
    adapter = adapt(model)
    model.double()
    [x] = batches(1)
    with torch.no_grad():
        expected = run(model, {"x": x})
    wrong, done = [], threading.Event()

    def evaluate():
        while not done.is_set():
            with torch.no_grad():
                if not torch.equal(run(model, {"x": x}), expected):
                    wrong.append(1)

    thread = threading.Thread(target=evaluate)
    thread.start()
    for other in batches(60):
        run(model, {"x": other}).square().mean().backward()
    done.set()
    thread.join()
    assert not wrong
    with torch.no_grad():
        adapter.vector_bank.mul_(2)
        with ThreadPoolExecutor(1) as pool:
            [elsewhere] = pool.map(lambda given: run(model, {"x": given}), [x])
        assert torch.equal(elsewhere, run(model, {"x": x}))
        assert (elsewhere - expected).abs().max() > 1e-2


def test_a_pass_of_one_thread_is_gone_back_through_in_another():
    model = build("stack").double()
    adapter = adapt(model)
    model.double().train()
    one, two = batches(2)
    (run(model, {"x": one}).square().mean() + run(model, {"x": two}).square().mean()).backward()
    expected = adapter.vector_bank.grad.clone()
    model.zero_grad()
    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(lambda x: run(model, {"x": x}).square().mean(), [one, two]))
    sum(losses).backward()
    torch.testing.assert_close(adapter.vector_bank.grad, expected)


def test_an_adapter_that_has_run_is_copied_and_pickled():
    model = build("stack").double()
    adapt(model)
    model.double()
    [x] = batches(1)
    output = run(model, {"x": x})
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(again, {"x": x}), output)
