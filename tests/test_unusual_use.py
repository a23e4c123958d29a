"""Layers and tools that an adapter meets now and then: they work, or are refused with the way out."""

from __future__ import annotations

import contextlib

import peft
import pytest
import torch
from core_helpers import Stack, adapt, build, config_for, groups_for, make_batch, run
from torch import nn

import vblora


class PairLinear(nn.Linear):
    """As Megatron's layers: the output, and a bias for others to add."""

    def forward(self, x):
        return super().forward(x), None


class PairStack(Stack):
    def __init__(self):
        super().__init__(layers=1)
        self.layers[0].up = PairLinear(16, 32)
        self.layers[0].forward = self.block

    def block(self, x):
        layer = self.layers[0]
        return x + layer.down(torch.tanh(layer.up(x)[0]))


def test_a_layer_that_gives_no_tensor_is_refused_by_name(tmp_path):
    model = PairStack()
    adapt(model, target_modules=["up", "down"]).pack(tmp_path / "a.safetensors")
    said = r"layers\.0\.up is a PairLinear that gives a tuple.*exclude_modules"
    with pytest.raises(ValueError, match=said):
        run(model, make_batch("stack"))
    model = PairStack()
    store = vblora.AdapterStore(model, tmp_path)
    with store.rows(["a"]), pytest.raises(ValueError, match=said):
        run(model, make_batch("stack", rows=1))
    adapt(model, target_modules=["up", "down"], exclude_modules=["up"])
    run(model, make_batch("stack"))


def test_the_output_layer_of_multihead_attention_is_refused_with_the_way_out():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    everything = {"target_modules": ["out_proj", "linear1"]}
    with pytest.raises(ValueError, match=r'self_attn\.out_proj is never called.*exclude_modules=\["out_proj"\]'):
        vblora.attach(model, config_for("vblora", **everything))
    vblora.attach(model, config_for("vblora", **everything, exclude_modules=["out_proj"]))


@pytest.mark.parametrize("method", ["vblora", "tied_lora"])
def test_an_adapter_that_was_frozen_with_the_model_is_named(method):
    model = build("llama")
    adapter = adapt(model, method, kind="llama")
    peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    rates = {"lr_vector_bank": 1e-3, "lr_logits": 1e-2} if method == "vblora" else {}
    with pytest.raises(ValueError, match=r"is frozen.*before vblora\.attach.*requires_grad_"):
        vblora.param_groups(model, lr=1e-3, **rates)
    adapter.requires_grad_(True)
    assert sum(len(group["params"]) for group in groups_for(model)) == len(list(adapter.parameters()))


def test_a_rate_too_many_is_still_said_where_the_adapter_is_trained():
    model = build("stack")
    adapt(model, "tied_lora")
    with pytest.raises(ValueError, match="lr_vector_bank is given"):
        vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3)


def test_dynamic_quantisation_keeps_the_adapter():
    model, batch = build("stack"), make_batch("stack")
    with torch.no_grad():
        base = run(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), batch)
        adapt(model)
        adapted = run(model, batch)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        gap, effect = (run(quantised, batch) - adapted).abs().max(), (adapted - base).abs().max()
        assert gap < 0.1 * effect
        torch.testing.assert_close(run(model, batch), adapted)  # the model itself is as it was


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("method", ["vblora", "tied_lora"])
def test_a_traced_model_gives_the_adapted_output(method, with_gradients):
    model, one, other = build("stack"), make_batch("stack"), make_batch("stack", seed=5)
    adapt(model, method)
    with contextlib.nullcontext() if with_gradients else torch.no_grad():
        run(model, one)
        traced = torch.jit.trace(model, (one["x"],))
        for batch in (one, other):
            torch.testing.assert_close(traced(batch["x"]), run(model, batch), atol=1e-5, rtol=1e-5)


def test_an_exported_model_gives_the_adapted_output():
    model, one, other = build("stack"), make_batch("stack"), make_batch("stack", seed=5)
    adapt(model)
    exported = torch.export.export(model, (one["x"],)).module()
    for batch in (one, other):
        torch.testing.assert_close(exported(batch["x"]), run(model, batch), atol=1e-5, rtol=1e-5)
