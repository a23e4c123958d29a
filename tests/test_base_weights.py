"""A file names its base model by single weights of it: the same base in any type is taken, another one is not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from core_helpers import adapt, build

import vblora
from vblora import base_weights
from vblora.base_weights import BASE, BaseSample, read_sample, take_sample
from vblora.files import convert, packed
from vblora.io import read_tensors, write_tensors

KINDS = {"bert": "bert", "gpt2": "gpt2", "llama": "llama"}
OTHER = "made on another base model"


def saved(tmp_path, kind="bert", method="vblora", **settings):
    """A directory and a packed file of one adapter."""
    adapter = adapt(build(kind), method, kind, **settings)
    adapter.save(tmp_path / "directory")
    adapter.pack(tmp_path / "alice.safetensors")
    return [tmp_path / "directory", tmp_path / "alice.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_base_is_taken_without_a_word_and_another_is_named_or_refused(kind, tmp_path):
    for path in saved(tmp_path, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vblora.load(build(kind), path, strict_base=True)
        with pytest.warns(UserWarning, match=f"{path.name} was {OTHER}") as said:
            vblora.load(build(kind, seed=1), path)
        assert len(said) == 1
        model = build(kind, seed=1)
        with pytest.raises(ValueError, match=rf"{OTHER}.*layers?\.|{OTHER}.*h\.\d"):
            vblora.load(model, path, strict_base=True)
        assert not any(isinstance(module, vblora.Adapter) for module in model.children())


def test_one_layer_that_was_trained_on_is_found_by_its_name(tmp_path):
    for path in saved(tmp_path, "stack"):
        model = build("stack")
        with torch.no_grad():
            model.layers[1].up.weight.mul_(1 + 1e-3)
        with pytest.raises(ValueError, match=r"those of layers\.1\.up differ most; together they are 0\.000\d+ of"):
            vblora.load(model, path, strict_base=True)


def test_other_types_of_the_same_weights_are_the_same_base(tmp_path):
    for path in saved(tmp_path):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            vblora.load(build("bert").to(dtype), path, strict_base=True)
            with pytest.raises(ValueError, match=OTHER):
                vblora.load(build("bert", seed=1).to(dtype), path, strict_base=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_the_same_base(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def quantised(seed):
        model = build("stack", seed=seed)
        for block in model.layers:
            for name in ("up", "down"):
                plain = getattr(block, name)
                kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
                options = {"quant_type": "nf4"} if bits == 4 else {"has_fp16_weights": False}
                layer = kind(plain.in_features, plain.out_features, **options)
                layer.load_state_dict(plain.state_dict())
                setattr(block, name, layer.to("cpu"))
        return model

    for path in saved(tmp_path, "stack"):
        model = quantised(0)
        adapter = vblora.load(model, path, strict_base=True)
        assert adapter.content().base_sample.kinds == (f"{bits}-bit",)
        with pytest.raises(ValueError, match=OTHER):
            vblora.load(quantised(1), path, strict_base=True)


def test_rounding_is_within_what_is_allowed():
    exact = BaseSample(("float32",), (1.0,) * 32)
    for kind, allowed in (("float32", 1e-6), ("bfloat16", 2**-8), ("8-bit", 0.05), ("4-bit", 0.3)):
        assert exact.tolerance(BaseSample((kind,), exact.values)) == allowed
    assert BaseSample(("4-bit",), exact.values).tolerance(BaseSample(("4-bit",), exact.values)) == 0.3


def test_where_the_base_cannot_be_looked_at_nothing_is_written_or_compared(tmp_path):
    directory, file = saved(tmp_path)
    vblora.load(build("bert").to("meta"), file)
    for spoil in (lambda model: model.to("meta"), lambda model: vblora.load(model, directory).merge()):
        model = build("bert")
        spoil(model)
        adapter = vblora.attach(model, vblora.TiedLoRAConfig(target_modules=["query"], r=2), name="second", seed=1)
        names = {shape.name: adapter.outputs[shape.name] for shape in adapter.shapes}
        assert take_sample(model, adapter.targets, adapter.shapes, names) is None
    model = build("bert", seed=1)
    vblora.load(model, directory, name="first").merge()
    vblora.load(model, file, strict_base=True)  # what its base was cannot be said


def test_a_store_refuses_another_base_or_says_so_with_the_name(tmp_path):
    saved(tmp_path)
    with vblora.AdapterStore(build("bert"), tmp_path, strict_base=True).rows(["alice"]):
        pass
    store = vblora.AdapterStore(build("bert", seed=1), tmp_path)
    with pytest.warns(UserWarning, match=f"adapter 'alice' was {OTHER}") as said:
        for _ in range(3):
            with store.rows(["alice"]):
                pass
    assert len(said) == 1
    store = vblora.AdapterStore(build("bert", seed=1), tmp_path, strict_base=True)
    with pytest.raises(ValueError, match=OTHER), store.rows(["alice"]):
        pass


def test_training_on_from_a_file_of_another_base_is_named(tmp_path):
    adapt(build("bert"), kind="bert").save(tmp_path / "full", form="full")
    with pytest.warns(UserWarning, match=OTHER):
        adapt(build("bert", seed=1), kind="bert").start_from(tmp_path / "full")


def test_packing_and_unpacking_keep_it(tmp_path):
    directory, file = saved(tmp_path)
    first = packed.read(file).base_sample
    assert first is not None and first.kinds == ("float32",)
    assert convert.read_directory(directory).base_sample == first
    convert.unpack(file, tmp_path / "back")
    assert convert.read_directory(tmp_path / "back").base_sample == first


def test_files_without_it_load_as_before_and_it_costs_200_bytes(tmp_path):
    for path in saved(tmp_path):
        file = path if path.is_file() else path / "adapter_model.safetensors"
        size, (tensors, metadata) = file.stat().st_size, read_tensors(file)
        del metadata[BASE]
        write_tensors(file, tensors, metadata)
        assert 0 < size - file.stat().st_size <= 200
        vblora.load(build("bert", seed=1), path, strict_base=True)


def test_a_damaged_sample_is_refused(tmp_path):
    text = BaseSample(("float32",), tuple(map(float, range(32)))).metadata()[BASE]
    assert read_sample({BASE: text}).values == tuple(map(float, range(32)))
    changed = [text[:at] + chr(33 + (ord(text[at]) - 32) % 90) + text[at + 1 :] for at in range(8, len(text))]
    for wrong in [*changed, "", "float32", text[:-1], text + "a", text.replace(" ", ""), "é " + text[8:]]:
        with pytest.raises(ValueError, match=f"{BASE}.*is damaged"):
            read_sample({BASE: wrong})
    for path in saved(tmp_path):
        file = path if path.is_file() else path / "adapter_model.safetensors"
        tensors, metadata = read_tensors(file)
        write_tensors(file, tensors, {**metadata, BASE: changed[20]})
        with pytest.raises(ValueError, match="is damaged"):
            vblora.load(build("bert"), path)


def test_the_order_of_the_layers_does_not_matter():
    model = build("bert")
    adapter = adapt(copy.deepcopy(model), kind="bert")
    shapes = adapter.shapes
    forwards, backwards = (
        take_sample(model, dict(adapter.targets), order, adapter.outputs) for order in (shapes, shapes[::-1])
    )
    assert forwards == backwards and len(set(forwards.values)) == base_weights.SIZE
