"""Attaching, the forward path, merging and detaching, for every method over every kind of model."""

from __future__ import annotations

import copy

import pytest
import torch
from core_helpers import (
    METHODS,
    adapt,
    assert_unchanged,
    build,
    config_for,
    gradients,
    groups_for,
    make_batch,
    run,
    snapshot,
)
from torch import nn
from torch.nn import functional as F

import vblora
from vblora.methods import vb_lora

KINDS = ("bert", "gpt2", "llama", "stack", "stack_conv1d")
every_method = pytest.mark.parametrize("method", METHODS)
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def composed(monkeypatch):
    """Counts the compositions from the bank."""
    calls = []
    original = vb_lora.compose

    def counted(*args):
        calls.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(vb_lora, "compose", counted)
    return calls


# --- What attaching does -----------------------------------------------------------------------------------------


@every_kind
@every_method
def test_output_is_that_of_weights_with_the_factors_product_added(method, kind):
    model, plain = build(kind), build(kind)
    adapter = adapt(model, method, kind)
    with torch.no_grad():
        for name, (a, b) in adapter.layer_factors().items():
            weight = plain.get_submodule(name).weight
            delta = b @ a
            weight += delta if delta.shape == weight.shape and not is_conv1d(plain, name) else delta.T
        expected, output = run(plain, make_batch(kind)), run(model, make_batch(kind))
        with adapter.disabled():
            base = run(model, make_batch(kind))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (output - base).abs().max() > 1e-2


def is_conv1d(model, name):
    return type(model.get_submodule(name)).__name__ == "Conv1D"


@every_kind
@every_method
def test_the_base_model_keeps_its_objects_and_names(method, kind):
    model = build(kind)
    before = snapshot(model)
    adapter = adapt(model, method, kind)
    after = snapshot(model)
    assert {n: m for n, m in after["modules"].items() if not n.startswith(adapter.name)} == before["modules"]
    assert [key for key in after["state"] if not key.startswith(adapter.name)] == list(before["state"])
    assert [n for n, flag in after["flags"].items() if flag] == [
        f"{adapter.name}.{n}" for n, _ in adapter.named_parameters()
    ]
    assert model.get_submodule(adapter.name) is adapter


@every_kind
@every_method
def test_detach_gives_the_base_model_back(method, kind):
    model = build(kind)
    next(model.parameters()).requires_grad_(False)
    before, output = snapshot(model), run(model, make_batch(kind))
    adapter = adapt(model, method, kind)
    run(model, make_batch(kind)).sum().backward()
    adapter.detach()
    assert_unchanged(model, before)
    assert torch.equal(run(model, make_batch(kind)), output)
    for call in (adapter.detach, lambda: adapter.name):
        with pytest.raises(ValueError, match="not attached"):
            call()


@every_method
def test_disabled_is_the_base_model_and_ends_with_the_block(method):
    model = build("stack")
    base = run(model, make_batch("stack"))
    adapter = adapt(model, method)
    output = run(model, make_batch("stack"))
    with pytest.raises(RuntimeError, match="stop"), adapter.disabled():
        assert torch.equal(run(model, make_batch("stack")), base)
        with adapter.disabled():
            pass
        assert torch.equal(run(model, make_batch("stack")), base)
        raise RuntimeError("stop")
    assert torch.equal(run(model, make_batch("stack")), output)


@every_method
def test_the_seed_decides_the_initial_values_and_is_kept(method):
    def values(seed):
        adapter = vblora.attach(build("stack"), config_for(method), seed=seed)
        assert adapter.init_seed == seed
        return adapter.state_dict()

    first, again, other = values(1), values(1), values(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    torch.manual_seed(4)
    drawn = vblora.attach(build("stack"), config_for(method))
    assert all(torch.equal(values(drawn.init_seed)[key], t) for key, t in drawn.state_dict().items())


def test_a_taken_name_is_refused_and_the_model_unchanged():
    model = build("stack")
    adapt(model)
    before = snapshot(model)
    for name in (None, "layers", "forward", "use_reentrant"):
        with pytest.raises(ValueError, match="already has"):
            vblora.attach(model, config_for("vblora"), name=name)
        assert_unchanged(model, dict(before))


@pytest.mark.parametrize("name", ["a.b", "with space", "1st"])
def test_a_name_that_cannot_be_an_attribute_is_refused_and_the_model_unchanged(name):
    model = build("stack")
    before = snapshot(model)
    with pytest.raises(ValueError, match=name):
        vblora.attach(model, config_for("vblora"), name=name)
    assert_unchanged(model, before)


def test_attach_refuses_what_is_no_configuration_of_its_own():
    with pytest.raises(ValueError, match=r"VBLoRAConfig.*not dict"):
        vblora.attach(build("stack"), {"r": 4})


def test_modules_to_save_are_trained_and_the_rest_is_frozen():
    model = build("bert")
    adapter = adapt(model, kind="bert", target_modules=["query"], modules_to_save=["classifier"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "classifier.weight",
        "classifier.bias",
        "vblora_adapter.vector_bank",
        "vblora_adapter.topk_logits",
    }
    assert adapter.head_parameters() == 3 * 32 + 3


# --- Several adapters --------------------------------------------------------------------------------------------


def test_two_adapters_add_up():
    model, plain = build("stack"), build("stack")
    first, second = adapt(model, name="first"), adapt(model, name="second", seed=9)
    with torch.no_grad():
        for adapter in (first, second):
            for name, (a, b) in adapter.layer_factors().items():
                plain.get_submodule(name).weight += b @ a
    torch.testing.assert_close(run(model, make_batch("stack")), run(plain, make_batch("stack")), rtol=1e-4, atol=1e-5)
    with first.disabled():
        only_second = run(model, make_batch("stack"))
    first.detach()
    assert torch.equal(run(model, make_batch("stack")), only_second)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_can_be_detached_in_any_order(order):
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    before = snapshot(model)
    adapters = [
        adapt(model, kind="bert", target_modules=["query"], modules_to_save=["classifier"], name="first"),
        adapt(model, "tied_lora", kind="bert", target_modules=["query"], name="second"),
    ]
    assert model.classifier.weight.requires_grad  # the second leaves the first its head
    adapters[order[0]].detach()
    left = adapters[order[1]]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {"classifier.weight", "classifier.bias"} if left.name == "first" else set()
    assert trained == {f"{left.name}.{n}" for n, _ in left.named_parameters()} | head
    left.detach()
    assert_unchanged(model, before)


def test_a_second_adapter_leaves_a_frozen_first_one_frozen():
    model = build("stack")
    first = adapt(model, name="first")
    first.requires_grad_(False)
    adapt(model, name="second")
    assert not any(p.requires_grad for p in first.parameters())


def test_adapters_merged_over_each_other_come_off_in_reverse_only():
    model = build("stack")
    first, second = adapt(model, name="first"), adapt(model, name="second", seed=9)
    expected = run(model, make_batch("stack"))
    before = copy.deepcopy(model.state_dict())
    first.merge()
    second.merge()
    torch.testing.assert_close(run(model, make_batch("stack")), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="second"):
        first.unmerge()
    second.unmerge()
    first.unmerge()
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert torch.equal(run(model, make_batch("stack")), expected)


# --- Composing once ----------------------------------------------------------------------------------------------


@every_kind
def test_one_composition_for_a_training_pass_and_one_for_many_evaluations(kind, composed):
    model = build(kind)
    adapter = adapt(model, kind=kind)
    batch = make_batch(kind)
    for _ in range(3):
        run(model, batch).square().mean().backward()
    assert composed == [True] * 3
    composed.clear()
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            run(model, batch)
    adapter.layer_factors()
    assert composed == [False]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@every_method
def test_generating_composes_once_and_equals_the_merged_model(method, kind, settings, composed):
    model = build(kind)
    adapter = adapt(model, method, kind)
    prompt = make_batch(kind, rows=2, length=3)["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    tokens = model.generate(prompt, **settings)
    assert composed == ([False] if method == "vblora" else [])
    with adapter.disabled():
        base = model.generate(prompt, **settings)
    adapter.merge()
    assert torch.equal(tokens, model.generate(prompt, **settings))
    assert not torch.equal(tokens, base)


def in_place(model, adapter):
    with torch.no_grad():
        next(adapter.parameters()).mul_(1.5)


def by_step(model, adapter):
    run(model, make_batch("stack")).square().mean().backward()
    vblora.AdamW(groups_for(model, 0.1)).step()


def by_state_dict(model, adapter):
    model.load_state_dict({key: t * 1.5 if t.is_floating_point() else t for key, t in model.state_dict().items()})


def by_restoring_adapter(model, adapter):
    state = adapter.state_dict()
    adapter.load_state_dict({key: t * 1.5 if t.is_floating_point() else t for key, t in state.items()})


def by_precision(model, adapter):
    adapter.bfloat16()


def by_another_parameter(model, adapter):
    name, parameter = next(adapter.named_parameters())
    setattr(adapter, name, nn.Parameter(parameter.detach() * 1.5))


@pytest.mark.parametrize(
    "change", [in_place, by_step, by_state_dict, by_restoring_adapter, by_precision, by_another_parameter]
)
@every_method
def test_a_change_of_the_parameters_is_seen_at_once(method, change):
    model = build("stack")
    adapter = adapt(model, method)
    with torch.no_grad():
        before = run(model, make_batch("stack"))
        with torch.enable_grad():
            change(model, adapter)
        after = run(model, make_batch("stack"))
        fresh = run(copy.deepcopy(model), make_batch("stack"))
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


@every_method
def test_several_passes_can_be_gone_back_through_one_by_one(method):
    def train(apart):
        model = build("stack").train()
        adapter = adapt(model, method)
        losses = [run(model, make_batch("stack", seed=seed)).square().mean() for seed in range(3)]
        if apart:
            for loss in losses:
                loss.backward()
        else:
            sum(losses).backward()
        return gradients(adapter)

    apart, together = train(True), train(False)
    for name, gradient in together.items():
        torch.testing.assert_close(apart[name], gradient, rtol=1e-4, atol=1e-6)


@every_method
def test_training_works_after_inference_mode_and_evaluation_in_between(method):
    model, other = build("stack"), build("stack")
    adapter, reference = adapt(model, method), adapt(other, method)
    with torch.inference_mode():
        run(model, make_batch("stack"))
    output = run(model, make_batch("stack"))
    with torch.no_grad():
        run(model, make_batch("stack", seed=5))
    output.square().mean().backward()
    run(other, make_batch("stack")).square().mean().backward()
    expected = gradients(reference)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(adapter).items())


def test_an_adapter_attached_or_loaded_in_inference_mode_can_be_used_and_trained(tmp_path):
    model = build("stack")
    expected = run(model, make_batch("stack"))
    with torch.inference_mode():
        adapter = adapt(model)
        output = run(model, make_batch("stack"))
        adapter.save(tmp_path, form="full")
        adapter.detach()
        vblora.load(model, tmp_path)
        assert torch.equal(run(model, make_batch("stack")), output)
    run(model, make_batch("stack")).square().mean().backward()
    assert not torch.equal(output, expected)
    assert model.vblora_adapter.vector_bank.grad.abs().max() > 0


# --- Precision, forms of call ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@every_method
def test_a_model_cast_after_attaching_computes_and_trains_in_that_precision(method, dtype):
    model = build("stack")
    adapter = adapt(model, method)
    expected = run(model, make_batch("stack"))
    expected.square().mean().backward()
    reference = gradients(adapter)
    model.zero_grad()
    model.to(dtype)
    output = run(model, {"x": make_batch("stack")["x"].to(dtype)})
    output.square().mean().backward()
    tolerance = {torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert output.dtype == dtype and all(p.dtype == dtype for p in adapter.parameters())
    assert (output - expected).abs().max() <= tolerance * expected.abs().max()
    for name, gradient in gradients(adapter).items():
        assert (gradient - reference[name]).abs().max() <= 2 * tolerance * reference[name].abs().max()


@every_method
def test_a_half_precision_base_leaves_the_adapter_in_float32(method):
    model = build("stack").bfloat16()
    adapter = adapt(model, method)
    output = run(model, {"x": make_batch("stack")["x"].bfloat16()})
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients(adapter).values())


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "stack"])
@every_method
def test_autocast_changes_rounding_only(method, kind):
    model = build(kind)
    adapter = adapt(model, method, kind)
    full = run(model, make_batch(kind))
    full.square().mean().backward()
    reference = gradients(adapter)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(model, make_batch(kind))
    output.float().square().mean().backward()
    assert (output - full).abs().max() <= 0.1 * full.abs().max()
    for name, gradient in gradients(adapter).items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), reference[name].flatten(), dim=0) > 0.98


class Precise(nn.Linear):
    """A layer that computes in float32 whatever autocast says, as quantised layers do."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@every_method
def test_a_layers_output_keeps_its_precision_under_autocast(method):
    model = nn.Sequential(Precise(8, 8))
    plain = copy.deepcopy(model)
    adapter = (
        adapt(model, method, target_modules=["0"], vector_length=8)
        if method == "vblora"
        else adapt(model, method, target_modules=["0"])
    )
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert output.dtype == torch.float32
        assert torch.equal(output, plain(x))


@every_method
def test_the_layers_input_may_come_by_keyword(method):
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(8, 8)

        def forward(self, x, by_keyword):
            return self.up(input=x) if by_keyword else self.up(x)

    model = Caller()
    adapt(model, method, target_modules=["up"])
    x = torch.randn(3, 8)
    assert torch.equal(model(x, True), model(x, False))


@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 3, 4, 8)])
@every_method
def test_inputs_of_any_number_of_dimensions(method, shape):
    model = nn.Sequential(nn.Linear(8, 6))
    plain = copy.deepcopy(model)
    adapter = adapt(model, method, target_modules=["0"])
    (a, b) = adapter.layer_factors()["0"]
    x = torch.randn(shape)
    torch.testing.assert_close(model(x), plain(x) + x @ a.T @ b.T, rtol=1e-4, atol=1e-5)


def test_widths_that_the_vector_length_does_not_divide():
    model, plain = build("stack"), build("stack")
    adapter = adapt(model, vector_length=12, topk=3)
    factors = adapter.layer_factors()
    assert {(a.shape, b.shape) for a, b in factors.values()} == {((2, 32), (64, 2)), ((2, 64), (32, 2))}
    dense = adapter.dense_logits()
    values, indices = dense.topk(3)
    table = torch.einsum("nk,nkb->nb", values.softmax(1), adapter.vector_bank[indices])
    row = 0
    with torch.no_grad():
        for name in factors:
            weight = plain.get_submodule(name).weight
            pair = []
            for features in (weight.shape[1], weight.shape[0]):
                tiles = -(-features // 12)
                block = table[row : row + 2 * tiles].reshape(2, tiles * 12)[:, :features]
                row += 2 * tiles
                pair.append(block)
            weight += pair[1].T @ pair[0]
    assert row == len(dense)
    output = run(model, make_batch("stack"))
    torch.testing.assert_close(output, run(plain, make_batch("stack")), rtol=1e-4, atol=1e-5)
    output.square().mean().backward()
    assert adapter.vector_bank.grad.any()


@every_method
def test_dropout_acts_in_training_only(method):
    field = "vblora_dropout" if method == "vblora" else "lora_dropout"
    model, plain = build("stack"), build("stack")
    adapt(model, method, **{field: 0.5})
    adapt(plain, method)
    expected = run(plain, make_batch("stack"))
    assert torch.equal(run(model, make_batch("stack")), expected)
    model.train()
    assert not torch.allclose(run(model, make_batch("stack")), expected)


# --- Copies ------------------------------------------------------------------------------------------------------


@every_kind
@every_method
def test_a_deep_copy_is_independent(method, kind):
    model = build(kind).train()
    adapt(model, method, kind)
    batch = make_batch(kind)
    output = run(model, batch)
    output.square().mean().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, batch), output)
    twin.zero_grad()
    twin_adapter = next(m for m in twin.modules() if isinstance(m, vblora.Adapter))
    optimizer = vblora.AdamW(groups_for(twin, 0.1))
    run(twin, batch).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(run(twin, batch), output)
    assert torch.equal(run(model, batch), output)
    twin_adapter.merge()
    twin_adapter.unmerge()
    twin_adapter.detach()
    assert torch.equal(run(twin, batch), run(build(kind), batch))
    assert torch.equal(run(model, batch), output)
    assert not any(isinstance(m, vblora.Adapter) for m in twin.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in twin.modules())


@every_method
def test_a_copy_of_a_merged_model_can_be_unmerged(method):
    model = build("stack")
    adapter = adapt(model, method)
    before = run(model, make_batch("stack"))
    adapter.merge()
    twin = copy.deepcopy(model)
    getattr(twin, adapter.name).unmerge()
    assert torch.equal(run(twin, make_batch("stack")), before)
    assert adapter.merged


# --- Merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
@every_method
def test_merge_gives_the_same_output_and_unmerge_every_bit_back(method, kind, dtype):
    model = build(kind).to(dtype)
    adapter = adapt(model, method, kind)
    batch = {key: t.to(dtype) if t.is_floating_point() else t for key, t in make_batch(kind).items()}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        output = run(model, batch)
        adapter.merge()
        merged = run(model, batch)
        tolerance = 1e-4 if dtype == torch.float32 else 0.15
        assert (merged - output).abs().max() <= tolerance * output.abs().max()
        changed = {key for key, t in model.state_dict().items() if not torch.equal(before[key], t)}
        assert changed == {f"{name}.weight" for name in adapter.targets}
        adapter.unmerge()
        assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
        assert torch.equal(run(model, batch), output)


@every_method
def test_a_merged_adapter_can_be_detached_and_stays_in_the_weights(method):
    model = build("stack")
    adapter = adapt(model, method)
    adapter.merge(reversible=False)
    output = run(model, make_batch("stack"))
    adapter.detach()
    assert torch.equal(run(model, make_batch("stack")), output)
    assert not hasattr(model, f"{method}_adapter")


def test_merging_calls_in_the_wrong_order_are_refused():
    model = build("stack")
    adapter = adapt(model)
    with pytest.raises(ValueError, match="not merged"):
        adapter.unmerge()
    adapter.merge(reversible=False)
    with pytest.raises(ValueError, match="merged already"):
        adapter.merge()
    with pytest.raises(ValueError, match="unmerge it first"), adapter.disabled():
        pass
    with pytest.raises(ValueError, match="reversible=False"):
        adapter.unmerge()


def test_merging_into_a_weight_that_another_layer_shares_is_refused():
    model = build("gpt2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    adapter = adapt(model, kind="gpt2", target_modules=["c_attn", "lm_head"], vector_length=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lm_head.*transformer\.wte"):
        adapter.merge()
    assert not adapter.merged
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_attention_that_bypasses_its_output_layer_is_refused_or_left_out():
    """nn.MultiheadAttention reads out_proj's weight and never calls the layer: an adapter there would do nothing."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj"):
        vblora.attach(model, config_for("vblora", target_modules=["out_proj"]))
    adapter = adapt(model, target_modules="all-linear")
    assert list(adapter.targets) == ["linear1", "linear2"]
    model.eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():  # PyTorch's fast path must not pass the adapted layers over
        output = model(x)
        with adapter.disabled():
            assert not torch.allclose(model(x), output)
