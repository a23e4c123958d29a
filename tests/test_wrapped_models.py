"""Models that are wrapped, compiled, without memory, or in 16 bits when an adapter is attached to them."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import init_empty_weights
from core_helpers import adapt, build, config_for, groups_for, make_batch, run
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import vblora


class DistributedDataParallel(nn.Module):
    """What PyTorch's looks like from outside; its own wants processes."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled(model):
    return torch.compile(model, backend="eager")


def parts_compiled(model):
    model.layers[1] = compiled(model.layers[1])
    return model


def checkpointed(model):
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    return model


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (compiled, r"the model is wrapped by torch.compile.*model\._orig_mod\)"),
        (parts_compiled, r"layers\.1 is wrapped by torch.compile.*model\.layers\.1\._orig_mod"),
        (checkpointed, r"layers\.0 is wrapped by checkpoint_wrapper.*_checkpoint_wrapped_module"),
        (nn.DataParallel, r"wrapped by DataParallel.*model\.module"),
        (DistributedDataParallel, r"wrapped by DistributedDataParallel.*model\.module"),
        (AveragedModel, r"wrapped by AveragedModel.*model\.module"),
    ],
)
def test_a_wrapped_model_is_refused_by_name(wrap, said, tmp_path):
    adapt(build("stack")).save(tmp_path)
    model = wrap(build("stack"))
    names = [name for name, _ in model.named_modules()]
    for use in (
        lambda: vblora.attach(model, config_for("vblora"), seed=0),
        lambda: vblora.load(model, tmp_path),
        lambda: vblora.AdapterStore(model),
    ):
        with pytest.raises(ValueError, match=said):
            use()
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel])
def test_a_model_that_is_wrapped_afterwards_gives_the_adapted_output_and_the_plain_names(wrap, tmp_path):
    torch.compiler.reset()
    model, batch = build("stack"), make_batch("stack")
    adapter = adapt(model)
    with torch.no_grad():
        torch.testing.assert_close(run(wrap(model), batch), run(model, batch))
    adapter.save(tmp_path)
    with torch.no_grad():
        other = build("stack")
        vblora.load(other, tmp_path)
        torch.testing.assert_close(run(other, batch), run(model, batch))


def test_a_model_compiled_in_place_takes_the_adapter_that_is_attached_after_its_first_pass():
    torch.compiler.reset()
    model, eager, batch = build("stack"), build("stack"), make_batch("stack")
    model.compile(backend="eager")
    with torch.no_grad():
        base = run(model, batch)
        adapter, _ = adapt(model), adapt(eager)
        torch.testing.assert_close(run(model, batch), run(eager, batch))
        assert (run(model, batch) - base).abs().max() > 1e-2
        adapter.detach()
        torch.testing.assert_close(run(model, batch), base)


@pytest.mark.parametrize("use", ["attach", "load"])
def test_parameters_that_get_no_memory_are_refused(use, tmp_path):
    adapt(build("stack")).save(tmp_path)
    with init_empty_weights():
        model = build("stack")
        with pytest.raises(ValueError, match="attach or load it after that block"):
            vblora.attach(model, config_for("vblora"), seed=0) if use == "attach" else vblora.load(model, tmp_path)


@pytest.mark.parametrize("method", ["vblora", "tied_lora"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_model_on_the_meta_device_keeps_the_adapters_values_when_it_gets_its_weights(method, inside):
    ready, batch = build("stack"), make_batch("stack")
    with torch.device("meta"):
        model = build("stack")
        if inside:
            adapter = adapt(model, method)
    if not inside:
        adapter = adapt(model, method)
    assert not any(tensor.is_meta for tensor in adapter.state_dict().values())
    model.to_empty(device="cpu")
    model.load_state_dict(ready.state_dict(), strict=False)
    adapt(ready, method)
    with torch.no_grad():
        torch.testing.assert_close(run(model, batch), run(ready, batch))


def test_the_callers_default_device_is_of_no_matter(tmp_path):
    """The meta device stands for a GPU: what is made there by mistake fails."""
    model, plain, batch = build("stack"), build("stack"), make_batch("stack")
    adapter, other = adapt(plain, num_vectors=90), None
    try:
        torch.set_default_device("meta")
        mine = adapt(model, num_vectors=90)
        run(model, batch).square().sum().backward()
        mine.logits.widen(90)
        assert torch.equal(mine.dense_logits(), adapter.dense_logits())
        mine.save(tmp_path / "topk")
        mine.save(tmp_path / "full", form="full")
        mine.pack(tmp_path / "packed", bank="int8", weights=8)
        for name, trainable in (("topk", True), ("full", False), ("packed", True)):
            other = copy.deepcopy(build_on_cpu())
            vblora.load(other, tmp_path / name, trainable=trainable)
            gap = (run(other, batch) - run(model, batch)).detach().abs().max()
            assert gap < (0.1 if name == "packed" else 1e-5)
    finally:
        torch.set_default_device(None)


def build_on_cpu():
    with torch.device("cpu"):
        return build("stack")


# --- Heads of a base in 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "head"),
    [("bert", "classifier"), ("bert", "word_embeddings"), ("llama", "embed_tokens"), ("llama", "lm_head")],
)
def test_the_head_of_a_base_in_16_bits_trains_in_float32(kind, head, dtype, tmp_path):
    model, batch = build(kind).to(dtype), make_batch(kind)
    before = run(model, batch)
    adapter = adapt(model, kind=kind, modules_to_save=[head])
    with adapter.disabled():
        torch.testing.assert_close(run(model, batch), before, atol=2e-2, rtol=2e-2)
    assert run(model, batch).dtype == dtype
    [trained] = adapter.saved.values()
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    optimizer = vblora.AdamW(groups_for(model, lr=1e-5))
    start = trained.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(run(model, batch).float().square().mean()).backward()
    scaler.step(optimizer)
    moved = (trained.weight - start).abs()
    assert 0 < moved.max() < 2e-5  # steps that 16 bits would round away
    adapter.save(tmp_path)
    other = build(kind).to(dtype)
    vblora.load(other, tmp_path)
    assert torch.equal(run(other, batch), run(model, batch))
    adapter.detach()
    assert run(model, batch).dtype == dtype


def test_a_head_in_32_bits_has_no_further_hook():
    model = build("bert")
    adapt(model, kind="bert", modules_to_save=["classifier"])
    assert not model.classifier._forward_hooks and not model.classifier._forward_pre_hooks
