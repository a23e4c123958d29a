"""Averages of weights: `vblora.AveragedModel` is the dense form's average, and PyTorch's own is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from core_helpers import adapt, build
from torch.optim import swa_utils

import vblora

DECAY = 0.9


def trained(steps, watch, hidden=16, seed=3, **settings):
    """A model trained in float64 with decay and changing selections; `watch(model)` after each step."""
    model = build("stack", hidden=hidden).double().train()
    settings = {"num_vectors": 300, "vector_length": 16, "init_logits_std": 0.02, **settings}
    adapter = adapt(model, seed=seed, **settings).double()
    groups = vblora.param_groups(model, lr=1e-2, lr_vector_bank=1e-2, lr_logits=3e-2)
    groups[1]["weight_decay"] = 0.1
    optimizer = vblora.AdamW(groups)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x, y = torch.randn(2, 4, hidden, generator=generator, dtype=torch.float64).split(1)
        (model(x[..., :5]) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch(model)
    return model, adapter


class DenseAverage:
    """What the same average of all h logits and of the bank is."""

    def __init__(self, kind):
        self.kind, self.number, self.mean = kind, 0, {}

    def take(self, model):
        adapter = model.vblora_adapter
        new = {"logits": adapter.dense_logits(), "bank": adapter.vector_bank.detach().clone()}
        if not self.number:
            self.mean = new
        else:
            share = 1 - DECAY if self.kind == "ema" else 1 / (self.number + 1)
            self.mean = {name: mean + share * (new[name] - mean) for name, mean in self.mean.items()}
        self.number += 1


AVERAGES = {
    "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)},
    "ema one by one": {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)},
    "swa": {},
    "ema with buffers": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY), "use_buffers": True},
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_it_is_the_average_of_all_logits(kind):
    dense, widths, selections, averages = DenseAverage(kind.split()[0]), set(), set(), []

    def watch(model):
        if not averages:
            averages.append(vblora.AveragedModel(model, **AVERAGES[kind]))
        averages[0].update_parameters(model)
        dense.take(model)
        widths.add(model.vblora_adapter.logits.width)
        selections.add(tuple(model.vblora_adapter.topk_indices.flatten().tolist()))

    model, _ = trained(80, watch)
    assert len(widths) > 1 and len(selections) > 30
    found = averages[0].module.vblora_adapter
    assert (found.dense_logits() - dense.mean["logits"]).abs().max() < 1e-12
    assert (found.vector_bank - dense.mean["bank"]).abs().max() < 1e-12
    assert torch.equal(found.topk_indices, dense.mean["logits"].topk(2).indices)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.vblora_adapter.vector_bank.copy_(dense.mean["bank"])
        expected.vblora_adapter.select(dense.mean["logits"])
        x = torch.randn(1, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(averages[0](x), expected(x), rtol=0, atol=1e-12)
        assert (averages[0](x) - model(x)).abs().max() > 1e-3


def test_adapters_of_unlike_seeds_are_averaged_too(tmp_path):
    one, two = (trained(20, lambda model: None, seed=seed)[0] for seed in (3, 4))
    average = vblora.AveragedModel(one)
    for model in (one, two):
        average.update_parameters(model)
    adapters = [model.vblora_adapter for model in (one, two)]
    found = average.module.vblora_adapter
    mean = (adapters[0].dense_logits() + adapters[1].dense_logits()) / 2
    assert (found.dense_logits() - mean).abs().max() < 1e-12
    found.save(tmp_path)
    loaded = vblora.load(build("stack", hidden=16).double(), tmp_path)
    assert torch.equal(loaded.topk_indices, mean.topk(2).indices)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_pytorchs_average_runs_and_is_refused_where_it_is_used(use_buffers, tmp_path):
    averages, widths = [], set()

    def watch(model):
        if not averages:
            wrong = swa_utils.AveragedModel(
                model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
            )
            averages.append(wrong)
        averages[0].update_parameters(model)
        widths.add(model.vblora_adapter.logits.width)

    trained(80, watch)
    assert len(widths) > 1
    with torch.no_grad(), pytest.raises(ValueError, match=r"take vblora\.AveragedModel"):
        averages[0](torch.randn(1, 4, 5, dtype=torch.float64))
    for form in ("topk", "full"):
        with pytest.raises(ValueError, match=r"take vblora\.AveragedModel"):
            averages[0].module.vblora_adapter.save(tmp_path, form=form)
    assert not list(tmp_path.iterdir())


def test_averaged_parameters_put_into_the_trained_model_are_refused():
    """As averages do that keep a list of parameters and copy it back."""
    shadow = []

    def watch(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not shadow:
            shadow.extend(p.detach().clone() for p in parameters)
        for mean, p in zip(shadow, parameters, strict=True):
            mean.lerp_(p.detach(), 0.1)

    model, _ = trained(20, watch)
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    with torch.no_grad():
        model.eval()(x)  # what is composed here is kept
    for mean, p in zip(shadow, [p for p in model.parameters() if p.requires_grad], strict=True):
        p.data.copy_(mean)
    with torch.no_grad(), pytest.raises(ValueError, match=r"take vblora\.AveragedModel"):
        model.eval()(x)


def test_where_the_selection_is_frozen_pytorchs_average_is_right():
    model = build("stack").train()
    adapter = adapt(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    average, total = swa_utils.AveragedModel(model), 0
    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            model(torch.ones(2, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        total = total + adapter.topk_logits.detach()
    assert (average.module.vblora_adapter.topk_logits - total / 4).abs().max() < 1e-6
    with torch.no_grad():
        average(torch.ones(2, 5))
