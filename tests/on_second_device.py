"""Attaching, training, loading, merging and serving on the device of second_device.py; test_second_device.py runs it.

Each check does the same on the CPU and compares values, so that nothing is moved to the right device and lost there.
"""

from __future__ import annotations

import copy

import pytest
import second_device
import torch
from core_helpers import adapt, config_for, groups_for, make_batch
from core_helpers import build as build_single
from core_helpers import run as run_single

import vblora
from vblora.methods.given_bank import use_bank
from vblora.methods.selection_rules import SelectionConfig

DEVICE = second_device.install()
SAME = {"rtol": 1e-8, "atol": 1e-9}  # in float64: the CPU's fused attention rounds otherwise


def build(kind):
    return build_single(kind).double()


def run(model, batch):
    kind = next(model.parameters()).dtype
    return run_single(model, {name: t.to(kind) if t.is_floating_point() else t for name, t in batch.items()})


def on(device, value):
    if isinstance(value, dict):
        return {name: on(device, part) for name, part in value.items()}
    return value.to(device)


def everywhere(check):
    """What `check` gives on the device, after a comparison with what it gives on the CPU."""
    here, there = check(torch.device("cpu")), check(DEVICE)
    assert here.keys() == there.keys() and here
    for name, value in there.items():
        assert value.device == DEVICE, (name, value.device)
        torch.testing.assert_close(value.cpu(), here[name], **SAME, msg=lambda said, name=name: f"{name}: {said}")
    return there


def tensors_of(adapter):
    return {name: tensor.detach().clone() for name, tensor in adapter.state_dict().items()}


def trained(model, adapter, kind, device, optimizer=None, steps=3):
    """All tensors of the adapter after some steps, the optimiser's, and an output."""
    assert all(tensor.device == device for tensor in adapter.state_dict().values())
    adapter.double()
    optimizer = optimizer or vblora.AdamW(groups_for(model, lr=0.05))
    batch = on(device, make_batch(kind))
    model.train()
    for _ in range(steps):
        run(model, batch).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    moments = {
        f"{name} {i}": tensor
        for i, state in enumerate(optimizer.state.values())
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor) and name != "step"  # AdamW keeps its count on the CPU
    }
    return {**tensors_of(adapter), **moments, "output": output_of(model, kind, device)}


def output_of(model, kind, device):
    with torch.no_grad():
        return run(model.eval(), on(device, make_batch(kind)))


def test_tensors_on_two_devices_are_refused():
    for mix in (torch.add, torch.matmul, lambda a, b: torch.where(a > 0, b, a), lambda a, b: a[b.long()]):
        with pytest.raises(RuntimeError):
            mix(torch.ones(3, 3, device=DEVICE), torch.ones(3, 3))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "stack_conv1d"])
@pytest.mark.parametrize("method", ["vblora", "tied_lora", "lora_xs"])
def test_training(method, kind):
    def check(device):
        model = build(kind).to(device)
        adapter = adapt(model, method, kind, target_modules="all-linear" if method != "tied_lora" else TIED[kind])
        return trained(model, adapter, kind, device)

    everywhere(check)


TIED = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj"], "stack_conv1d": ["up"]}


def test_a_table_that_widens():
    def check(device):
        model = build("stack").to(device)
        adapter = adapt(model, num_vectors=400, init_logits_std=0.01)
        optimizer = vblora.AdamW(groups_for(model, lr=0.05))
        trained(model, adapter, "stack", device, optimizer)
        adapter.logits.widen(64)
        return {**trained(model, adapter, "stack", device, optimizer), "dense": adapter.dense_logits()}

    everywhere(check)


@pytest.mark.parametrize("rule", ["noisy_topk", "gumbel", "gumbel_st"])
def test_other_selections(rule):
    def check(device):
        model = build("stack").to(device)
        config = SelectionConfig(r=2, num_vectors=12, vector_length=8, target_modules=["up"], rule=rule)
        adapter = vblora.attach(model, config, seed=0)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        torch.manual_seed(0)
        return trained(model, adapter, "stack", device, optimizer)

    everywhere(check)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    def check(device):
        model = build("stack").to(device)
        model.use_reentrant = reentrant
        return trained(model, adapt(model), "stack", device)

    everywhere(check)


def test_split_layers():
    def check(device):
        model = build("gpt2").to(device)
        adapter = adapt(model, kind="gpt2", target_modules=["c_attn"], split_modules={"c_attn": ["q", "k", "v"]})
        return trained(model, adapter, "gpt2", device)

    everywhere(check)


def test_heads_and_dropout_in_sixteen_bits():
    model = build("bert").to(DEVICE, torch.bfloat16)
    adapter = adapt(model, kind="bert", modules_to_save=["classifier"], vblora_dropout=0.5)
    before = model.classifier.weight.detach().clone()
    trained(model, adapter, "bert", DEVICE)
    assert not torch.equal(model.classifier.weight, before) and model.classifier.weight.isfinite().all()


def saved(folder, **settings):
    """An adapter for the small stack, trained on the CPU, in every form."""
    model = build("stack")
    adapter = adapt(model, num_vectors=60, **settings)
    adapter.pack(folder / "drawn.safetensors", selection="seed")
    trained(model, adapter, "stack", torch.device("cpu"))
    adapter.save(folder / "full", form="full")
    adapter.save(folder / "topk")
    adapter.save(folder / "native", format="native")
    adapter.pack(folder / "plain.safetensors")
    adapter.pack(folder / "small.safetensors", bank="int8", weights=8)
    adapter.pack(folder / "shared.safetensors", bank="shared")
    return folder


FILES = ["full", "topk", "native", "plain.safetensors", "small.safetensors", "shared.safetensors", "drawn.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_loading(file, tmp_path):
    saved(tmp_path)

    def check(device):
        model = build("stack").to(device)
        adapter = vblora.load(model, tmp_path / file)
        found = {**tensors_of(adapter), "output": output_of(model, "stack", device)}
        adapter.detach()
        again = vblora.load(model, tmp_path / file, trainable=True)
        found |= {f"trained {name}": t for name, t in trained(model, again, "stack", device).items()}
        again.start_from(tmp_path / "full", redraw=True)
        return {**found, "restored": again.dense_logits(), "last": output_of(model, "stack", device)}

    everywhere(check)


@pytest.mark.parametrize("method", ["vblora", "tied_lora", "lora_xs"])
def test_what_is_written_there_is_what_is_written_here(method, tmp_path):
    for device in ("cpu", DEVICE):
        model = build("stack").to(device)
        adapter = adapt(model, method, target_modules=["up"])
        adapter.save(tmp_path / str(device) / "one")
        adapter.pack(tmp_path / str(device) / "one.safetensors")
        adapter.export_lora(tmp_path / str(device) / "lora")
    for file in ("one/adapter_model.safetensors", "one.safetensors", "lora/adapter_model.safetensors"):
        cpu, other = ((tmp_path / str(device) / file).read_bytes() for device in ("cpu", DEVICE))
        assert cpu == other, file


def test_states_are_taken_over_from_the_cpu():
    source = build("stack")
    adapter = adapt(source, num_vectors=60)
    optimizer = vblora.AdamW(groups_for(source, lr=0.05))
    trained(source, adapter, "stack", torch.device("cpu"), optimizer)

    def check(device):
        model = build("stack").to(device)
        own = adapt(model, num_vectors=60).double()
        fresh = vblora.AdamW(groups_for(model, lr=0.05))
        model.load_state_dict(source.state_dict())
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # PyTorch would share what need not move
        return trained(model, own, "stack", device, fresh)

    everywhere(check)


def test_moving_an_adapted_model():
    model = build("stack")
    adapter = adapt(model, num_vectors=60)
    expected = output_of(model, "stack", torch.device("cpu"))
    torch.testing.assert_close(output_of(model.to(DEVICE), "stack", DEVICE).cpu(), expected, **SAME)
    trained(model, adapter, "stack", DEVICE)
    trained(model.to("cpu"), adapter, "stack", torch.device("cpu"))


def test_merging_averages_reselecting_and_a_given_bank(tmp_path):
    saved(tmp_path)

    def check(device):
        model = build("stack").to(device)
        adapter = adapt(model, num_vectors=60).double()
        use_bank(adapter, tmp_path / "full")
        average = vblora.AveragedModel(model)
        optimizer = vblora.AdamW(vblora.param_groups(model, lr=0.05, lr_logits=0.05))
        for _ in range(3):
            trained(model, adapter, "stack", device, optimizer, steps=1)
            average.update_parameters(model)
        found = {"average": output_of(average.module, "stack", device)}
        with torch.no_grad():
            adapter.topk_logits.mul_(1.5)
        adapter.reselect()
        found["plain"] = output_of(model, "stack", device)
        adapter.merge()
        found["merged"] = output_of(model, "stack", device)
        adapter.unmerge()
        with adapter.disabled():
            found["base"] = output_of(model, "stack", device)
        assert not torch.equal(found["base"], found["plain"])
        return found

    everywhere(check)


def test_rows_with_different_adapters(tmp_path):
    for number in range(2):
        model = build("bert")
        adapter = adapt(model, kind="bert", seed=number, modules_to_save=["classifier"])
        with torch.no_grad():
            model.classifier.weight.add_(0.1 * (number + 1))
        adapter.pack(tmp_path / f"a{number}.safetensors")

    def check(device):
        model = build("bert").to(device)
        store = vblora.AdapterStore(model, tmp_path)
        with store.rows(["a0", None, "a1"]):
            return {"mixed": output_of(model, "bert", device)}

    everywhere(check)


def test_a_default_device_changes_nothing():
    torch.set_default_device(DEVICE)
    try:
        model = build("stack")
        adapter = vblora.attach(model, config_for("vblora"), seed=3)
        there = trained(model, adapter, "stack", DEVICE)
    finally:
        torch.set_default_device(None)
    assert all(value.device == DEVICE for value in there.values())
