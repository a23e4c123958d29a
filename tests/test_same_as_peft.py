"""VB-LoRA against PEFT's, which composes from all logits in every layer: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from core_helpers import adapt, build, make_batch, peft_native, peft_twin, run

import vblora

CASES = [
    # model, topk, num_vectors, vector_length, r, layers
    ("stack", 1, 8, 8, 1, 1),
    ("stack", 2, 90, 16, 4, 3),
    ("stack", 3, 2048, 4, 2, 2),
    ("stack", 6, 300, 32, 3, 2),
    ("stack", 6, 6, 1, 2, 1),
    ("stack_conv1d", 1, 255, 32, 4, 2),
    ("stack_conv1d", 2, 256, 8, 2, 3),
    ("stack_conv1d", 4, 40, 2, 5, 1),
    ("bert", 2, 90, 16, 4, 2),
    ("bert", 4, 20, 32, 1, 2),
    ("gpt2", 2, 64, 32, 4, 2),
    ("gpt2", 3, 17, 4, 2, 2),
    ("llama", 2, 30, 16, 4, 2),
]


def twins(kind, topk, num_vectors, vector_length, r, layers, **settings):
    base = build(kind, layers=layers)
    if kind == "bert":
        settings = {"target_modules": ["query", "value", "key"], "modules_to_save": ["classifier"], **settings}
    model = build(kind, layers=layers)
    adapter = adapt(model, kind=kind, topk=topk, num_vectors=num_vectors, vector_length=vector_length, r=r, **settings)
    return model, adapter, peft_twin(base, adapter)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_outputs_are_the_same(case, dtype, tolerance):
    model, adapter, twin = (part.to(dtype) for part in twins(*case, init_vector_bank_bound=0.3))
    batch = {key: t.to(dtype) if t.is_floating_point() else t for key, t in make_batch(case[0]).items()}
    with torch.no_grad():
        ours, theirs = run(model, batch), run(twin, batch)
        with adapter.disabled():
            base = run(model, batch)
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, scale)
    assert (ours - base).abs().max() > 1e-3 * scale  # the adapter has an effect to compare


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_gradients_are_the_same_and_zero_where_nothing_is_selected(case):
    model, adapter, twin = twins(*case)
    batch = make_batch(case[0])
    # A loss whose gradients are of the order of one, so that the tolerance says something.
    for each in (model, twin):
        output = run(each, batch)
        output.square().mean().backward()
    theirs = peft_native(twin, adapter, gradient=True)
    ours = {"bank": adapter.vector_bank.grad, "logits": adapter.topk_logits.grad}
    expected = {"bank": theirs["vector_bank"], "logits": theirs["logits"].gather(1, adapter.topk_indices)}
    for name, gradient in ours.items():
        size = expected[name].abs().max().clamp(min=1.0)
        assert (gradient - expected[name]).abs().max() <= 1e-5 * size, name
    assert ours["bank"].abs().max() > 0
    if case[1] > 1:
        assert ours["logits"].abs().max() > 0
    assert theirs["logits"].scatter(1, adapter.topk_indices, 0.0).abs().max() == 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("vblora_adapter"):  # the head
            wrapped = name.replace("classifier.", "classifier.modules_to_save.default.")
            other = twin.get_parameter(f"base_model.model.{wrapped}")
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_dropout_draws_the_same_masks_as_peft():
    base, model = build("stack").train(), build("stack").train()
    adapter = adapt(model, vblora_dropout=0.4)
    twin = peft_twin(base, adapter)
    batch = make_batch("stack")
    outputs = []
    for each in (model, twin, model):
        torch.manual_seed(5)
        outputs.append(run(each, batch))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-6)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], run(model, batch))


@pytest.mark.parametrize("kind", ["stack", "stack_conv1d"])
def test_merged_weights_are_the_same(kind):
    model, adapter, twin = twins(kind, 2, 30, 8, 2, 2)
    adapter.merge()
    merged = twin.merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bound", [0.02, 0.3])
def test_initial_values_have_pefts_distributions(bound):
    model = build("stack")
    config = vblora.VBLoRAConfig(
        r=4, num_vectors=200, vector_length=8, target_modules=["up", "down"], init_vector_bank_bound=bound
    )
    adapter = vblora.attach(model, config)
    bank, logits = adapter.vector_bank, adapter.dense_logits()
    assert bank.abs().max() <= bound and bank.abs().max() > 0.99 * bound
    assert abs(bank.mean()) < 0.05 * bound
    assert abs(bank.std() - bound / 3**0.5) < 0.05 * bound
    assert abs(logits.std() - 0.1) < 0.002 and abs(logits.mean()) < 0.002
