"""What `vblora inspect` says of a directory, against what was written into it."""

from __future__ import annotations

import json

import core_helpers
import pytest
import torch
from safetensors.torch import load_file, save_file

import vblora
from vblora import cli
from vblora.files.describe import describe, selections


@pytest.fixture
def saved(tmp_path):
    """A BERT classifier's VB-LoRA adapter, with its head, in a directory."""

    def make(form="topk", **settings):
        model = core_helpers.build("bert")
        chosen = {"r": 2, "num_vectors": 12, "vector_length": 16, "topk": 3, **settings}
        config = vblora.VBLoRAConfig(target_modules=["query", "value"], modules_to_save=["classifier"], **chosen)
        adapter = vblora.attach(model, config, seed=7)
        adapter.save(tmp_path / form, form=form)
        return adapter, tmp_path / form

    return make


def test_the_top_k_form_is_described_by_what_it_holds(saved):
    adapter, directory = saved()
    content = describe(directory)
    n = adapter.layout.rows
    assert (content["method"], content["format"], content["form"]) == ("vblora", "PEFT VBLoRA", "topk")
    assert content["sub_vectors"] == n and content["init_seed"] == 7
    assert content["parts"]["vector_bank"]["bytes"] == 12 * 16 * 4
    assert content["parts"]["topk_indices"] == {"tensors": 8, "numbers": 3 * n, "bytes": 3 * n, "types": ["uint8"]}
    assert content["parts"]["topk_weights"]["numbers"] == 2 * n
    assert content["adapter_bytes"] == adapter.stored_parameters().bytes
    assert content["head_parameters"] == adapter.head_parameters()
    assert content["file_bytes"] == (directory / "adapter_model.safetensors").stat().st_size


def test_the_selection_is_that_of_the_adapter_in_both_forms(saved):
    adapter, topk = saved()
    _, full = saved("full")
    used = adapter.topk_indices.unique().numel()
    weights = adapter.topk_logits.detach().softmax(-1)
    share = torch.zeros(12).scatter_add_(0, adapter.topk_indices.flatten(), weights.flatten()).max() / len(weights)
    for directory in (topk, full):
        selection = describe(directory)["selection"]
        assert selection["vectors_used"] == used
        assert selection["largest_share"] == pytest.approx(float(share), abs=1e-6)


def test_a_native_directory_is_described(tmp_path):
    model = core_helpers.build("bert")
    vblora.attach(model, vblora.LoRAXSConfig(r=3, target_modules=["query"])).save(tmp_path)
    content = describe(tmp_path)
    assert (content["method"], content["format"]) == ("lora_xs", "vblora native")
    assert content["parts"]["mixing"]["numbers"] == 2 * 3 * 3 and content["head_bytes"] == 0


def test_the_command_prints_text_and_json(saved, capsys):
    _, directory = saved()
    assert cli.main(["inspect", str(directory)]) == 0
    text = capsys.readouterr().out
    assert "vblora, PEFT VBLoRA, topk form" in text and "of 12 vectors in use" in text
    assert cli.main(["inspect", str(directory), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(directory)


def test_a_damaged_or_missing_directory_is_one_line_and_exit_code_2(saved, capsys, tmp_path):
    _, directory = saved()
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    for wrong in (directory, tmp_path / "nowhere"):
        assert cli.main(["inspect", str(wrong)]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and str(wrong) in errors[0]


def test_an_index_outside_the_bank_is_named(saved):
    adapter, _ = saved()
    tensors = {"topk_indices": torch.full((4, 3), 12), "topk_weights": torch.full((4, 2), 0.3)}
    with pytest.raises(ValueError, match="topk_indices: an index lies outside the bank of 12"):
        list(selections(tensors, adapter.config))


def spoil(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, next(key for key in tensors if "query" in key and "_A" in key))
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("topk", lambda t, key: t.pop(key.replace("indices", "weights")), "beside it|no mixture"),
        ("topk", lambda t, key: t[key.replace("indices", "weights")].fill_(9.0), "no mixture"),
        ("full", lambda t, key: t.update({key: t[key][..., :2].contiguous()}), "the bank has 12 vectors"),
        ("full", lambda t, key: t[key].fill_(float("nan")), "NaN"),
    ],
    ids=["weights_missing", "weights_too_large", "logits_narrow", "logits_nan"],
)
def test_damage_inside_a_file_is_named(form, change, message, saved):
    _, directory = saved(form)

    def to_indices(tensors, key):
        change(tensors, key.replace("weights", "indices"))

    spoil(directory, to_indices)
    with pytest.raises(ValueError, match=message):
        describe(directory)
