"""The estimate of a run's memory, held to what small models are measured to take; nothing here looks at a time."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import vblora
from vblora_experiments import estimate
from vblora_experiments.memory import peak_bytes

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # last, as NLG has a generation.py too

import step_time

WITHIN = 0.15  # of what is measured
ROWS, LENGTH = 2, 64


def llama(width=128, blocks=2, vocabulary=64):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_hidden_layers": blocks}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_attention_heads=2, **sizes))


def prepared(model, dtype, checkpointing=False, bits=16, num_vectors=64):
    """The model in this form, with VB-LoRA and its optimiser."""
    model = model.to(dtype).train()
    if bits == 4:
        step_time.in_four_bits(model, "cpu", dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = vblora.VBLoRAConfig(r=4, num_vectors=num_vectors, vector_length=64, topk=2, target_modules="all-linear")
    adapter = vblora.attach(model, config, seed=0)
    return adapter, vblora.AdamW(vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3, lr_logits=1e-2))


def step(model, optimizer):
    ids = torch.randint(3, model.config.vocab_size, (ROWS, LENGTH))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_peak_bytes_are_those_held_at_once():
    kept = []

    def work():
        first = torch.empty(1000)  # 4,000 bytes
        second = torch.empty(1000)  # 8,000 at once
        del first
        kept.append(torch.empty(500))
        del second

    assert peak_bytes(work) == 8000 and peak_bytes(lambda: None) == 0
    assert peak_bytes(kept.clear) == 0  # what was there before is not taken off


def test_peak_bytes_do_not_depend_on_what_was_measured_before():
    kept = []

    def renew():
        kept.clear()
        kept.append(torch.empty(1000))

    assert [peak_bytes(renew) for _ in range(3)] == [4000, 4000, 4000]


@pytest.mark.parametrize(
    ("sizes", "bits"), [({}, 16), ({"blocks": 4}, 16), ({"vocabulary": 1024}, 16), ({"width": 256}, 16), ({}, 4)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_step_is_as_estimated(sizes, bits, checkpointing, dtype):
    model = llama(**sizes)
    skeleton = copy.deepcopy(model)
    adapter, optimizer = prepared(model, dtype, checkpointing, bits)
    step(model, optimizer)
    found = peak_bytes(lambda: step(model, optimizer))
    composed = estimate.vblora_bytes(adapter.layout.rows, adapter.config, dtype.itemsize)[1]
    parts = estimate.memory(skeleton, 0, 0, composed, ROWS * LENGTH, checkpointing, dtype.itemsize, bits)
    assert parts["memory_bytes"] == pytest.approx(found, rel=WITHIN)


def test_what_is_held_between_steps_is_as_estimated(monkeypatch):
    model = llama()
    assert estimate.weight_bytes(model, 16, "float32") == sum(p.nbytes for p in model.parameters())
    adapter, optimizer = prepared(model, torch.float32, num_vectors=300)
    step(model, optimizer)
    monkeypatch.setattr(estimate, "SLOTS", adapter.logits.width)
    state, _ = estimate.vblora_bytes(adapter.layout.rows, adapter.config, 4)
    assert state == pytest.approx(step_time.state_bytes(model, optimizer), rel=0.01)


def test_a_share_of_a_divided_model():
    model = llama()
    parts = estimate.memory(model, 1001, 10, 100, ROWS * LENGTH, True, 4)
    block = 4 * 128**2 + 3 * 128 * 344
    assert parts["gathered_bytes"] == 4 * (3 * block + 2 * 64 * 128 + 5 * 128)
    assert estimate.divided(parts, 1) == parts["memory_bytes"]
    assert estimate.divided(parts, 4) == parts["memory_bytes"] - 1001 + 251 + parts["gathered_bytes"]
    assert estimate.memory(model, 1001, 10, 100, ROWS * LENGTH, True, 4, bits=4)["gathered_bytes"] == 0
