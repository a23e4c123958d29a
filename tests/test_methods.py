"""Tied-LoRA and LoRA-XS against their formulas, and what each method counts and stores."""

from __future__ import annotations

import pytest
import torch
from core_helpers import METHODS, adapt, build, config_for, make_batch, run
from torch import nn

import vblora
from vblora import counts
from vblora.methods.lora_xs import truncated_svd


def deltas(adapter):
    return {name: b @ a for name, (a, b) in adapter.layer_factors().items()}


@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("kind", ["stack", "stack_conv1d", "bert", "llama"])
def test_tied_lora_is_its_formula(kind, alpha):
    r = 3
    adapter = adapt(build(kind), "tied_lora", kind, r=r, lora_alpha=alpha)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    kinds = []
    start = 0
    for layer, (shape, delta) in enumerate(zip(adapter.shapes, deltas(adapter).values(), strict=True)):
        if shape.kind not in kinds:
            kinds.append(shape.kind)
        index = kinds.index(shape.kind)
        a, b = adapter.get_parameter(f"factor_a_{index}"), adapter.get_parameter(f"factor_b_{index}").T
        u = torch.diag(adapter.scale_u[layer])
        v = torch.diag(adapter.scale_v[start : start + shape.out_features])
        start += shape.out_features
        expected = (1.0 if alpha is None else alpha / r) * v @ b @ u @ a
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-4)
    assert start == adapter.scale_v.numel()
    assert len(kinds) < len(adapter.shapes)


def test_tied_lora_starts_at_zero_with_loras_factors():
    model = build("stack")
    base = run(model, make_batch("stack"))
    adapter = vblora.attach(model, config_for("tied_lora"))
    assert all(not delta.any() for delta in deltas(adapter).values())
    assert torch.equal(run(model, make_batch("stack")), base)
    for shape, name in ((adapter.shapes[0], "factor_a_0"), (adapter.shapes[1], "factor_a_1")):
        a = adapter.get_parameter(name)
        assert 0 < a.abs().max() <= shape.in_features**-0.5
    assert (adapter.scale_u == 1).all() and (adapter.scale_v == 1).all()
    run(model, make_batch("stack")).square().mean().backward()
    assert adapter.factor_b_0.grad.any()  # training can begin


def test_tied_lora_refuses_layers_of_one_kind_with_different_widths():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 6)])
    with pytest.raises(ValueError, match=r"layers\.0.*layers\.1.*differ"):
        vblora.attach(model, vblora.TiedLoRAConfig(target_modules=["0", "1"], r=2))
    assert not hasattr(model, "tied_lora_adapter") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("rows", "columns"), [(7, 12), (12, 7), (9, 9), (40, 1)])
def test_singular_factors_are_those_of_a_full_decomposition(rows, columns):
    weight = torch.randn(rows, columns)
    r = min(rows, columns, 4)
    us, vt = truncated_svd(weight, r)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    assert us.dtype == vt.dtype == torch.float32
    torch.testing.assert_close(us.T @ vt, ((u[:, :r] * s[:r]) @ v[:r]).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(us.norm(dim=1), s[:r].float(), rtol=1e-5, atol=1e-5)  # largest first
    torch.testing.assert_close(vt @ vt.T, torch.eye(r), rtol=1e-5, atol=1e-5)
    assert (vt.gather(1, vt.abs().argmax(1, keepdim=True)) > 0).all()
    assert all(torch.equal(a, b) for a, b in zip((us, vt), truncated_svd(weight, r), strict=True))


@pytest.mark.parametrize("weight", [torch.zeros(6, 5), torch.ones(6, 5), torch.eye(5)[:2].T @ torch.randn(2, 8)])
def test_singular_factors_of_a_weight_of_low_rank_are_finite_and_right(weight):
    us, vt = truncated_svd(weight, 4)
    assert us.isfinite().all() and vt.isfinite().all()
    assert vt.norm(dim=1).max() < 1 + 1e-4
    torch.testing.assert_close(us.T @ vt, weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("kind", ["stack", "stack_conv1d", "bert", "gpt2"])
def test_lora_xs_is_its_formula(kind, alpha):
    model = build(kind)
    r = 3
    adapter = adapt(model, "lora_xs", kind, r=r, lora_alpha=alpha)
    for layer, (name, delta) in enumerate(deltas(adapter).items()):
        weight = model.get_submodule(name).weight.detach()
        weight = weight.T if "Conv1D" in type(model.get_submodule(name)).__name__ else weight
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        # The signs of singular vectors are free; the rest is not.
        ours = adapter.layer_factors()[name][1]  # U S
        sign = torch.sign((u[:, :r] * ours).sum(0))
        expected = (u[:, :r] * sign * s[:r]) @ adapter.mixing[layer].detach() @ (v[:r] * sign[:, None])
        scale = 1.0 if alpha is None else alpha / r
        torch.testing.assert_close(delta, scale * expected, rtol=1e-3, atol=1e-4)


def test_lora_xs_starts_near_zero_and_trains_its_matrices_only():
    model = build("stack")
    adapter = vblora.attach(model, config_for("lora_xs"))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lora_xs_adapter.mixing"]
    assert 0 < max(delta.abs().max() for delta in deltas(adapter).values()) < 1e-3
    assert 0 < adapter.mixing.abs().max() < 1e-4
    assert list(adapter.state_dict()) == ["mixing"]


def test_lora_xs_refuses_a_rank_above_the_layers():
    model = build("stack", hidden=16)
    with pytest.raises(ValueError, match=r"rank 17 is more than layers\.0\.up.*16 -> 32"):
        vblora.attach(model, config_for("lora_xs", r=17))
    assert not hasattr(model, "lora_xs_adapter") and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["bert", "llama", "stack"])
@pytest.mark.parametrize("method", ["tied_lora", "lora_xs"])
def test_stored_parameters_are_the_trained_ones(method, kind):
    adapter = adapt(build(kind), method, kind)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert adapter.stored_parameters().parameters == trained
    assert adapter.stored_parameters() == counts.METHODS[method](adapter.shapes, r=2)
    assert sum(t.numel() for t in adapter.tensors("full").values()) == trained


@pytest.mark.parametrize(("num_vectors", "topk", "b"), [(12, 2, 8), (300, 3, 8), (20, 1, 12)])
def test_stored_parameters_of_vblora_are_the_counted_ones(num_vectors, topk, b, tmp_path):
    from safetensors.torch import load_file

    adapter = adapt(build("stack"), num_vectors=num_vectors, topk=topk, vector_length=b)
    count = adapter.stored_parameters()
    assert count == counts.count_vblora(adapter.shapes, r=2, num_vectors=num_vectors, vector_length=b, topk=topk)
    adapter.save(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors").values()
    assert sum(t.numel() * t.element_size() for t in stored) == count.bytes


@pytest.mark.parametrize("form", ["topk", "full"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "stack_conv1d"])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_comes_back_from_its_files(method, kind, form, tmp_path):
    heads = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
    model, other = build(kind), build(kind)
    settings = {"target_modules": ["query", "value"], **heads} if kind == "bert" else {}
    adapter = adapt(model, method, kind, **settings)
    with torch.no_grad():
        for module in adapter.saved.values():
            module.weight.mul_(2.0)
    adapter.save(tmp_path, form=form)
    torch.manual_seed(99)
    loaded = vblora.load(other, tmp_path, name="again")
    assert loaded.config == adapter.config and loaded.init_seed == 3 and loaded.name == "again"
    with torch.no_grad():
        torch.testing.assert_close(run(other, make_batch(kind)), run(model, make_batch(kind)), rtol=1e-5, atol=1e-6)
    if form == "full":
        expected = adapter.state_dict()
        assert all(torch.equal(t, expected[key]) for key, t in loaded.state_dict().items())
