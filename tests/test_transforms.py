"""torch.func's transforms, second derivatives, and gradient checkpointing of models with several entries."""

from __future__ import annotations

import pytest
import torch
import transformers
from core_helpers import adapt, build
from torch.func import functional_call, grad, jvp, vmap

import vblora
from vblora.methods import VBLoRAConfig


@pytest.fixture
def stack():
    torch.manual_seed(0)
    model = build("stack").double()
    adapt(model, kind="stack").double()
    return model.eval(), torch.randn(6, 5, dtype=torch.float64)


def loss_of(model, values, x):
    return functional_call(model, values, (x,)).square().mean()


def gradients(model, x):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(model(x).square().mean(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def test_grad_vmap_and_jvp_give_what_autograd_gives(stack):
    model, x = stack
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    expected = gradients(model, x)
    whole = grad(lambda v: loss_of(model, v, x))(values)
    rows = vmap(grad(lambda v, row: loss_of(model, v, row[None])), in_dims=(None, 0))(values, x)
    along = {name: torch.randn_like(value) for name, value in values.items()}
    _, slope = jvp(lambda v: loss_of(model, v, x), (values,), (along,))
    for name in values:
        torch.testing.assert_close(whole[name], expected[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(rows[name].mean(0), expected[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope, sum((expected[n] * along[n]).sum() for n in values), rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x).values(), expected.values(), strict=True))


def test_a_gradient_penalty_reaches_bank_and_logits(stack):
    model, x = stack
    names = ["vblora_adapter.vector_bank", "vblora_adapter.topk_logits"]
    parameters = [model.get_parameter(name) for name in names]
    first = torch.autograd.grad(model(x).square().mean(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    step = 1e-5
    for parameter, found in zip(parameters, second, strict=True):  # by differences, along one direction
        direction = torch.randn_like(parameter)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
            ends.append(sum(gradients(model, x)[name].square().sum() for name in names))
            with torch.no_grad():
                parameter.sub_(sign * step * direction)
        difference = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((found * direction).sum(), difference, rtol=1e-5, atol=1e-9)


def whisper():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "num_mel_bins": 4, "vocab_size": 20}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 10, "max_target_positions": 8}
    config = transformers.WhisperConfig(**sizes, **heads, **tokens, **widths)
    return transformers.WhisperForConditionalGeneration(config).train()


def bank_gradient(targets, reentrant):
    model = whisper()
    settings = {"r": 2, "num_vectors": 8, "vector_length": 8, "init_vector_bank_bound": 0.3}
    adapter = vblora.attach(model, VBLoRAConfig(target_modules=targets, **settings), seed=0)
    if reentrant:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    features = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(1))
    model(input_features=features, labels=torch.tensor([[4, 5, 6], [7, 8, 9]])).loss.backward()
    return adapter.vector_bank.grad


@pytest.mark.parametrize("targets", [r".*encoder\.layers.*q_proj", ["q_proj", "fc1"]])
def test_an_encoder_that_takes_no_tokens_trains_under_reentrant_checkpointing(targets):
    torch.testing.assert_close(bank_gradient(targets, True), bank_gradient(targets, False), rtol=1e-4, atol=1e-7)


def test_layers_that_reentrant_checkpointing_leaves_without_gradient_are_named():
    model = build("stack")
    adapt(model, kind="stack")
    model.train()

    def forward(x):
        hidden = model.embed(x)  # frozen: its output requires no gradient, so that the segment has no backward
        hidden = torch.utils.checkpoint.checkpoint(model.layers[0], hidden, use_reentrant=True)
        return model.layers[1](hidden)

    model.forward = forward
    x = torch.randn(3, 5)
    model(x).sum().backward()
    with pytest.warns(UserWarning, match=r"no gradient to 2 adapted layers \(layers\.0\.up, layers\.0\.down"):
        model(x)
