"""torch.compile of an adapted model: no graph breaks (fullgraph), and the values and training of the eager one."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForSequenceClassification

import vblora

CONFIGS = {
    "vblora": vblora.VBLoRAConfig(
        r=4, num_vectors=300, vector_length=32, init_vector_bank_bound=0.3, target_modules="all-linear"
    ),
    "tied_lora": vblora.TiedLoRAConfig(r=4, target_modules="all-linear"),
    "lora_xs": vblora.LoRAXSConfig(r=4, target_modules="all-linear"),
}


def build(kind):
    torch.manual_seed(0)
    size = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    if kind == "llama":
        config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
        return LlamaForCausalLM(config).train()
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return RobertaForSequenceClassification(RobertaConfig(**size, **dropouts, num_attention_heads=4)).train()


def batch(kind):
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids if kind == "llama" else ids[:, 0] % 2}


def attach(model, method):
    adapter = vblora.attach(model, CONFIGS[method], seed=0)
    rates = {"lr_vector_bank": 1e-2, "lr_logits": 1e-1} if method == "vblora" else {"lr_adapter": 1e-2}
    return adapter, vblora.AdamW(vblora.param_groups(model, lr=1e-3, **rates))


def losses(model, call, optimizer, given):
    found = []
    for _ in range(4):
        loss = call(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        found.append(float(call(**given).loss))
    return found


@pytest.mark.parametrize(
    ("kind", "method", "part"),
    [
        ("llama", "vblora", "model"),
        ("llama", "vblora", "layers"),
        ("llama", "vblora", "checkpointed layers"),
        ("roberta", "vblora", "layers"),
        ("llama", "tied_lora", "layers"),
    ],
)
def test_a_compiled_model_trains_as_the_eager_one(kind, method, part):
    torch.compiler.reset()
    eager, compiled = build(kind), build(kind)
    adapter, optimizer = attach(eager, method)
    expected = losses(eager, eager, optimizer, batch(kind))
    other, optimizer = attach(compiled, method)
    call = compiled
    if part == "model":
        call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    else:
        if part == "checkpointed layers":
            compiled.gradient_checkpointing_enable({"use_reentrant": False})
        layers = compiled.model.layers if kind == "llama" else compiled.roberta.encoder.layer
        for layer in layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    assert losses(compiled, call, optimizer, batch(kind)) == pytest.approx(expected, abs=1e-6)
    for (name, a), b in zip(adapter.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
    assert expected[-1] < expected[0]


def test_a_compiled_model_can_be_switched_off_and_merged():
    torch.compiler.reset()
    model, given = build("llama").eval(), batch("llama")
    with torch.no_grad():
        base = model(**given).logits
        adapter, _ = attach(model, "vblora")
        adapted = model(**given).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**given).logits, adapted)
        with adapter.disabled():
            torch.testing.assert_close(compiled(**given).logits, base)
        adapter.merge()
        torch.testing.assert_close(compiled(**given).logits, adapted, atol=1e-5, rtol=1e-4)
        assert (adapted - base).abs().max() > 1e-3


def test_a_compiled_layer_called_without_the_whole_model_uses_the_parameters_of_now():
    torch.compiler.reset()
    model, given = build("llama"), batch("llama")
    _, optimizer = attach(model, "vblora")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = model.model(given["input_ids"]).last_hidden_state  # no forward pass of the whole model yet
    losses(model, model, optimizer, given)
    model.train()
    model(**given).loss.backward()
    optimizer.step()
    with torch.no_grad():
        compiled = model.model(given["input_ids"]).last_hidden_state
        for layer in model.model.layers:
            layer._compiled_call_impl = None
        eager = model.model(given["input_ids"]).last_hidden_state
    torch.testing.assert_close(compiled, eager)
    assert (eager - before).abs().max() > 1e-3
