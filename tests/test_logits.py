"""The table of logits that training keeps: its selection and its training are those of all h logits."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from core_helpers import adapt, build, make_batch, run
from test_optim import RATES, Pair

import vblora
from vblora import logits
from vblora.logits import LogitTable, draw


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    """Few slots and small blocks, so that a test widens the table and crosses blocks many times."""
    monkeypatch.setattr(logits, "START", 8)
    monkeypatch.setattr(logits, "BLOCK", 5000)


def config(**settings):
    fields = {"num_vectors": 300, "vector_length": 8, "topk": 2, "target_modules": ["up"], **settings}
    return vblora.VBLoRAConfig(**fields)


def half(rows):
    """The parts of so many rows: A's (0) are the first half."""
    return (torch.arange(rows) >= rows // 2).long()


def table_of(rows=50, seed=5, **settings):
    table = LogitTable(config(**settings), half(rows))
    table.start(seed)
    return table


def states_of(pair):
    """The state dicts of the model and of the optimiser, by way of a file."""
    buffer = io.BytesIO()
    torch.save({"model": pair.model.state_dict(), "optimizer": pair.ours.state_dict()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("h", [7, 90, 300, 2048])
def test_blocks_are_what_is_drawn_at_once(h, monkeypatch):
    settings = config(num_vectors=h)
    blocks = list(draw(settings, half(133), 3)[1])
    monkeypatch.setattr(logits, "BLOCK", 1 << 30)
    bank, whole = draw(settings, half(133), 3)
    assert len(blocks) > 1 or h < 30
    assert torch.equal(torch.cat(blocks), next(whole)) and bank.abs().max() <= settings.init_vector_bank_bound


def test_a_table_begins_with_the_largest_from_the_largest_down():
    table = table_of()
    dense = torch.cat(list(draw(table.config, half(50), 5)[1]))
    assert torch.equal(table.values, dense.topk(8).values) and torch.equal(table.dense(), dense)
    assert table.indices.dtype == torch.int32 and not table.is_full


@pytest.mark.parametrize("width", [24, 300])
def test_widening_adds_the_next_ones_and_changes_nothing(width):
    table = table_of()
    dense = table.dense()
    table.widen(width)
    assert table.width == width and torch.equal(table.dense(), dense)
    assert torch.equal(table.values, dense.topk(width).values)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("topk", [2, 4])
def test_three_hundred_steps_are_pefts_in_a_table_that_grows(topk, weight_decay):
    pair = Pair(1e-3, num_vectors=600, topk=topk, init_logits_std=0.02, weight_decay=weight_decay)
    table = pair.adapter.logits
    widths = set()
    for step in range(300):
        pair.step(step)
        widths.add(table.width)
        if step % 50 == 49:
            pair.assert_same(1e-8)
    assert pair.moved.float().mean() > 0.8
    assert len(widths) >= 3 and not table.is_full
    ever = (pair.ours.state[pair.adapter.topk_logits]["exp_avg_sq"] != 0).sum(dim=1)
    assert 4 * topk < ever.max() < table.width


def test_a_table_of_many_active_entries_becomes_full_and_stays_right():
    pair = Pair(5e-2, num_vectors=60, topk=3, init_logits_std=0.01)
    assert not pair.adapter.logits.is_full
    for step in range(150):
        pair.step(step)
    assert pair.adapter.logits.is_full
    pair.assert_same(1e-8)


@pytest.mark.parametrize("std", [0.0, 1e-30])
def test_equal_logits_are_trained_too(std):
    """Which of equal ones are selected is open; that the selected are the largest is not."""
    pair = Pair(1e-2, num_vectors=300, init_logits_std=std)
    for step in range(30):
        pair.losses(step)[0].backward()
        pair.ours.step()
        pair.ours.zero_grad()
        dense = pair.adapter.dense_logits()
        assert torch.equal(dense.topk(2).values, pair.adapter.topk_logits)
        assert torch.equal(dense.gather(1, pair.adapter.topk_indices), pair.adapter.topk_logits)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_training_goes_on_from_state_dicts_of_any_width(weight_decay):
    settings = {"num_vectors": 300, "init_logits_std": 0.01, "weight_decay": weight_decay}
    straight = Pair(5e-3, **settings)
    for step in range(40):
        straight.step(step)
    states, second = states_of(straight), Pair(5e-3, seed=77, **settings)
    second.model.load_state_dict(states["model"])
    second.ours.load_state_dict(states["optimizer"])
    assert second.adapter.logits.width == straight.adapter.logits.width > 8
    for step in range(40, 120):
        for pair in (straight, second):
            pair.losses(step)[0].backward()
            pair.ours.step()
            pair.ours.zero_grad()
    assert straight.adapter.logits.width > 24
    for key, t in straight.model.state_dict().items():
        assert torch.equal(t, second.model.state_dict()[key]), key


@pytest.mark.parametrize("known_seed", [True, False])
@pytest.mark.parametrize("steps", [1, 40])
def test_training_goes_on_from_a_full_file_and_the_optimisers_state(tmp_path, steps, known_seed):
    """Rate 0 in the first step, as with warm-up: entries then have moments, and the values that they started with."""

    def train(pair, steps):
        for step in steps:
            for group in pair.ours.param_groups:
                group["lr"] = 0.0 if step == 0 else 5e-3
            pair.losses(step)[0].backward()
            pair.ours.step()
            pair.ours.zero_grad()

    settings = {"num_vectors": 300, "init_logits_std": 0.01, "dtype": torch.float32}
    straight = Pair(**settings)
    train(straight, range(steps))
    if not known_seed:
        straight.adapter.init_seed = None
    straight.adapter.save(tmp_path / "a", form="full")
    states, second = states_of(straight), Pair(seed=77, **settings)
    vblora.adapter.restore(second.adapter, tmp_path / "a")
    second.ours.load_state_dict(states["optimizer"])
    train(straight, range(steps, 80))
    train(second, range(steps, 80))
    assert torch.equal(straight.adapter.dense_logits(), second.adapter.dense_logits())
    assert torch.equal(straight.adapter.vector_bank, second.adapter.vector_bank)
    assert second.adapter.logits.is_full is not known_seed


def test_moments_follow_their_entries_when_the_table_is_made_anew():
    one, other = Pair(5e-3, num_vectors=300, init_logits_std=0.01), Pair(5e-3, num_vectors=300, init_logits_std=0.01)
    for step in range(60):
        one.step(step)
        other.step(step)
        if step == 30:
            before = other.adapter.logits.indices
            other.adapter.select(other.adapter.dense_logits())
            assert not torch.equal(before, other.adapter.logits.indices[:, : before.shape[1]])
    assert torch.equal(one.adapter.dense_logits(), other.adapter.dense_logits())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moments_of_a_trained_run_on_initial_logits(dtype):
    """Entries with moments and the values they were drawn with, most of them not selected: they move all the same."""

    def make():
        model = build("stack")
        adapter = adapt(model, num_vectors=600, init_logits_std=0.01, seed=1)
        model.to(dtype)
        dense = torch.nn.Parameter(adapter.dense_logits())
        ours = vblora.AdamW([{"params": [adapter.topk_logits], "lr": 1e-2}])
        return adapter, ours, dense, torch.optim.AdamW([dense], lr=1e-2, weight_decay=0.0)

    def train(adapter, ours, dense, reference):
        generator = torch.Generator().manual_seed(4)
        for _ in range(20):
            gradient = (torch.randn(adapter.topk_logits.shape, generator=generator) + 1).to(dtype)
            adapter.topk_logits.grad = gradient
            dense.grad = torch.zeros_like(dense).scatter(1, adapter.topk_indices, gradient)
            ours.step()
            reference.step()

    trained, fresh = make(), make()
    train(*trained)
    for optimizer in (1, 3):
        fresh[optimizer].load_state_dict(copy.deepcopy(trained[optimizer].state_dict()))
    assert fresh[1].state[fresh[0].topk_logits]["indices"].dtype == torch.int32  # as whole numbers, in bfloat16 too
    train(*fresh)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    difference = (fresh[0].dense_logits() - fresh[2]).abs()
    assert difference.max() <= tolerance if dtype == torch.float64 else difference.mean() <= tolerance


def test_a_copy_of_model_and_optimiser_trains_on_by_itself():
    pair = Pair(5e-3, num_vectors=300, init_logits_std=0.01)
    for step in range(20):
        pair.step(step)
    twin = copy.deepcopy(pair)
    before = pair.adapter.dense_logits()
    for step in range(20, 60):
        twin.step(step)
    assert torch.equal(pair.adapter.dense_logits(), before)
    for step in range(20, 60):
        pair.step(step)
    assert torch.equal(pair.adapter.dense_logits(), twin.adapter.dense_logits())


def test_reselect_brings_in_entries_that_had_no_slot():
    adapter = adapt(build("stack"), num_vectors=300, seed=2)
    dense = adapter.dense_logits()
    with torch.no_grad():
        for _ in range(6):  # twelve entries leave the selection, more than the table has
            adapter.topk_logits.fill_(-100)
            dense = dense.scatter(1, adapter.topk_indices, -100)
            adapter.reselect()
            assert torch.equal(adapter.dense_logits(), dense)
            assert torch.equal(adapter.topk_indices.sort().values, dense.topk(2).indices.sort().values)


def test_a_model_in_sixteen_bits_trains():
    model = build("stack")
    adapter = adapt(model, num_vectors=300, init_logits_std=0.01)
    model.to(torch.bfloat16).train()
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-2, **RATES))
    for _ in range(40):
        batch = {name: t.to(torch.bfloat16) for name, t in make_batch("stack").items()}
        run(model, batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert adapter.logits.values.dtype == torch.bfloat16
    assert torch.equal(adapter.dense_logits().topk(2).values, adapter.topk_logits)


def test_a_state_of_another_model_is_refused():
    pair, small = Pair(num_vectors=300), Pair(num_vectors=300, target_modules=["up"])
    for each in (pair, small):
        each.step(0)
    dense = copy.deepcopy(pair.ours.state_dict())
    for moments in dense["state"].values():
        moments.pop("indices", None)
    for state in (small.ours.state_dict(), dense):
        with pytest.raises(ValueError, match=r"has no moments for the .* sub-vectors"):
            pair.ours.load_state_dict(state)
    pair.step(1)
    pair.assert_same(1e-8)


def test_seeds_of_all_sizes_draw_again():
    for seed in (0, 2**63 + 5, 2**64 - 1, -7, -(2**63)):
        table = table_of(seed=seed)
        dense = table.dense()
        table.widen(40)
        assert torch.equal(table.dense(), dense) and table._get_seed() == seed


def test_training_state_is_a_twentieth_of_dense_at_most(monkeypatch):
    """At h 2048, logits, their gradient and moments; PEFT keeps all of each in four bytes."""
    monkeypatch.undo()
    model = build("stack", hidden=64)
    adapter = adapt(model, num_vectors=2048, init_logits_std=0.01, vector_length=16, r=8)
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-2, **RATES))
    for _ in range(100):
        run(model, make_batch("stack")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = [*optimizer.state[adapter.topk_logits].values(), *adapter.logits.buffers()]
    tensors += [adapter.topk_indices, adapter.topk_logits, adapter.topk_logits]  # and its gradient
    unique = {t.data_ptr(): t for t in tensors}.values()
    kept = sum(t.numel() * t.element_size() for t in unique)
    assert kept <= 0.05 * 4 * 4 * adapter.layout.rows * 2048
