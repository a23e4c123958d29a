"""The other selection rules of Table 5: their mathematics, and adapters that train by them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import vblora
from vblora.adapter import load, restore
from vblora.bank import compose_dense
from vblora.files.directory import read_config
from vblora.methods import SelectionConfig, VBLoRAConfig
from vblora.selection import RULES, draw, gumbel_softmax, noisy_topk


def make(rule="noisy_topk", topk=2, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    sizes = {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": topk, "target_modules": ["0", "2"]}
    return model, vblora.attach(model, SelectionConfig(rule=rule, **sizes, **more), seed=0)


def test_noisy_top_k_is_shazeers_equation():
    bank, logits, scale, noise = torch.randn(7, 5), torch.randn(9, 7), torch.randn(9, 7), torch.randn(9, 7)
    table, indices = noisy_topk(bank, logits, scale, noise, 3)
    torch.testing.assert_close(table, compose_dense(bank, logits + noise * F.softplus(scale), 3))
    assert torch.equal(indices, (logits + noise * F.softplus(scale)).topk(3).indices)


def test_the_gumbel_rules_are_torchs_with_the_same_noise():
    bank, logits, tau = torch.randn(7, 5), torch.randn(4, 7, requires_grad=True), 1 / 3
    for hard in (False, True):
        torch.manual_seed(3)
        noise = draw(logits.detach(), "gumbel")
        torch.manual_seed(3)
        weights = F.gumbel_softmax(logits, tau=tau, hard=hard)
        ours = gumbel_softmax(bank, logits, noise, tau, hard)
        torch.testing.assert_close(ours, weights @ bank)
        (expected,) = torch.autograd.grad((weights @ bank).square().sum(), logits)
        (gradient,) = torch.autograd.grad(ours.square().sum(), logits)
        torch.testing.assert_close(gradient, expected)


def test_gumbel_noise_has_the_distributions_mean_and_deviation():
    torch.manual_seed(0)
    noise = draw(torch.zeros(200, 1000), "gumbel")
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(1.2825, abs=0.02)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("topk", [1, 2])
def test_training_is_noisy_and_inference_is_top_k_of_the_logits(rule, topk):
    model, adapter = make(rule, topk)
    x = torch.randn(3, 16)
    with torch.no_grad():
        adapter.logits.mul_(100)
        adapter.vector_bank.mul_(100)
    assert not torch.equal(model(x), model(x))  # with gradients, in training mode: new noise each time
    model.eval()
    assert torch.equal(model(x), model(x))
    with torch.no_grad():
        factors = adapter.layer_factors()
    table = compose_dense(adapter.vector_bank, adapter.logits / adapter.config.temperature, topk)
    (a, _), *_ = adapter.layout.factors(table)
    torch.testing.assert_close(factors["0"][0], a)


@pytest.mark.parametrize("rule", RULES)
def test_all_its_parameters_train_and_land_in_one_group(rule):
    model, adapter = make(rule)
    groups = vblora.param_groups(model, lr=1e-2, lr_vector_bank=1e-2, lr_logits=1e-1)
    assert {g["name"] for g in groups} == {"vector_bank", "logits"}
    assert sum(len(g["params"]) for g in groups) == len(list(adapter.parameters()))
    before = copy.deepcopy(adapter.state_dict())
    optimizer = vblora.AdamW(groups)
    x, y = torch.randn(32, 16), torch.randn(32, 8)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in adapter.state_dict().items())
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("rule", RULES)
def test_the_kept_form_is_plain_vb_lora_and_the_full_form_goes_on(rule, tmp_path):
    model, adapter = make(rule, init_logits_std=1.0)
    base = copy.deepcopy(model)
    base.vblora_selection_adapter.detach()
    x = torch.randn(3, 16)
    model.eval()
    adapter.save(tmp_path / "kept")
    config, _ = read_config(tmp_path / "kept")
    assert type(config) is VBLoRAConfig
    reader = copy.deepcopy(base)
    load(reader, tmp_path / "kept")
    torch.testing.assert_close(reader.eval()(x), model(x), rtol=1e-5, atol=1e-6)
    adapter.save(tmp_path / "full", form="full")
    other_model, other = make(rule, init_logits_std=1.0)
    with torch.no_grad():
        other.logits.zero_()
    restore(other, tmp_path / "full")
    assert torch.equal(other_model.eval()(x), model(x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_uses_the_same_noise_twice(rule, use_reentrant):
    """The recomputed segment must see the factors of its first pass, or gradients belong to nothing."""

    class Segmented(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.checkpointed = checkpointed

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=use_reentrant) if self.checkpointed else layer(x)
                x = x.tanh()
            return x

    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Segmented(checkpointed)
        config = SelectionConfig(rule=rule, r=2, num_vectors=6, vector_length=4, target_modules=["0", "1"])
        adapter = vblora.attach(model, config, seed=0)
        with torch.no_grad():
            adapter.vector_bank.mul_(50)
        torch.manual_seed(1)
        model(torch.ones(3, 8, requires_grad=True)).sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rule": "best"}, "rule is one of"), ({"tau": 0}, "tau must be above 0"), ({"tau": -1}, "tau must be")],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SelectionConfig(target_modules=["0"], **wrong)
