"""One switch over all methods: ours, full fine-tuning, and PEFT's by name or by a JSON file."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from core_helpers import build, groups_for, make_batch, run
from safetensors.torch import load_file

import vblora
from vblora import counts
from vblora.methods.through_peft import PeftAdapter, peft_config
from vblora.switch import FullFineTuning, apply_method, field_names, parse_settings
from vblora.targets import find_targets, layer_shapes

TARGETS = {"target_modules": ["query", "value"]}
HEAD = {"modules_to_save": ["classifier"]}
HEAD_SIZE = 3 * 32 + 3
PEFT_METHODS = {
    "lora": {"r": 3},
    "dora": {"r": 3},
    "olora": {"r": 3},
    "pissa": {"r": 3},
    "rslora": {"r": 3},
    "vera": {"r": 3},
    "ia3": {"feedforward_modules": []},
    "peft_vblora": {"r": 2, "num_vectors": 8, "vector_length": 8},
}


def shapes():
    config = vblora.VBLoRAConfig(**TARGETS)
    return layer_shapes(find_targets(build("bert"), config), config)


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_a_method_of_pefts_trains_and_comes_back_from_its_files(method, tmp_path):
    adapted = apply_method(build("bert"), method, {**PEFT_METHODS[method], **TARGETS, **HEAD})
    assert isinstance(adapted.model, peft.PeftModel) and isinstance(adapted.adapter, PeftAdapter)
    groups = vblora.param_groups(adapted.model, lr=1e-2, lr_adapter=2e-2)
    optimizer = torch.optim.AdamW(groups)
    adapted.model.train()
    before = {n: p.detach().clone() for n, p in adapted.model.named_parameters()}
    for _ in range(2):  # one factor of LoRA starts at zero, and the other moves from the second step on
        run(adapted.model, make_batch("bert")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.model.eval()
    changed = {n for n, p in adapted.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and changed <= set(trained(adapted.model))
    adapted.adapter.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("bert"), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            run(loaded, make_batch("bert")), run(adapted.model, make_batch("bert")), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("heads", [{}, HEAD])
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_pefts_parameters_are_in_the_adapter_group_and_heads_are_not(method, heads):
    model = apply_method(build("bert"), method, {**PEFT_METHODS[method], **TARGETS, **heads}).model
    groups = vblora.param_groups(model, lr=1e-3, lr_adapter=5e-3, weight_decay=0.1)
    found = {g["name"]: (len(g["params"]), g["lr"], g["weight_decay"]) for g in groups}
    own = {n: p for n, p in trained(model).items() if "modules_to_save" not in n}
    scales = [p for n, p in own.items() if p.ndim == 1 or "ia3" in n]  # and VeRA's vectors, DoRA's magnitudes
    matrices = [p for n, p in own.items() if p.ndim > 1 and "ia3" not in n]
    for name, decay, parts in (("adapter", 0.1, matrices), ("scales", 0.0, scales)):
        if parts:
            assert found.pop(name) == (len(parts), 5e-3, decay)
    assert found == ({"weights": (1, 1e-3, 0.1), "biases": (1, 1e-3, 0.0)} if heads else {})
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in trained(model).values()}


@pytest.mark.parametrize("heads", [{}, HEAD])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_stored_parameters_are_the_counted_ones_and_heads_are_apart(method, heads, tmp_path):
    adapter = apply_method(build("bert"), method, {"r": 3, **TARGETS, **heads}).adapter
    count = adapter.stored_parameters()
    assert count.parameters == counts.METHODS[method](shapes(), r=3).parameters
    assert count.parameters == count.with_index_bytes == count.authors_code
    assert adapter.head_parameters() == (HEAD_SIZE if heads else 0)
    adapter.save(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    own = [t for key, t in stored.items() if "classifier" not in key]
    assert count.bytes == sum(t.numel() * t.element_size() for t in own)


def test_dora_counts_its_magnitudes_too():
    adapter = apply_method(build("bert"), "dora", {"r": 3, **TARGETS}).adapter
    magnitudes = sum(shape.out_features for shape in shapes())
    assert adapter.stored_parameters().parameters == counts.count_lora(shapes(), r=3).parameters + magnitudes


@pytest.mark.parametrize("form", ["topk", "full"])
def test_pefts_vblora_counts_the_bytes_of_its_form(form, tmp_path):
    adapter = apply_method(build("bert"), "peft_vblora", {**PEFT_METHODS["peft_vblora"], **TARGETS}).adapter
    adapter.save(tmp_path, form=form)
    stored = load_file(tmp_path / "adapter_model.safetensors").values()
    assert sum(t.numel() * t.element_size() for t in stored) == adapter.stored_parameters().bytes
    if form == "topk":
        count = counts.count_vblora(shapes(), r=2, num_vectors=8, vector_length=8, topk=2)
        assert adapter.stored_parameters().bytes == count.bytes


def test_pefts_vblora_has_the_initial_learning_rate_of_the_adapter_group():
    model = apply_method(build("bert"), "peft_vblora", {**PEFT_METHODS["peft_vblora"], **TARGETS}).model
    assert [g["name"] for g in vblora.param_groups(model, lr=1e-3)] == ["adapter"]


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("dora", {}, {"use_dora": True}),
        ("olora", {}, {"init_lora_weights": "olora"}),
        ("rslora", {"r": 2}, {"use_rslora": True, "r": 2}),
        ("lora", {"use_dora": True}, {"use_dora": True}),
    ],
)
def test_variants_are_settings_of_lora(method, settings, expected):
    config = peft_config(method, {**settings, **TARGETS})
    assert config.peft_type == "LORA"
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("method", ["vblora", "tied_lora", "lora_xs"])
def test_our_own_methods_attach_to_the_model_itself(method):
    model = build("bert")
    settings = {"r": 2, **TARGETS, **HEAD, **({"vector_length": 8, "num_vectors": 9} if method == "vblora" else {})}
    adapted = apply_method(model, method, settings)
    assert adapted.model is model and isinstance(adapted.adapter, vblora.Adapter)
    assert adapted.adapter.config.method == method
    assert adapted.adapter.head_parameters() == HEAD_SIZE
    assert groups_for(model)


def test_full_fine_tuning_trains_and_counts_everything(tmp_path):
    model = build("bert").requires_grad_(False)
    adapted = apply_method(model, "full", {})
    assert adapted.model is model and isinstance(adapted.adapter, FullFineTuning)
    assert len(trained(model)) == len(list(model.parameters()))
    total = sum(p.numel() for p in model.parameters())
    assert adapted.adapter.stored_parameters() == counts.count_full(total)
    assert adapted.adapter.head_parameters() == 0
    assert {g["name"] for g in vblora.param_groups(model, lr=1e-5)} == {"weights", "biases"}
    adapted.adapter.save(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(run(loaded, make_batch("bert")), run(model, make_batch("bert")))


def test_a_json_file_names_any_configuration(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 5, "lora_alpha": 10, **TARGETS}))
    adapter = apply_method(build("bert"), str(path), HEAD).adapter
    assert (adapter.config.r, adapter.config.lora_alpha) == (5, 10)
    assert adapter.stored_parameters().parameters == counts.count_lora(shapes(), r=5).parameters
    assert adapter.head_parameters() == HEAD_SIZE


def test_a_file_saved_by_peft_serves_as_configuration(tmp_path):
    apply_method(build("bert"), "lora", {"r": 5, **TARGETS}).adapter.save(tmp_path)
    adapter = apply_method(build("bert"), str(tmp_path / "adapter_config.json"), {}).adapter
    assert adapter.config.r == 5


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lorra", TARGETS, r"there is no method 'lorra': ours are full, .*, and PEFT's .*lora.*vera"),
        ("lora", {**TARGETS, "rank": 3}, "LoraConfig has no field rank"),
        ("vblora", {**TARGETS, "rank": 3}, "unknown key for VBLoRAConfig: rank"),
        ("full", {"r": 3}, "no settings; got r"),
        ("lora", {"target_modules": ["nowhere"]}, "nowhere"),
        ("lora", {**TARGETS, "r": 0}, "r"),
        ("missing.json", {}, "missing.json does not exist"),
    ],
)
def test_an_unknown_method_or_setting_is_refused_by_name(method, settings, message):
    with pytest.raises(ValueError, match=message):
        apply_method(build("bert"), method, settings)


@pytest.mark.parametrize(
    ("content", "message"), [("{}", '"peft_type"'), ('{"peft_type": 3}', '"peft_type"'), ("nothing", "no JSON file")]
)
def test_a_json_file_that_is_no_configuration_is_refused(content, message, tmp_path):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        apply_method(build("bert"), str(tmp_path / "bad.json"), {})


def test_settings_from_a_command_line():
    assert parse_settings('{"r": 3}') == {"r": 3}
    for text in ("r=3", "[1]", "3"):
        with pytest.raises(ValueError, match="JSON"):
            parse_settings(text)


def test_field_names_tell_what_each_method_takes():
    assert {"r", "vector_length"} <= field_names("vblora")
    assert {"r", "use_dora"} <= field_names("dora")
    assert field_names("full") == field_names("some.json") == set()
    with pytest.raises(ValueError, match="no method 'lorra'"):
        field_names("lorra")
