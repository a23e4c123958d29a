"""Export as plain LoRA: what PEFT makes of it gives the same outputs, and what cannot be written is refused."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from core_helpers import METHODS, adapt, build, config_for, make_batch, run, stir
from language_helpers import save_tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import vblora
from vblora import cli
from vblora.files import packed
from vblora.files.lora import export, write_lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
SPLIT = {"split_modules": {"c_attn": ["q", "k", "v"]}}
# Kind of model and settings; tied_lora needs layers of one width.
CASES = {
    "linear": ("bert", {"target_modules": ["query", "value"]}),
    "head": ("bert", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "split": ("gpt2", {"target_modules": ["c_attn", "c_fc"], **SPLIT}),
    "part": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "exclude_modules": ["k"], **SPLIT}),
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "all-linear": ("bert", {"target_modules": "all-linear"}),
    "pattern": ("bert", {"target_modules": r".*layer\.\d\.intermediate\.dense"}),
    "own module": ("stack", {"target_modules": ["up", "down"]}),
}


def adapted(method, kind, **settings):
    model = build(kind)
    adapter = adapt(model, method, kind, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name and parameter.requires_grad:
                parameter.mul_(1.5).add_(0.1)
    return model, adapter


def difference(directory, kind, model):
    """Largest difference between PEFT's output and ours, in float64, relative to the outputs' size."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and of unexpected tensors
        other = peft.PeftModel.from_pretrained(build(kind), str(directory)).eval()
    batch = {key: t.double() if t.is_floating_point() else t for key, t in make_batch(kind).items()}
    with torch.no_grad():
        ours, theirs = (run(copy.deepcopy(each).double(), batch) for each in (model, other))
        plain = run(build(kind).double(), batch)
    assert (ours - plain).abs().max() > 1e-3  # the adapter does something
    return float((ours - theirs).abs().max() / max(1.0, ours.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_peft_gives_the_same_outputs(method, case, tmp_path):
    kind, settings = CASES[case]
    model, adapter = adapted(method, kind, **settings)
    adapter.export_lora(tmp_path / "lora")
    assert difference(tmp_path / "lora", kind, model) <= 1e-6
    assert {path.name for path in tmp_path.iterdir()} == {"lora"}


@pytest.mark.parametrize("case", CASES)
def test_a_packed_file_is_exported_without_its_model(case, tmp_path):
    kind, settings = CASES[case]
    model, adapter = adapted("vblora", kind, **settings)
    adapter.pack(tmp_path / "x.safetensors")
    export(packed.read(tmp_path / "x.safetensors"), tmp_path / "lora")
    assert difference(tmp_path / "lora", kind, model) <= 1e-6


def test_peft_adapts_no_other_layers(tmp_path):
    _, adapter = adapted("vblora", "llama", target_modules=["q_proj"], layers_to_transform=[1])
    adapter.export_lora(tmp_path)
    other = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path))
    found = {name.removesuffix(".base_layer") for name, _ in other.named_modules() if name.endswith(".base_layer")}
    assert found == {"base_model.model.model.layers.1.self_attn.q_proj"}


def test_names_settings_and_precision(tmp_path):
    _, adapter = adapted("vblora", "llama", target_modules=["q_proj", "v_proj"], r=4)
    adapter.export_lora(tmp_path, dtype=torch.float16)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (4, 4, "none")
    assert settings["target_modules"] == ["q_proj", "v_proj"] and settings["modules_to_save"] is None
    assert settings["task_type"] == "CAUSAL_LM" and settings["fan_in_fan_out"] is False
    tensors = load_file(tmp_path / TENSORS)
    layer = "base_model.model.model.layers.0.self_attn.v_proj"
    assert {t.dtype for t in tensors.values()} == {torch.float16} and len(tensors) == 2 * 2 * 2
    assert tensors[f"{layer}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{layer}.lora_B.weight"].shape == (16, 4)


def test_what_is_narrowed_down_is_named_in_full(tmp_path):
    _, adapter = adapted("vblora", "gpt2", target_modules=["c_attn"], **SPLIT)
    adapter.export_lora(tmp_path)
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["target_modules"] == [f"transformer.h.{n}.attn.c_attn" for n in (0, 1)]
    assert settings["r"] == 3 * adapter.config.r and settings["fan_in_fan_out"] is True


def test_factors_of_several_ranks_become_one(tmp_path):
    factors = {"up": (torch.randn(2, 3), torch.randn(5, 2)), "down": (torch.randn(4, 5), torch.randn(3, 4))}
    write_lora(tmp_path, factors, base_model="some/model")
    tensors = load_file(tmp_path / TENSORS)
    for name, (a, b) in factors.items():
        wide_a, wide_b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        assert wide_a.shape[0] == wide_b.shape[1] == 4
        torch.testing.assert_close(wide_b @ wide_a, b @ a)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "some/model"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({}, "no layers to write"),
        ({"up": (torch.ones(2, 3), torch.ones(5, 3))}, r"up: A of shape \(2, 3\) and B of shape \(5, 3\) must be"),
        ({"up": (torch.ones(2, 3) * 1e6, torch.ones(5, 2))}, "up: its factors have numbers that torch.float16 cannot"),
    ],
)
def test_what_is_no_lora_is_refused_and_nothing_written(factors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_lora(tmp_path / "lora", factors, base_model=None, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    _, adapter = adapted("vblora", "llama")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("vblora.files.lora.write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        adapter.export_lora(tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_kept(tmp_path):
    _, adapter = adapted("vblora", "llama")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="exists: remove it, or name another folder"):
        adapter.export_lora(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_packed_lora_xs_needs_its_model(tmp_path):
    _, adapter = adapted("lora_xs", "llama", target_modules=["q_proj"])
    adapter.pack(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="follow from the base model's weights"):
        export(packed.read(tmp_path / "x.safetensors"), tmp_path / "lora")


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "base")


def adapter_on(base, method="vblora"):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    settings = {"vector_length": 8} if method == "vblora" else {}
    config = config_for(method, "llama", target_modules=["q_proj", "v_proj"], **settings)
    return model, stir(vblora.attach(model, config, seed=0))


def command(*arguments, capsys):
    capsys.readouterr()  # what loading models for the test has printed
    code = cli.main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.err.strip() if code else captured.out.strip()


@pytest.mark.parametrize("method", METHODS)
def test_command_on_a_model_and_an_adapter(base, method, tmp_path, capsys):
    model, adapter = adapter_on(base, method)
    adapter.save(tmp_path / "adapter")
    arguments = (base, tmp_path / "lora", "--adapter", tmp_path / "adapter", "--to", "lora")
    assert command(*arguments, capsys=capsys) == (0, str(tmp_path / "lora"))
    other = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    with torch.no_grad():
        ids = torch.arange(8)[None]
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_command_on_a_packed_file(base, tmp_path, capsys):
    _, adapter = adapter_on(base)
    adapter.pack(tmp_path / "x.vblora.safetensors")
    arguments = (tmp_path / "x.vblora.safetensors", tmp_path / "lora", "--to", "lora", "--dtype", "bfloat16")
    assert command(*arguments, capsys=capsys) == (0, str(tmp_path / "lora"))
    settings = json.loads((tmp_path / "lora" / CONFIG).read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert {t.dtype for t in load_file(tmp_path / "lora" / TENSORS).values()} == {torch.bfloat16}


def test_command_on_a_model_and_a_packed_file(base, tmp_path, capsys):
    _, adapter = adapter_on(base, "lora_xs")
    adapter.pack(tmp_path / "x.safetensors")
    code, said = command(tmp_path / "x.safetensors", tmp_path / "lora", capsys=capsys)
    assert code == 2 and "--adapter" in said
    arguments = (base, tmp_path / "lora", "--adapter", tmp_path / "x.safetensors")
    assert command(*arguments, capsys=capsys) == (0, str(tmp_path / "lora"))


def test_a_packed_file_is_merged_as_a_directory_is(base, tmp_path):
    model, adapter = adapter_on(base)
    adapter.pack(tmp_path / "x.safetensors")
    assert cli.main(["merge", str(base), str(tmp_path / "merged"), "--adapter", str(tmp_path / "x.safetensors")]) == 0
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        ids = torch.arange(8)[None]
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_mistakes_are_one_line(base, tmp_path, capsys):
    _, adapter = adapter_on(base)
    adapter.save(tmp_path / "adapter")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "peft")
    out, some = tmp_path / "out", ("--adapter", tmp_path / "adapter")
    for arguments, message in [
        ((base, out), "is no run with an adapter"),
        ((base, out, *some, "--to", "onnx"), "invalid choice: 'onnx'"),
        ((base, out, *some, "--dtype", "int8"), "invalid choice: 'int8'"),
        ((base, tmp_path / "taken", *some), "exists: remove it"),
        ((base, out, "--adapter", tmp_path), "there is no adapter_config.json in it"),
        ((base, out, "--adapter", tmp_path / "peft"), "is PEFT's LORA already"),
        ((tmp_path / "broken.safetensors", out), "no whole packed adapter"),
        ((tmp_path / "broken.safetensors", out, *some), "leave --adapter and"),
        ((tmp_path / "nowhere", out, *some), "nowhere"),
    ]:
        code, said = command(*arguments, capsys=capsys)
        assert code == 2 and message in said and said.count("\n") == 0, said
        assert not out.exists()
