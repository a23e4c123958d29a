"""Files: PEFT's format both ways, our own, going on from them, and everything that can be wrong with one."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from core_helpers import (
    METHODS,
    adapt,
    assert_unchanged,
    build,
    groups_for,
    make_batch,
    peft_twin,
    run,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import nn

import vblora
from vblora import container
from vblora.io import read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BERT = {
    "target_modules": ["query", "value", "intermediate.dense"],
    "modules_to_save": ["classifier"],
    "init_vector_bank_bound": 0.3,
}
GPT2 = {"target_modules": ["c_attn", "c_fc"]}
STACK = {"target_modules": ["up", "down"]}
SETTINGS = {"bert": BERT, "gpt2": GPT2, "stack": STACK, "stack_conv1d": STACK}


def same_output(model, other, kind, tolerance=1e-6):
    """In float64, so that the difference is that of the stored numbers and not of the arithmetic after them."""
    batch = {key: t.double() if t.is_floating_point() else t for key, t in make_batch(kind).items()}
    with torch.no_grad():
        ours, theirs = (run(copy.deepcopy(each).double(), batch) for each in (model, other))
    return (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def peft_load(base, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and of unexpected tensors
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(base, str(directory)).eval()


def shake_head(model):
    """Heads as after training: other values than the base model's."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name:
                parameter.mul_(1.5).add_(0.1)


# --- PEFT's format -----------------------------------------------------------------------------------------------

SIZES = [(12, 2), (255, 1), (256, 2), (300, 3), (40, 6), (6, 6)]


@pytest.mark.parametrize("form", ["topk", "full"])
@pytest.mark.parametrize(("num_vectors", "topk"), SIZES)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "stack", "stack_conv1d"])
def test_peft_reads_what_we_write(kind, num_vectors, topk, form, tmp_path):
    model = build(kind)
    adapter = adapt(model, kind=kind, num_vectors=num_vectors, topk=topk, **SETTINGS[kind])
    shake_head(model)
    adapter.save(tmp_path, form=form)
    assert same_output(peft_load(build(kind), tmp_path), model, kind)
    assert not same_output(build(kind), model, kind, tolerance=1e-2)


@pytest.mark.parametrize("form", ["topk", "full"])
@pytest.mark.parametrize(("num_vectors", "topk"), SIZES)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "stack", "stack_conv1d"])
def test_we_read_what_peft_writes(kind, num_vectors, topk, form, tmp_path):
    base = build(kind)
    model = build(kind)
    adapter = adapt(model, kind=kind, num_vectors=num_vectors, topk=topk, **SETTINGS[kind])
    twin = peft_twin(base, adapter, **({"task_type": "SEQ_CLS"} if kind == "bert" else {}))
    shake_head(twin)
    twin.peft_config["default"].save_only_topk_weights = form == "topk"
    twin.save_pretrained(tmp_path)
    other = build(kind)
    loaded = vblora.load(other, tmp_path)
    assert same_output(other, twin, kind)
    assert (loaded.logits is None) == (form == "topk")
    if form == "full":
        assert torch.equal(loaded.dense_logits(), adapter.dense_logits())


@pytest.mark.parametrize("form", ["topk", "full"])
def test_our_files_are_those_peft_writes(form, tmp_path):
    base, model = build("bert"), build("bert")
    adapter = adapt(model, kind="bert", num_vectors=300, **BERT)
    twin = peft_twin(base, adapter)
    twin.peft_config["default"].save_only_topk_weights = form == "topk"
    twin.save_pretrained(tmp_path / "theirs")
    adapter.save(tmp_path / "ours", form=form)
    theirs, ours = (load_file(tmp_path / which / TENSORS) for which in ("theirs", "ours"))
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("modules_to_save", [None, ["classifier"]])
def test_peft_gives_all_linear_the_layers_that_we_gave_it(modules_to_save, tmp_path):
    model = build("bert")
    adapter = adapt(model, kind="bert", target_modules="all-linear", modules_to_save=modules_to_save)
    adapter.save(tmp_path)
    assert same_output(peft_load(build("bert"), tmp_path), model, "bert")
    other = build("bert")
    assert vblora.load(other, tmp_path).shapes == adapter.shapes
    assert same_output(other, model, "bert")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [1, 2, 3, 6])
def test_half_precision_adapters_come_back_through_both_forms_and_peft(topk, dtype, tmp_path):
    """Also where one weight takes all: its rounded rest must not become negative, whose logarithm is NaN."""
    model = build("stack")
    adapter = adapt(model, num_vectors=20, topk=topk, init_logits_std=8.0).to(dtype)
    for form in ("topk", "full"):
        adapter.save(tmp_path / form, form=form)
        stored = load_file(tmp_path / form / TENSORS)
        assert {t.dtype for key, t in stored.items() if "bank" in key or key.endswith(("_A", "_B"))} == {dtype}
        # PEFT reads the weights of the top-k form in float32 alone.
        assert {t.dtype for key, t in stored.items() if "weights" in key} <= {torch.float32}
        other = build("stack")
        vblora.load(other, tmp_path / form)
        twin = peft_load(build("stack"), tmp_path / form)
        for each in (other, twin):
            with torch.no_grad():
                output = run(each, make_batch("stack"))
            assert output.isfinite().all()
            assert (output - run(model, make_batch("stack"))).abs().max() < 0.1


@pytest.mark.parametrize("topk", [2, 3, 6])
def test_saturated_mixtures_survive_the_topk_form(topk, tmp_path):
    model, other = build("stack"), build("stack")
    adapter = adapt(model, num_vectors=20, topk=topk, init_logits_std=200.0)
    adapter.save(tmp_path)
    vblora.load(other, tmp_path)
    assert same_output(other, model, "stack", 1e-5)
    assert same_output(peft_load(build("stack"), tmp_path), model, "stack", 1e-5)


@pytest.mark.parametrize("form", ["topk", "full"])
def test_a_vector_length_that_does_not_divide_is_kept_in_our_own_format(form, tmp_path):
    model, other = build("stack"), build("stack")
    adapter = adapt(model, vector_length=12)
    with pytest.raises(ValueError, match=r"12 does not divide the width 32 of layers\.0\.up"):
        vblora.save(adapter, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
    adapter.save(tmp_path, form=form)
    assert json.loads((tmp_path / CONFIG).read_text())["vblora_method"] == "vblora"
    vblora.load(other, tmp_path)
    assert same_output(other, model, "stack")


@pytest.mark.parametrize("method", ["tied_lora", "lora_xs"])
def test_other_methods_have_no_peft_format(method, tmp_path):
    adapter = adapt(build("stack"), method)
    with pytest.raises(ValueError, match=f"PEFT has no format for {method}"):
        vblora.save(adapter, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
def test_restore_puts_saved_values_into_an_attached_adapter(targets, tmp_path):
    model, other = build("bert"), build("bert")
    settings = {"target_modules": targets, "modules_to_save": ["classifier"]}
    adapt(model, kind="bert", **settings).save(tmp_path, form="full")
    adapter = adapt(other, kind="bert", seed=50, **settings)
    assert not same_output(other, model, "bert", 1e-3)
    vblora.adapter.restore(adapter, tmp_path)
    assert same_output(other, model, "bert")


@pytest.mark.parametrize("settings", [{"r": 3}, {"target_modules": ["query"]}, {"vblora_dropout": 0.1}], ids=str)
def test_restore_refuses_other_settings_by_name_and_changes_nothing(settings, tmp_path):
    adapt(build("stack")).save(tmp_path, form="full")
    model = build("bert" if "target_modules" in settings else "stack")
    adapter = adapt(model, seed=50, **settings)
    before = snapshot(model)
    with pytest.raises(ValueError, match=next(iter(settings))):
        vblora.adapter.restore(adapter, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("form", ["topk", "full"])
@pytest.mark.parametrize("kind", ["bert", "stack_conv1d"])
def test_our_own_format_on_request(kind, form, tmp_path):
    model, other = build(kind), build(kind)
    adapter = adapt(model, kind=kind, **SETTINGS[kind])
    shake_head(model)
    vblora.save(adapter, tmp_path, form=form, format="native")
    assert "peft_type" not in json.loads((tmp_path / CONFIG).read_text())
    loaded = vblora.load(other, tmp_path)
    assert same_output(other, model, kind) and loaded.config == adapter.config


@pytest.mark.parametrize("settings", [{"form": "half"}, {"format": "zip"}])
def test_an_unknown_form_or_format_is_refused(settings, tmp_path):
    adapter = adapt(build("stack"))
    with pytest.raises(ValueError, match=next(iter(settings.values()))):
        vblora.save(adapter, tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="taken is a file"):
        adapt(build("stack")).save(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_detached_adapter_cannot_be_saved(tmp_path):
    adapter = adapt(build("stack"))
    adapter.detach()
    with pytest.raises(ValueError, match="not attached"):
        adapter.save(tmp_path)


# --- Going on ----------------------------------------------------------------------------------------------------


def train(model, optimizer, steps):
    for step in steps:
        batch = make_batch("bert", seed=step)
        run(model, batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_from_the_full_form_as_if_never_stopped(method, tmp_path):
    model, other = build("bert"), build("bert")
    adapter = adapt(model, method, "bert", target_modules=["query", "value"], modules_to_save=["classifier"])
    optimizer = vblora.AdamW(groups_for(model))
    train(model, optimizer, range(5))
    adapter.save(tmp_path, form="full")
    loaded = vblora.load(other, tmp_path)
    again = vblora.AdamW(groups_for(other))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(5, 10))
    train(other, again, range(5, 10))
    assert all(torch.equal(t, other.state_dict()[key]) for key, t in model.state_dict().items())
    assert loaded.saved


def test_an_adapter_from_the_topk_form_cannot_be_trained_and_says_why(tmp_path):
    adapt(build("stack")).save(tmp_path)
    model = build("stack")
    adapter = vblora.load(model, tmp_path)
    groups = groups_for(model)
    with pytest.raises(ValueError, match=r"top-k file.*full form"):
        vblora.AdamW(groups)
    for call in (adapter.dense_logits, adapter.reselect, lambda: adapter.save(tmp_path / "x", form="full")):
        with pytest.raises(ValueError, match="top-k file"):
            call()
    assert not (tmp_path / "x").exists()
    adapter.save(tmp_path / "again")
    other = build("stack")
    vblora.load(other, tmp_path / "again")
    assert same_output(other, model, "stack")


def test_heads_that_share_a_weight_are_saved_and_loaded(tmp_path):
    model, other = (build("gpt2", tie_word_embeddings=True) for _ in range(2))
    adapter = adapt(model, kind="gpt2", target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    adapter.save(tmp_path)
    vblora.load(other, tmp_path)
    assert other.lm_head.weight is other.transformer.wte.weight
    assert same_output(other, model, "gpt2")


def test_saving_over_another_adapter_replaces_it(tmp_path):
    adapt(build("bert"), kind="bert", **BERT).save(tmp_path, form="full")
    model, other = build("stack"), build("stack")
    adapt(model, "tied_lora").save(tmp_path)
    vblora.load(other, tmp_path)
    assert same_output(other, model, "stack")
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, TENSORS, "README.md"}


def test_a_save_that_fails_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    model, other = build("stack"), build("stack")
    adapter = adapt(model)
    expected = run(model, make_batch("stack"))
    adapter.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        adapter.vector_bank.mul_(2)

    def fails(file, *_):
        file.write(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(container, "write", fails)
    with pytest.raises(OSError, match="no space"):
        adapter.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    vblora.load(other, tmp_path)
    torch.testing.assert_close(run(other, make_batch("stack")), expected, rtol=1e-6, atol=1e-6)


# --- Files that are wrong ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good directories of a small BERT with a head, by name; tests spoil copies of them."""
    root = tmp_path_factory.mktemp("good")
    adapter = adapt(build("bert"), kind="bert", topk=3, **BERT)
    for form in ("topk", "full"):
        for format in ("peft", "native"):
            vblora.save(adapter, root / f"{format}-{form}", form=form, format=format)
    for method in ("tied_lora", "lora_xs"):
        heads = {key: BERT[key] for key in ("target_modules", "modules_to_save")}
        adapt(build("bert"), method, "bert", **heads).save(root / method)
    return root


def spoil(good, name, tmp_path, tensors=None, config=None):
    """A copy of a good directory with its tensors or settings changed by a function."""
    target = tmp_path / "adapter"
    target.mkdir()
    content = load_file(good / name / TENSORS)
    settings = json.loads((good / name / CONFIG).read_text())
    if tensors is not None:
        tensors(content)
    if config is not None:
        config(settings)
    save_file({key: t.contiguous() for key, t in content.items()}, target / TENSORS)
    (target / CONFIG).write_text(json.dumps(settings))
    return target


def assert_refused(directory, message, **model_settings):
    model = build("bert", **model_settings)
    model.bert.embeddings.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        vblora.load(model, directory)
    assert_unchanged(model, before)


EVERY = ["peft-topk", "peft-full", "native-topk", "native-full", "tied_lora", "lora_xs"]
PARTS = {  # a tensor by a piece of its name, in each directory that has one
    "bank": ["peft-topk", "peft-full", "native-topk", "native-full"],
    "indices": ["peft-topk", "native-topk"],
    "weights": ["peft-topk", "native-topk"],
    "logits": ["peft-full", "native-full"],
    "classifier.weight": EVERY,
    "scale_v": ["tied_lora"],
    "mixing": ["lora_xs"],
}
PLACES = [(part, name) for part, names in PARTS.items() for name in names]


def change(part, function):
    def tensors(content):
        key = next(k for k in sorted(content) if part in k)
        content[key] = function(content[key])

    return tensors


@pytest.mark.parametrize("name", EVERY)
def test_the_good_files_load(name, good):
    vblora.load(build("bert"), good / name)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("model", [{"hidden": 48}, {"layers": 1}, {"layers": 3}], ids=str)
def test_a_model_of_other_widths_or_layers_is_refused(model, name, good):
    assert_refused(good / name, r"shape|missing|no tensor|belong to no", **model)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1, -100, 0.5, 0.9])
def test_a_file_cut_short_is_refused(name, keep, good, tmp_path):
    directory = spoil(good, name, tmp_path)
    path = directory / TENSORS
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] if isinstance(keep, float) else data[:keep])
    assert_refused(directory, "adapter_model.safetensors is no whole safetensors file")


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_a_missing_file_is_named(missing, good, tmp_path):
    directory = spoil(good, "peft-topk", tmp_path)
    (directory / missing).unlink()
    assert_refused(directory, f"{missing} does not exist")
    assert_refused(tmp_path / "nowhere", "nowhere does not exist: name the folder of an adapter, or a packed file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON file"),
        ("{", "is no JSON file"),
        ("[1]", "holds no JSON object"),
        ("null", "holds no JSON object"),
        ("{}", "peft_type is None"),
        ('{"peft_type": "LORA"}', "'LORA'.*peft.PeftModel"),
        ('{"peft_type": ["VBLORA"]}', "peft_type"),
        ('{"vblora_method": "dora"}', "'dora', not one of"),
        ('{"vblora_method": ["vblora"]}', "vblora_method"),
        ("[" * 100_000, "is no JSON file"),
    ],
)
def test_a_configuration_that_is_none_is_refused(text, message, good, tmp_path):
    directory = spoil(good, "peft-topk", tmp_path)
    (directory / CONFIG).write_text(text)
    assert_refused(directory, message)


def test_a_configuration_that_is_no_text_is_refused(good, tmp_path):
    directory = spoil(good, "peft-topk", tmp_path)
    (directory / CONFIG).write_bytes(b"\xff\xfe\x00{")
    assert_refused(directory, "is no JSON file")


@pytest.mark.parametrize("name", ["peft-topk", "native-full", "tied_lora"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("novelty", 3),
        ("r", 0),
        ("r", "2"),
        ("target_modules", 7),
        ("target_modules", None),
        ("target_modules", "(query"),
        ("target_modules", ["nothing"]),
        ("modules_to_save", "classifier"),
        ("layers_to_transform", "all"),
    ],
)
def test_a_setting_that_is_wrong_is_named(name, key, value, good, tmp_path):
    assert_refused(spoil(good, name, tmp_path, config=lambda c: c.update({key: value})), key)


@pytest.mark.parametrize(
    ("key", "value"), [("num_vectors", 13), ("vector_length", 4), ("topk", 2), ("topk", 40), ("bias", "all"), ("r", 3)]
)
@pytest.mark.parametrize("name", ["peft-topk", "peft-full"])
def test_settings_that_do_not_fit_the_tensors_are_refused(name, key, value, good, tmp_path):
    directory = spoil(good, name, tmp_path, config=lambda c: c.update({key: value}))
    if (name, key, value) == ("peft-full", "topk", 2):
        vblora.load(build("bert"), directory)  # all logits serve any k
        return
    assert_refused(directory, "shape|topk|bias")


@pytest.mark.parametrize(("part", "name"), PLACES)
def test_a_tensor_of_another_shape_is_named(part, name, good, tmp_path):
    assert_refused(spoil(good, name, tmp_path, change(part, lambda t: t[:-1])), f"{part}.*shape")


@pytest.mark.parametrize(("part", "name"), [place for place in PLACES if place[0] != "indices"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_numbers_are_refused(part, name, value, good, tmp_path):
    def with_value(t):
        t.view(-1)[-1] = value
        return t

    assert_refused(spoil(good, name, tmp_path, change(part, with_value)), f"{part}.*NaN or infinite")


@pytest.mark.parametrize(("part", "name"), [place for place in PLACES if place[0] != "indices"])
def test_whole_numbers_in_place_of_floating_point_are_refused(part, name, good, tmp_path):
    assert_refused(spoil(good, name, tmp_path, change(part, lambda t: t.to(torch.int32))), f"{part}.*int32")


def first_row(*values):
    def function(t):
        t = t.clone()
        t.view(-1, t.shape[-1])[0, : len(values)] = torch.tensor(values, dtype=t.dtype)
        return t

    return function


@pytest.mark.parametrize("name", PARTS["indices"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda t: t.float(), "float32, not whole"),
        (lambda t: t.bool(), "bool, not whole"),
        (first_row(12), "outside 0 to 11"),
        (lambda t: first_row(-1)(t.to(torch.int16)), "outside 0 to 11"),
        (first_row(4, 4, 1), "same vector twice"),
    ],
    ids=["float", "bool", "too_large", "negative", "twice"],
)
def test_indices_that_select_nothing_are_refused(name, function, message, good, tmp_path):
    assert_refused(spoil(good, name, tmp_path, change("indices", function)), f"indices.*{message}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_indices_of_any_whole_type_are_read(dtype, good, tmp_path):
    expected, other = build("bert"), build("bert")
    vblora.load(expected, good / "peft-topk")
    vblora.load(other, spoil(good, "peft-topk", tmp_path, change("indices", lambda t: t.to(dtype))))
    assert same_output(other, expected, "bert", 0)


@pytest.mark.parametrize("name", PARTS["weights"])
@pytest.mark.parametrize("row", [(0.9, 0.2), (-0.1, 0.5), (2.0, -1.0)], ids=str)
def test_weights_that_are_no_mixture_are_refused(name, row, good, tmp_path):
    assert_refused(spoil(good, name, tmp_path, change("weights", first_row(*row))), "no mixture")


@pytest.mark.parametrize(("part", "name"), PLACES)
def test_a_missing_tensor_is_named(part, name, good, tmp_path):
    def drop(content):
        del content[next(k for k in sorted(content) if part in k)]

    assert_refused(spoil(good, name, tmp_path, drop), part)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("key", ["extra", "base_model.model.extra.weight", "head.bert.pooler.dense.weight"])
def test_a_tensor_that_belongs_to_nothing_is_named(name, key, good, tmp_path):
    directory = spoil(good, name, tmp_path, lambda content: content.update({key: torch.ones(2)}))
    assert_refused(directory, "belong to no.*" + key.removeprefix("base_model.model.").removeprefix("head."))


@pytest.mark.parametrize("name", ["peft-topk", "native-full", "lora_xs"])
def test_a_head_that_the_settings_do_not_name_is_refused(name, good, tmp_path):
    directory = spoil(good, name, tmp_path, config=lambda c: c.update(modules_to_save=None))
    assert_refused(directory, "classifier")


def test_a_name_that_is_taken_is_refused(good):
    model = build("bert")
    adapt(model, kind="bert", target_modules=["key"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="already has 'vblora_adapter'"):
        vblora.load(model, good / "peft-topk")
    assert_unchanged(model, before)


@pytest.mark.parametrize("topk", [2, 3, 6])
def test_stored_weights_never_sum_to_more_than_one(topk):
    """PEFT takes the logarithm of 1 - sum: a sum rounded to above 1 would make the row NaN there."""
    adapter = adapt(build("stack"), r=16, vector_length=1, num_vectors=20, topk=topk)
    generator = torch.Generator().manual_seed(0)
    rounded_up = 0
    for _ in range(10):
        with torch.no_grad():
            adapter.topk_logits.normal_(0, 20, generator=generator)
        rounded_up += int((adapter.topk_logits.softmax(-1)[:, :-1].sum(-1) > 1).sum())
        weights = adapter.tensors("topk")["topk_weights"]
        assert (1 - weights.sum(-1) >= 0).all() and (weights >= 0).all()
    assert rounded_up > 0 or topk == 2  # it does happen, and is mended


def test_a_weight_rounded_below_zero_is_read_as_zero(good, tmp_path):
    def below_zero(tensors):
        key = next(key for key in tensors if key.endswith("topk_weights"))
        tensors[key].flatten()[0] = -1e-7

    model = build("bert")
    vblora.load(model, spoil(good, "peft-topk", tmp_path, below_zero))
    with torch.no_grad():
        assert run(model, make_batch("bert")).isfinite().all()


# -- the model has changed since --------------------------------------------------------------------------------------


def test_a_head_replaced_after_attaching_is_written_as_the_model_has_it_now(tmp_path):
    model = build("bert")
    adapter = adapt(model, kind="bert", target_modules=["query"], modules_to_save=["classifier"])
    model.classifier = nn.Linear(*reversed(model.classifier.weight.shape))
    assert adapter.head_parameters() == sum(p.numel() for p in model.classifier.parameters())
    adapter.save(tmp_path)
    again = build("bert")
    vblora.load(again, tmp_path)
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert torch.equal(again.classifier.bias, model.classifier.bias)


def test_a_vocabulary_widened_after_attaching_is_written_as_wide(tmp_path):
    model = build("llama")
    adapter = adapt(model, kind="llama", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    wider = model.config.vocab_size + 7
    model.resize_token_embeddings(wider)
    adapter.save(tmp_path)
    again = build("llama")
    again.resize_token_embeddings(wider)
    vblora.load(again, tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("act", ["save", "pack", "merge", "groups"])
def test_a_layer_replaced_after_attaching_is_refused_by_name(act, tmp_path):
    model = build("llama")
    adapter = adapt(model, kind="llama", target_modules=["q_proj"])
    attention = model.model.layers[1].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    acts = {
        "save": lambda: adapter.save(tmp_path / "out"),
        "pack": lambda: adapter.pack(tmp_path / "out"),
        "merge": adapter.merge,
        "groups": lambda: vblora.param_groups(model, lr=1e-3, lr_vector_bank=1e-3, lr_logits=1e-2),
    }
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj was replaced after"):
        acts[act]()
    assert not (tmp_path / "out").exists()


def test_a_layer_within_a_wrapper_is_the_layer(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build("llama")
    adapter = adapt(model, kind="llama", target_modules=["q_proj"])
    attention = model.model.layers[1].self_attn
    attention.q_proj = checkpoint_wrapper(attention.q_proj)
    adapter.save(tmp_path)


def test_the_full_form_keeps_the_selection_that_another_optimiser_trained(tmp_path):
    torch.manual_seed(0)
    model = build("stack")
    adapter = adapt(model, kind="stack")
    with torch.no_grad():  # what a step of SGD does: the selected logits fall below others, and nobody selects again
        adapter.topk_logits.sub_(3 * torch.rand_like(adapter.topk_logits))
    adapter.save(tmp_path, form="full")
    again = build("stack")
    loaded = vblora.load(again, tmp_path)
    for name, (a, b) in adapter.layer_factors().items():
        torch.testing.assert_close(loaded.layer_factors()[name][0], a, rtol=0, atol=1e-6)
        torch.testing.assert_close(loaded.layer_factors()[name][1], b, rtol=0, atol=1e-6)
    assert torch.equal(loaded.topk_indices.sort().values, adapter.topk_indices.sort().values)


def gated(**settings):
    """An adapter of a model with a gate of one output, as Qwen2-MoE has, among wider layers."""
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    for name, width in {"up": 32, "down": 32, "gate": 1}.items():
        model.add_module(name, torch.nn.Linear(32, width))
    usual = {"r": 2, "num_vectors": 12, "vector_length": 16, "target_modules": "all-linear"}
    return vblora.attach(model, vblora.VBLoRAConfig(**{**usual, **settings}), seed=0)


def test_a_layer_that_keeps_the_others_from_pefts_format_is_named(tmp_path):
    with pytest.warns(
        UserWarning, match="native format, which PEFT cannot read, for 1 of its 3 layers: .*gate"
    ) as said:
        gated().save(tmp_path / "auto")
    assert len(said) == 1 and said[0].filename == __file__
    assert "vblora_method" in read_json(tmp_path / "auto" / "adapter_config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gated().save(tmp_path / "meant", format="native")
        gated(exclude_modules=["gate"]).save(tmp_path / "without")
        gated(vector_length=12).save(tmp_path / "none_fits")
    assert read_json(tmp_path / "without" / "adapter_config.json")["peft_type"] == "VBLORA"
