"""Fused layers adapted as the several layers they are: GPT-2's c_attn as q, k and v."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import vblora
from vblora import counts
from vblora.methods import LoRAXSConfig, TiedLoRAConfig
from vblora.targets import find_targets, layer_shapes

SPLIT = {"target_modules": ["c_attn", "c_proj", "c_fc"], "split_modules": {"c_attn": ["q", "k", "v"]}}
CONFIGS = {
    "vblora": vblora.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, **SPLIT),
    "tied_lora": TiedLoRAConfig(r=2, **{**SPLIT, "target_modules": ["c_attn", "c_fc"]}),
    "lora_xs": LoRAXSConfig(r=3, **SPLIT),
}
TOKENS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 0, 1]])


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def adapted(method):
    model = gpt2()
    adapter = vblora.attach(model, CONFIGS[method], seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if method == "vblora":
        adapter.reselect()
    return model, adapter


def test_each_part_is_a_target_of_its_own():
    _, adapter = adapted("vblora")
    names = [shape.name for shape in adapter.shapes]
    assert names[:4] == [f"transformer.h.0.attn.{n}" for n in ("c_attn.q", "c_attn.k", "c_attn.v", "c_proj")]
    assert len(names) == 2 * 6
    assert [shape[1:] for shape in adapter.shapes[:5]] == [(16, 16)] * 4 + [(16, 64)]


@pytest.mark.parametrize("method", CONFIGS)
def test_the_update_of_the_fused_weight_is_the_parts_one_above_the_other(method):
    model, adapter = adapted(method)
    factors = adapter.layer_factors()
    layer = "transformer.h.1.attn.c_attn"
    delta = torch.cat([factors[f"{layer}.{part}"][1] @ factors[f"{layer}.{part}"][0] for part in "qkv"])  # (48, 16)
    fused = model.get_submodule(layer)
    x = torch.randn(2, 5, 16)
    expected = nn.functional.linear(x, fused.weight.T + delta, fused.bias)
    with torch.no_grad():
        model(TOKENS)
        torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_merged_is_the_same_and_unmerged_is_as_before(method):
    model, adapter = adapted(method)
    before = {name: p.clone() for name, p in model.named_parameters() if "adapter" not in name}
    with torch.no_grad():
        unmerged = model(TOKENS).logits
        adapter.merge()
        torch.testing.assert_close(model(TOKENS).logits, unmerged, rtol=1e-4, atol=1e-5)
        changed = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
        assert {name.rsplit(".", 2)[1] for name in changed} == {s.name.split(".")[4] for s in adapter.shapes}
        adapter.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("form", ["topk", "full"])
def test_saved_and_loaded_it_is_the_same(method, form, tmp_path):
    model, adapter = adapted(method)
    adapter.save(tmp_path, form=form)
    other = gpt2()
    loaded = vblora.load(other, tmp_path)
    assert loaded.config.split_modules == SPLIT["split_modules"]
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"PEFT does not split layers|PEFT has no format"):
        vblora.save(adapter, tmp_path / "peft", format="peft")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_with_checkpointing(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model, adapter = adapted("vblora")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad.clone() for p in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_parts_can_be_left_out_as_loras_gpt2_leaves_out_keys():
    config = copy.copy(CONFIGS["vblora"])
    config.target_modules, config.exclude_modules = ["c_attn"], ["k"]
    model = gpt2()
    adapter = vblora.attach(model, config, seed=0)
    assert {shape.name.rsplit(".", 1)[1] for shape in adapter.shapes} == {"q", "v"}
    with torch.no_grad():
        adapter.vector_bank.mul_(100)
        fused, x = model.get_submodule("transformer.h.0.attn.c_attn"), torch.randn(1, 16)
        change = fused(x) - nn.functional.linear(x, fused.weight.T, fused.bias)
    assert change[:, :16].abs().min() > 0 and change[:, 32:].abs().min() > 0
    assert change[:, 16:32].abs().max() < 1e-6


@pytest.mark.parametrize(("width", "layers", "h", "expected"), [(1024, 24, 256, 75_904), (1280, 36, 350, 109_040)])
def test_gpt2s_counts_with_q_k_and_v_apart(width, layers, h, expected):
    """Table 2 prints 0.076M and 0.13M; as one layer c_attn would make it 74,752 and 106,880."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=16))
    settings = {"r": 4, "num_vectors": h, "vector_length": 256, "topk": 2}
    config = vblora.VBLoRAConfig(**settings, **SPLIT)
    shapes = layer_shapes(find_targets(model, config), config)
    assert counts.count_vblora(shapes, **settings).parameters == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"c_attn": ["q"]}, "'c_attn' needs a list of two or more different names"),
        ({"c_attn": ["q", "q"]}, "two or more different names"),
        ({"c_attn": ["q.x", "k"]}, "two or more different names"),
        (["c_attn"], "split_modules takes a dictionary"),
        ({"c_attn": ["a", "b", "c", "d", "e"]}, "48 wide, which is not 5 equal parts"),
        ({"qkv": ["q", "k"]}, "no adapted layer is called qkv"),
    ],
)
def test_what_cannot_be_split_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        vblora.attach(gpt2(), vblora.VBLoRAConfig(vector_length=8, target_modules=["c_attn"], split_modules=wrong))


def test_leaving_out_every_part_is_refused():
    config = vblora.VBLoRAConfig(
        vector_length=8, target_modules=["c_attn"], split_modules={"c_attn": ["q", "k"]}, exclude_modules=["q", "k"]
    )
    with pytest.raises(ValueError, match="leave no part"):
        vblora.attach(gpt2(), config)
