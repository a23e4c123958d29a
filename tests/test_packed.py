"""Packed files: every method, setting and shape of adapter, what they lose, and going on to train from them."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import packed_by_the_book
import pytest
import torch
from core_helpers import METHODS, adapt, assert_unchanged, build, config_for, groups_for, make_batch, run, snapshot
from safetensors import safe_open
from torch import nn

import vblora
import vblora.methods
from vblora import cli, container
from vblora.bank import at_most_one
from vblora.files import convert, encoding, layer_names, packed
from vblora.files.describe import describe, render
from vblora.io import read_json, read_tensors
from vblora.shapes import LayerShape

FILE = "a.vblora.safetensors"
SPLIT = {"target_modules": ["c_attn", "c_fc"], "split_modules": {"c_attn": ["q", "k", "v"]}}
HEAD = {"modules_to_save": ["classifier"]}


def equal_factors(ours, theirs):
    return list(ours) == list(theirs) and all(
        torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True)
    )


def error(ours, theirs):
    return max(float((a - b).abs().max()) for n in ours for a, b in zip(ours[n], theirs[n], strict=True))


def save_both(adapter, folder, **settings):
    adapter.save(folder / "dir")
    adapter.pack(folder / FILE, **settings)
    return folder / "dir", folder / FILE


def test_an_attached_adapter_is_taken_as_its_content_is(tmp_path):
    adapter = adapt(build("stack"))
    data = packed.dumps(adapter.content(), weights=8)
    assert packed.dumps(adapter, weights=8) == data
    assert packed.write(adapter, tmp_path / FILE, weights=8) == len(data) and (tmp_path / FILE).read_bytes() == data


# --- Lossless -----------------------------------------------------------------------------------------------------

SHAPES = [(2, 1), (2, 2), (3, 2), (5, 3), (64, 2), (65, 4), (90, 2), (255, 1), (256, 2), (257, 5), (1000, 6), (1, 1)]


@pytest.mark.parametrize("vector_length", [8, 12, 100])
@pytest.mark.parametrize(("num_vectors", "topk"), SHAPES)
def test_lossless_is_bit_equal_to_the_top_k_form(num_vectors, topk, vector_length, tmp_path):
    """Also where the vectors' length divides no width."""
    adapter = adapt(build("stack"), num_vectors=num_vectors, topk=topk, vector_length=vector_length)
    directory, file = save_both(adapter, tmp_path)
    one, other = build("stack"), build("stack")
    from_directory, from_file = vblora.load(one, directory), vblora.load(other, file)
    assert equal_factors(from_file.layer_factors(), from_directory.layer_factors())
    assert equal_factors(packed.read(file).factors(), from_directory.layer_factors())
    assert torch.equal(run(other, make_batch("stack")), run(one, make_batch("stack")))
    assert from_file.config == adapter.config and from_file.init_seed == 3


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "stack", "stack_conv1d"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_kind_of_model_comes_back(method, kind, tmp_path):
    settings = HEAD if kind == "bert" else {}
    model = build(kind)
    adapter = adapt(model, method, kind, **settings)
    directory, file = save_both(adapter, tmp_path)
    content = packed.read(file)
    assert content.shapes == adapter.shapes and content.conv1d == (kind in ("gpt2", "stack_conv1d"))
    one, other = build(kind), build(kind)
    first, second = vblora.load(one, directory), vblora.load(other, file)
    assert equal_factors(second.layer_factors(), first.layer_factors())
    assert torch.equal(run(other, make_batch(kind)), run(one, make_batch(kind)))
    if method == "lora_xs":
        with pytest.raises(ValueError, match="base model's weights"):
            content.factors()
    else:
        assert equal_factors(content.factors(), first.layer_factors())


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_split_layers_keep_their_places(method, tmp_path):
    adapter = adapt(build("gpt2"), method, "gpt2", **SPLIT, exclude_modules=["c_attn.k"])
    directory, file = save_both(adapter, tmp_path)
    content = packed.read(file)
    assert content.outputs == adapter.outputs
    assert content.outputs["transformer.h.1.attn.c_attn.v"] == slice(64, 96)
    assert equal_factors(vblora.load(build("gpt2"), file).layer_factors(), adapter_of(directory, "gpt2"))
    if method != "lora_xs":
        assert equal_factors(content.factors(), adapter_of(directory, "gpt2"))


def adapter_of(directory, kind):
    return vblora.load(build(kind), directory).layer_factors()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_in_other_precisions_come_back(method, dtype, tmp_path):
    adapter = adapt(build("bert"), method, "bert", **HEAD).to(dtype)
    directory, file = save_both(adapter, tmp_path)
    assert {t.dtype for name, t in packed.read(file).tensors.items() if not name.startswith("topk")} == {dtype}
    assert equal_factors(vblora.load(build("bert"), file).layer_factors(), adapter_of(directory, "bert"))


def test_the_other_selections_kept_form_is_packed(tmp_path):
    config = vblora.methods.SelectionConfig(r=2, num_vectors=9, vector_length=8, target_modules=["up"], rule="gumbel")
    adapter = vblora.attach(build("stack"), config, seed=0)
    directory, file = save_both(adapter, tmp_path)
    assert type(packed.read(file).config) is vblora.VBLoRAConfig
    assert equal_factors(packed.read(file).factors(), adapter_of(directory, "stack"))


def test_heads_and_their_buffers_come_back(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    adapter = vblora.attach(model, config_for("vblora", target_modules=["0"], modules_to_save=["1"]), seed=0)
    model(torch.randn(6, 4))
    adapter.pack(tmp_path / FILE, heads="int8")
    other = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    vblora.load(other, tmp_path / FILE)
    for key, tensor in model[1].state_dict().items():
        assert torch.equal(tensor, other[1].state_dict()[key]), key


def test_every_safetensors_reader_opens_it(tmp_path):
    adapter = adapt(build("bert"), kind="bert", **HEAD)
    adapter.pack(tmp_path / FILE, bank="float16", heads="float32")
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert set(file.keys()) == {
            *("vector_bank", "topk_indices", "topk_weights"),
            *("head.classifier.weight", "head.classifier.bias"),
        }
        assert torch.equal(file.get_tensor("vector_bank"), adapter.vector_bank.detach().half())
        assert torch.equal(file.get_tensor("head.classifier.weight"), build("bert").classifier.weight)
        assert json.loads(file.metadata()["vblora"])["version"] == packed.VERSION


@pytest.mark.parametrize(
    "settings",
    [{}, {"bank": "int8", "weights": 8}, {"bank": "int4", "weights": 8}, {"bank": "bfloat16", "weights": 16}],
    ids=str,
)
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_the_page_on_the_format_is_enough_to_read_it(topk, settings, tmp_path):
    """By a reader written from the page, in plain Python."""
    adapter = adapt(build("llama"), kind="llama", topk=topk, num_vectors=20, vector_length=12)
    adapter.pack(tmp_path / FILE, **settings)
    by_the_book, ours = packed_by_the_book.read((tmp_path / FILE).read_bytes()), packed.read(tmp_path / FILE).factors()
    assert list(by_the_book) == list(ours)
    theirs = {name: (torch.tensor(a), torch.tensor(b).T) for name, (a, b) in by_the_book.items()}
    assert error(ours, theirs) < 1e-6
    page = (Path(__file__).parents[1] / "docs" / "packed_format.md").read_text()
    assert packed_by_the_book.described(page) == packed.KEYS


# --- Sizes and losses ---------------------------------------------------------------------------------------------


def encoder(width, layers):
    """The adapted layers of an encoder as an adapter's content, without the encoder."""
    names = [f"roberta.encoder.layer.{i}.attention.self.{part}" for i in range(layers) for part in ("query", "value")]
    return [LayerShape(name, width, width) for name in names]


def trained_like(width, layers, b):
    """VB-LoRA's tensors with the distributions of trained ones: a bank like normal noise, weights all over."""
    shapes = encoder(width, layers)
    config = vblora.VBLoRAConfig(r=4, num_vectors=90, vector_length=b, target_modules=["query", "value"])
    n, generator = sum(4 * 2 * width // b for _ in shapes), torch.Generator().manual_seed(0)
    logits = torch.randn(n, 90, generator=generator)
    values, indices = logits.topk(2)
    bank = 0.02 * torch.randn(90, b, generator=generator)
    tensors = {"vector_bank": bank, "topk_indices": indices, "topk_weights": at_most_one(values.softmax(-1)[:, :1])}
    return packed.Content(config, shapes, tensors, base_model="roberta-base", init_seed=0)


@pytest.mark.parametrize(("width", "layers", "b"), [(768, 12, 256), (384, 6, 128)], ids=["roberta-base", "minilm"])
def test_the_sizes_that_are_promised(width, layers, b, tmp_path):
    content = trained_like(width, layers, b)
    packed.write(content, tmp_path / FILE)
    convert.unpack(tmp_path / FILE, tmp_path / "dir", format="peft")
    before = (tmp_path / "dir" / "adapter_model.safetensors").stat().st_size
    sizes = {
        settings: packed.write(content, tmp_path / FILE, bank=settings[0], weights=settings[1])
        for settings in (("lossless", "lossless"), ("float16", 16), ("int8", 8))
    }
    assert sizes["lossless", "lossless"] < 0.9 * before
    assert sizes["int8", 8] < 0.3 * before
    assert sizes["int8", 8] < sizes["float16", 16] < sizes["lossless", "lossless"]
    payload = (
        90 * b + 4 * 90 + -(-len(content.tensors["topk_indices"]) * 2 * 7 // 8) + len(content.tensors["topk_weights"])
    )
    assert sizes["int8", 8] - payload < 1200  # the header


BANK_ERROR = {"lossless": 0.0, "float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}
WEIGHT_ERROR = {"lossless": 0.0, 16: 0.5 / 65535, 8: 0.5 / 255}  # of an interval at most 1 wide


@pytest.mark.parametrize("topk", [1, 2, 3, 6])
@pytest.mark.parametrize("weights", packed.WEIGHTS)
@pytest.mark.parametrize("bank", [*packed.TYPES, "int4"])
def test_no_setting_loses_more_than_its_rounding(bank, weights, topk, tmp_path):
    adapter = adapt(build("stack"), num_vectors=30, topk=topk, init_logits_std=2.0)
    directory, file = save_both(adapter, tmp_path, bank=bank, weights=weights)
    largest = float(adapter.vector_bank.detach().abs().max())
    bound = largest * (BANK_ERROR[bank] + 2 * topk * WEIGHT_ERROR[weights])
    assert error(packed.read(file).factors(), adapter_of(directory, "stack")) <= bound * 1.001 + 1e-7
    again = packed.read(file)
    packed.write(again, tmp_path / "again", bank=bank, weights=weights)
    assert error(packed.read(tmp_path / "again").factors(), again.factors()) <= 1e-6  # rounding twice is rounding once


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 10.0, 300.0])
def test_rounded_weights_are_mixtures(k, bits, scale):
    logits = scale * torch.randn(500, k, generator=torch.Generator().manual_seed(k))
    weights = logits.double().softmax(-1).sort(descending=True).values
    steps = encoding.to_steps(weights[:, :-1], bits)
    assert steps.min() >= 0 and steps.max() < 2**bits
    decoded = at_most_one(encoding.from_steps(steps, bits).float())
    assert decoded.min() >= 0 and decoded.sum(-1).max() <= 1
    whole = torch.cat([decoded, 1 - decoded.sum(-1, keepdim=True)], dim=1)
    assert (whole[:, 1:] <= whole[:, :-1] + 1e-6).all()
    assert (whole - weights).abs().max() <= (k - 1) * (1 - 1 / k) / (2**bits - 1)
    ends = (
        encoding.from_steps(torch.full((1, k - 1), 2**bits - 1), bits),
        encoding.from_steps(torch.zeros(1, k - 1), bits),
    )
    assert ends[0][0, 0] == 1 and ends[1].allclose(torch.tensor(1 / k, dtype=torch.float64))


@pytest.mark.parametrize(("bits", "top"), [(8, 127), (4, 7)])
def test_whole_numbers_keep_vectors_of_all_sizes(bits, top):
    bank = torch.randn(20, 16) * torch.logspace(-30, 30, 20)[:, None]
    bank[3] = 0
    whole, scale = encoding.to_whole(bank, bits)
    assert whole.abs().max() == top
    back = encoding.from_whole(whole, scale)
    assert ((back - bank).abs().amax(1) <= 0.51 * bank.abs().amax(1) / top).all() and not back[3].any()


@pytest.mark.parametrize("b", [8, 9])
def test_a_bank_in_four_bits_takes_half_of_one_in_eight(b, tmp_path):
    adapter = adapt(build("stack"), num_vectors=5, vector_length=b)
    stored = {}
    for bank in ("int8", "int4"):
        adapter.pack(tmp_path / FILE, bank=bank)
        stored[bank] = packed.read(tmp_path / FILE).stored["vector_bank"]
    assert stored == {"int8": ("int8", 5 * b + 20), "int4": ("int4", -(-5 * b // 2) + 20)}


def test_numbers_outside_a_type_are_refused(tmp_path):
    adapter = adapt(build("stack"))
    with torch.no_grad():
        adapter.vector_bank[0, 0] = 1e6
    with pytest.raises(ValueError, match="vector_bank has numbers that float16 cannot hold"):
        adapter.pack(tmp_path / FILE, bank="float16")
    assert not list(tmp_path.iterdir())
    adapter.pack(tmp_path / FILE, bank="bfloat16")


@pytest.mark.parametrize(
    ("bank", "largest"), [("int8", torch.finfo(torch.float32).max), ("int8", 1e39), ("int4", 1e39)]
)
def test_a_number_that_whole_numbers_cannot_hold_is_refused(bank, largest, tmp_path):
    """The largest float32 divided by 127 and multiplied again is infinite, which is refused; 1e39 is no float32."""
    content = adapt(build("stack")).content()
    packed.write(content, tmp_path / FILE)
    good = (tmp_path / FILE).read_bytes()
    large = content.tensors["vector_bank"].detach().double()
    large[0, 0] = largest
    with pytest.raises(ValueError, match=f"vector_bank has numbers that {bank} cannot hold: use lossless"):
        packed.write(
            dataclasses.replace(content, tensors={**content.tensors, "vector_bank": large}), tmp_path / FILE, bank=bank
        )
    assert (tmp_path / FILE).read_bytes() == good


def test_a_head_that_is_no_number_is_refused(tmp_path):
    """It would be refused when read."""
    model = build("bert")
    adapter = adapt(model, kind="bert", **HEAD)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"classifier\.bias holds NaN"):
        adapter.pack(tmp_path / FILE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bank": "int3"}, "bank is one of"),
        ({"heads": "int4"}, "heads is one of"),
        ({"weights": 4}, "weights is one of"),
        ({"heads": "zip"}, "heads is one of"),
    ],
)
def test_unknown_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        adapt(build("stack")).pack(tmp_path / FILE, **settings)
    for bank in ("int8", "int4"):
        with pytest.raises(ValueError, match=f"{bank} is offered for VB-LoRA"):
            adapt(build("stack"), "tied_lora").pack(tmp_path / FILE, bank=bank)
    assert not list(tmp_path.iterdir())


# --- The pieces ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 90, 128, 129, 255, 256, 257, 1000, 65537])
def test_indices_take_no_bit_more_than_they_need(count):
    width = encoding.bits_for(count)
    assert width == max(1, (count - 1).bit_length())
    for n in (1, 7, 8, 100):
        values = torch.randint(count, (n,))
        data = encoding.pack_bits(values, width)
        assert data.numel() == -(-n * width // 8)
        assert torch.equal(encoding.unpack_bits(data, n, width), values)


def test_bits_lie_as_documented():
    assert encoding.pack_bits(torch.tensor([1, 2, 5]), 3).tolist() == [0b01_010_001, 0b1]
    with pytest.raises(ValueError, match="behind the last number"):
        encoding.unpack_bits(torch.tensor([0, 0b10], dtype=torch.uint8), 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_byte_planes_give_every_bit_back(dtype):
    for scale in (0.0, 1e-30, 0.02, 1e4):
        tensor = (scale * torch.randn(37, 11, dtype=torch.float64)).to(dtype)
        planes = encoding.to_planes(tensor)
        if planes is not None:
            name = container.DTYPE_NAMES[dtype]
            back = encoding.from_planes(planes, name, (37, 11))
            assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))
    assert encoding.to_planes(torch.zeros(1000)) is None  # it would inflate more than a reader takes


@pytest.mark.parametrize("seed", range(8))
def test_names_of_layers_come_back_in_their_order(seed):
    rng = random.Random(seed)
    kinds = ["a", "b.c", "0", "x.00.y", "01", 'é;[]"\\']
    names = []
    for _ in range(rng.randint(1, 12)):
        prefix = rng.choice(["m.layers.", "", "enc.", "m.0.experts."])
        start = rng.randint(0, 12)
        suffixes = rng.sample(kinds, rng.randint(1, 3))
        names += [f"{prefix}{i}.{s}" for i in range(start, start + rng.randint(1, 4)) for s in suffixes]
        names.append(rng.choice(["head", "embed.proj"]))
    shapes = [LayerShape(name, rng.choice([8, 8, 16]), 8) for name in dict.fromkeys(names)]
    groups = json.loads(json.dumps(layer_names.compact(shapes)))
    assert layer_names.expand(groups, 1000, 10**6) == shapes


def without_task(directory):
    """The settings in a directory without the task's name, which no packed file has."""
    settings = read_json(directory / "adapter_config.json")
    return {**settings, "task_type": None} if "task_type" in settings else settings


def test_the_names_of_all_layers_are_not_written_twice(tmp_path):
    """PEFT's format has them in its settings, where ours had "all-linear"."""
    model = build("llama", layers=11)
    adapter = adapt(model, kind="llama", target_modules="all-linear")
    adapter.save(tmp_path / "dir")
    convert.pack_directory(tmp_path / "dir", tmp_path / FILE)
    assert b"target_modules" not in (tmp_path / FILE).read_bytes()
    content = packed.read(tmp_path / FILE)
    assert content.shapes == adapter.shapes
    assert content.config.target_modules == [shape.name for shape in adapter.shapes]
    convert.unpack(tmp_path / FILE, tmp_path / "back")
    assert read_json(tmp_path / "back" / "adapter_config.json") == without_task(tmp_path / "dir")
    assert "and 76 more" in render(describe(tmp_path / FILE))
    again = adapt(build("llama", layers=11), kind="llama", target_modules="all-linear", seed=5)
    vblora.adapter.restore(again, tmp_path / FILE, redraw=True)
    assert error(again.layer_factors(), adapter.layer_factors()) < 1e-6


def test_repeated_blocks_are_written_once():
    assert len(layer_names.compact(encoder(768, 12))) == 1
    model = build("llama", layers=3)
    adapter = adapt(model, kind="llama", target_modules="all-linear")
    assert len(layer_names.compact(adapter.shapes)) == 1


# --- Into a model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"hidden": 16}, {"layers": 1}], ids=str)
def test_a_model_that_does_not_fit_is_named_and_left_alone(settings, tmp_path):
    adapt(build("bert"), kind="bert", **HEAD).pack(tmp_path / FILE)
    model = build("bert", **settings)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"does not fit this BertForSequenceClassification.*bert\.encoder\.layer\."):
        vblora.load(model, tmp_path / FILE)
    assert_unchanged(model, before)


def test_heads_of_another_size_are_named(tmp_path):
    adapt(build("bert"), kind="bert", **HEAD).pack(tmp_path / FILE)
    model = build("bert")
    model.classifier = nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"classifier.*\(3, 32\)|classifier.*\(3,\)"):
        vblora.load(model, tmp_path / FILE)


def test_a_regular_expression_in_a_file_is_not_run(tmp_path):
    """It would be anybody's, and could take for ever."""
    adapter = adapt(build("stack"), target_modules=r"layers\.\d\.up")
    adapter.config.target_modules = r"(([a-z]|[a-z.0-9])+)+x"
    adapter.pack(tmp_path / FILE)
    loaded = vblora.load(build("stack"), tmp_path / FILE)
    assert loaded.shapes == adapter.shapes


def test_damage_and_other_files_are_told(tmp_path):
    adapter = adapt(build("stack"))
    directory, file = save_both(adapter, tmp_path)
    with pytest.raises(ValueError, match="no packed adapter"):
        packed.read(directory / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        packed.read(tmp_path / "nonesuch")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        vblora.load(build("stack"), file)
    file.write_bytes(file.read_bytes().replace(b'\\"version\\":1', b'\\"version\\":9'))
    with pytest.raises(ValueError, match="version 9"):
        packed.read(file)


def test_factors_are_refused_beyond_the_memory_allowed(tmp_path):
    adapter = adapt(build("stack"))
    content = adapter.content()
    assert content.factor_bytes == sum(4 * (a.numel() + b.numel()) for a, b in content.factors().values())
    with pytest.raises(ValueError, match="factors take"):
        content.factors(most_bytes=1000)


# --- Directories and the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["topk", "full"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "stack_conv1d"])
def test_pefts_directories_are_packed_without_a_model(kind, form, tmp_path):
    """Their layers come in another order, and find their places in the model by name."""
    adapter = adapt(build(kind, layers=11), kind=kind, **(HEAD if kind == "bert" else {}))
    adapter.save(tmp_path / "dir", form=form)
    convert.pack_directory(tmp_path / "dir", tmp_path / FILE)
    content = packed.read(tmp_path / FILE)
    assert sorted(content.shapes) == sorted(adapter.shapes) and content.init_seed == 3
    model = build(kind, layers=11)
    loaded = vblora.load(model, tmp_path / FILE)
    adapter.save(tmp_path / "topk")
    expected = vblora.load(build(kind, layers=11), tmp_path / "topk")
    assert loaded.shapes == adapter.shapes
    assert equal_factors(loaded.layer_factors(), expected.layer_factors())


@pytest.mark.parametrize("format", ["auto", "native"])
@pytest.mark.parametrize("method", METHODS)
def test_unpacking_gives_the_directory_back(method, format, tmp_path):
    adapter = adapt(build("bert"), method, "bert", **HEAD)
    vblora.save(adapter, tmp_path / "dir", format=format)
    adapter.pack(tmp_path / FILE)
    convert.unpack(tmp_path / FILE, tmp_path / "back", format=format)
    (back, metadata), (there, known) = (
        read_tensors(tmp_path / which / "adapter_model.safetensors") for which in ("back", "dir")
    )
    settings = json.loads(known["vblora_settings"])
    settings.pop("task_type", None)
    known["vblora_settings"] = json.dumps(settings, sort_keys=True)
    assert metadata == known and {k: t.dtype for k, t in back.items()} == {k: t.dtype for k, t in there.items()}
    assert all(torch.equal(tensor, back[name]) for name, tensor in there.items())
    assert read_json(tmp_path / "back" / "adapter_config.json") == without_task(tmp_path / "dir")


@pytest.mark.parametrize("settings", [{"method": "tied_lora"}, {"method": "lora_xs"}, {"vector_length": 12}], ids=str)
def test_our_own_directories_are_packed_with_the_models_configuration(settings, tmp_path, capsys):
    model = build("bert")
    model.config.architectures = ["BertModel"]  # as of an encoder without a head
    model.config.save_pretrained(tmp_path / "model")
    adapter = adapt(model, kind="bert", **settings, **HEAD)
    vblora.save(adapter, tmp_path / "dir")
    assert cli.main(["pack", str(tmp_path / "dir"), str(tmp_path / FILE)]) == 2
    assert "--model" in capsys.readouterr().err
    assert cli.main(["pack", str(tmp_path / "dir"), str(tmp_path / FILE), "--model", str(tmp_path / "model")]) == 0
    assert packed.read(tmp_path / FILE).shapes == adapter.shapes
    loaded = vblora.load(build("bert"), tmp_path / FILE)
    assert equal_factors(loaded.layer_factors(), adapter_of(tmp_path / "dir", "bert"))


def test_the_commands_print_what_they_saved_and_lost(tmp_path, capsys):
    adapter = adapt(build("bert"), kind="bert", num_vectors=200, vector_length=32, **HEAD)
    directory, _ = save_both(adapter, tmp_path)
    command = ["pack", str(directory), str(tmp_path / "b"), "--bank", "int8", "--weights", "8", "--heads", "float16"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert f"{(tmp_path / 'b').stat().st_size:,} bytes" in out and "largest error" in out
    assert cli.main(["pack", str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    assert "largest error of a factor's entry 0," in capsys.readouterr().out
    assert cli.main(["unpack", str(tmp_path / "b"), str(tmp_path / "back")]) == 0
    assert error(adapter_of(tmp_path / "back", "bert"), packed.read(tmp_path / "b").factors()) == 0
    for arguments in (
        ["pack", "nonesuch", "x"],
        ["unpack", "nonesuch", "x"],
        ["pack", str(directory), "x", "--bank", "q"],
    ):
        capsys.readouterr()
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_packed_file_is_inspected(tmp_path, capsys):
    adapter = adapt(build("bert"), kind="bert", **HEAD)
    directory, file = save_both(adapter, tmp_path, bank="int8", weights=8)
    content, known = describe(file), describe(directory)
    assert content["form"] == "topk" and content["format"] == "vblora packed"
    for key in ("method", "settings", "sub_vectors", "head_parameters", "init_seed"):
        assert content[key] == known[key]
    assert content["parts"]["vector_bank"] == {"tensors": 1, "numbers": 96, "bytes": 96 + 48, "types": ["int8"]}
    assert content["parts"]["topk_indices"]["types"] == ["4 bits"]
    assert content["layers"] == len(adapter.shapes) and "fingerprint" in render(content)
    assert cli.main(["inspect", str(file)]) == 0
    assert "int8" in capsys.readouterr().out


# --- Going on from a small file -----------------------------------------------------------------------------------


def teacher():
    """A task that an adapter can learn: the outputs of the same model with another adapter."""
    model = build("bert")
    adapt(model, kind="bert", target_modules=["query", "value", "dense"], seed=77, init_vector_bank_bound=0.5)
    return [(batch, run(model, batch).detach()) for batch in (make_batch("bert", rows=8, seed=s) for s in range(4))]


def train(model, steps, task, lr):
    optimizer = vblora.AdamW(groups_for(model, lr=lr))
    losses = []
    for _ in range(steps):
        loss = sum((run(model, batch) - target).square().mean() for batch, target in task)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("source", ["topk", "packed", "restored", "peft"])
@pytest.mark.parametrize("topk", [2, 4])
def test_training_goes_on_from_a_small_file(topk, source, tmp_path):
    task, settings = teacher(), {"num_vectors": 40, "topk": topk, "init_logits_std": 0.1, **HEAD}
    model, other = build("bert"), build("bert")
    adapter = adapt(model, kind="bert", **settings)
    train(model, 15, task, 3e-2)
    directory, file = save_both(adapter, tmp_path)
    if source == "restored":
        again = adapt(other, kind="bert", seed=50, **settings)
        vblora.adapter.restore(again, directory, redraw=True)
    else:
        if source == "peft":  # no seed is recorded there
            packed.write(dataclasses.replace(packed.read(file), init_seed=None), file)
        again = vblora.load(other, directory if source == "topk" else file, trainable=True)
    before = again.topk_indices.clone()
    assert torch.equal(before, adapter.topk_indices)
    going_on, instead = train(other, 20, task, 3e-3), train(model, 20, task, 3e-3)
    assert going_on[0] == pytest.approx(instead[0], rel=1e-6)
    assert going_on[-1] < 0.9 * going_on[0]
    assert going_on[-1] < 1.5 * instead[-1]  # about as good as from all logits
    assert not torch.equal(again.topk_indices, before)


@pytest.mark.parametrize("weights", packed.WEIGHTS)
@pytest.mark.parametrize("std", [0.0, 0.01, 50.0])
@pytest.mark.parametrize("topk", [1, 2, 3, 12])
def test_drawn_logits_are_those_of_the_start_and_leave_the_selection(topk, std, weights, tmp_path):
    adapter = adapt(build("stack"), topk=topk, init_logits_std=std)
    start = adapter.dense_logits()
    adapter.pack(tmp_path / FILE, weights=weights)
    loaded = vblora.load(build("stack"), tmp_path / FILE, trainable=True)
    logits, selected = loaded.dense_logits(), loaded.topk_logits.detach()
    assert logits.isfinite().all() and torch.equal(logits.gather(1, loaded.topk_indices), selected)
    others = logits.scatter(1, loaded.topk_indices, -torch.inf).max(dim=1).values
    assert (others < selected.min(dim=1).values).all()
    if weights == "lossless" and std == 0.01:  # nothing was trained, so nothing has moved
        torch.testing.assert_close(logits, start, rtol=0, atol=5e-6)
    expected = vblora.load(build("stack"), tmp_path / FILE)
    assert error(loaded.layer_factors(), expected.layer_factors()) < (1e-5 if std == 50 else 1e-6)
    loaded.reselect()
    assert torch.equal(loaded.topk_indices.sort().values, expected.topk_indices.sort().values)
    loaded.save(tmp_path / "full", form="full")


def test_a_small_file_is_no_start_unless_asked_for(tmp_path):
    adapter = adapt(build("stack"))
    for path in save_both(adapter, tmp_path):
        other = adapt(build("stack"), seed=9)
        with pytest.raises(ValueError, match=r"to train on it must be the full one.*redraw"):
            other.start_from(path)
        other.start_from(path, redraw=True)
        assert error(other.layer_factors(), adapter.layer_factors()) < 1e-6
        assert other.init_seed == 3
        with pytest.raises(ValueError, match="other settings than this run: r"):
            adapt(build("stack"), r=3).start_from(path, redraw=True)


def test_a_packed_file_of_another_method_resumes(tmp_path):
    adapter = adapt(build("stack"), "tied_lora")
    adapter.pack(tmp_path / FILE)
    other = adapt(build("stack"), "tied_lora", seed=9)
    vblora.adapter.restore(other, tmp_path / FILE)
    assert equal_factors(other.layer_factors(), adapter.layer_factors())


def test_a_rank_above_every_width_is_refused_before_anything_is_expanded():
    content = adapt(build("stack")).content()
    name, rank = content.shapes[0].name, 5000
    config = vblora.VBLoRAConfig(r=rank, num_vectors=1, vector_length=64, topk=1, target_modules=[name])
    rows = 2 * rank
    tensors = {"vector_bank": torch.ones(1, 64), "topk_indices": torch.zeros(rows, 1, dtype=torch.long)}
    tensors["topk_weights"] = torch.zeros(rows, 0)
    shapes = [LayerShape(name, 64, 64)]
    with pytest.raises(ValueError, match="r 5000 is above every width"):
        packed.loads(packed.dumps(dataclasses.replace(content, config=config, shapes=shapes, tensors=tensors)))


# --- A selection that the seed draws ------------------------------------------------------------------------------


def trained(topk, logits_rate, **settings):
    """An adapter after three steps, and its model."""
    model = build("stack")
    config = config_for("vblora", num_vectors=40, vector_length=8, topk=topk, **settings)
    adapter = vblora.attach(model, config, seed=5)
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-2, lr_vector_bank=1e-1, lr_logits=logits_rate))
    for _ in range(3):
        run(model, make_batch("stack")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter, model


@pytest.mark.parametrize("settings", [{}, {"init_vectors_of_a": 10, "init_logits_std": 3.0, "init_by_kind": True}])
@pytest.mark.parametrize("topk", [1, 2])
def test_a_selection_that_never_moved_takes_no_bytes(topk, settings, tmp_path):
    adapter, model = trained(topk, 0.0, **settings)
    plain = adapter.pack(tmp_path / FILE)
    short = adapter.pack(tmp_path / "short", selection="seed")
    rows = len(adapter.topk_indices)
    assert plain - short > packed_bytes(topk, rows) - 400  # in their place are two codes in the header
    other = build("stack")
    loaded = vblora.load(other, tmp_path / "short")
    assert equal_factors(loaded.layer_factors(), packed.read(tmp_path / FILE).factors())
    torch.testing.assert_close(run(other, make_batch("stack")), run(model, make_batch("stack")), rtol=0, atol=1e-6)
    assert packed.dumps(packed.read(tmp_path / "short"), selection="seed") == (tmp_path / "short").read_bytes()


def packed_bytes(topk, rows):
    """Of 6-bit indices and float32 weights, which deflate little."""
    return rows * topk * 6 // 8 + rows * (topk - 1) * 3


def test_a_selection_that_was_trained_is_not_left_out(tmp_path):
    adapter, _ = trained(2, 1.0)
    with pytest.raises(ValueError, match="not the one that the adapter's seed draws"):
        adapter.pack(tmp_path / FILE, selection="seed")
    with pytest.raises(ValueError, match="selection is one of indices, seed"):
        adapter.pack(tmp_path / FILE, selection="none")
    with pytest.raises(ValueError, match="no seed is known"):
        packed.dumps(dataclasses.replace(adapter.content(), init_seed=None), selection="seed")
    with pytest.raises(ValueError, match="tied_lora has no selection to draw again"):
        adapt(build("stack"), "tied_lora").pack(tmp_path / FILE, selection="seed")
    assert not list(tmp_path.iterdir())


def test_another_draw_is_refused(tmp_path, monkeypatch):
    """As on a processor on which PyTorch draws normal numbers otherwise; and what a stranger's file may ask for."""
    adapter, _ = trained(1, 0.0)
    adapter.pack(tmp_path / FILE, selection="seed")
    monkeypatch.setattr(packed.drawn, "MOST_DRAWN", 100)
    with pytest.raises(ValueError, match="logits are more than the 100 drawn for a file"):
        packed.read(tmp_path / FILE)
    monkeypatch.undo()
    monkeypatch.setattr(packed.drawn, "MOST_SELECTED", 10)
    with pytest.raises(ValueError, match="selected vectors are more than the 10 drawn for a file"):
        packed.read(tmp_path / FILE)
    monkeypatch.undo()
    draw = packed.drawn.draw
    monkeypatch.setattr(packed.drawn, "draw", lambda config, parts, seed: draw(config, parts, seed + 1))
    with pytest.raises(ValueError, match="this processor draws another one than the file's"):
        vblora.load(build("stack"), tmp_path / FILE)


def test_the_command_leaves_a_drawn_selection_out(tmp_path, capsys):
    adapter, _ = trained(1, 0.0)
    adapter.pack(tmp_path / FILE)
    for name, more in (("plain", []), ("short", ["--selection", "seed"])):
        assert cli.main(["pack", str(tmp_path / FILE), str(tmp_path / name), *more]) == 0
    assert (tmp_path / "short").stat().st_size < (tmp_path / "plain").stat().st_size
    assert "largest error of a factor's entry 0" in capsys.readouterr().out
