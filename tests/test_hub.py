"""Adapters on the hub, against a server that speaks its protocol, and the cards that go with them."""

from __future__ import annotations

import json
import shutil
import sys

import peft
import pytest
import torch
import transformers
from core_helpers import adapt, build, make_batch, run
from hub_server import TOKEN

import vblora
from vblora.cli import main
from vblora.files.card import MARK, PLACE
from vblora.files.directory import opened
from vblora.io import read_tensors

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
NAME = "someone/tiny-adapter"
HEAD = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}


def changed(kind, **settings):
    """A model with an adapter, and head, that its base has not."""
    model = build(kind)
    adapter = adapt(model, kind=kind, **settings)
    with torch.no_grad():
        for parameter in (p for module in adapter.saved.values() for p in module.parameters()):
            parameter.add_(0.5)
    return adapter


def blocks(card):
    return [part.split("```")[0] for part in card.split("```python\n")[1:]]


def executed(code, model):
    """What a card's code makes `adapter` and `model`, with a base model of one's own."""
    names = {}
    exec(code.replace("...  # the base model", "BASE"), {"BASE": model}, names)
    return names


# --- Cards ------------------------------------------------------------------------------------------------------------


def test_a_card_says_what_the_adapter_is_and_nothing_of_this_machine(tmp_path):
    from huggingface_hub import ModelCard

    adapter = changed("bert", **HEAD)
    base = tmp_path / "base"
    adapter.home[0].config._name_or_path = str(base)
    base.mkdir()
    adapter.save(tmp_path / "one")
    adapter.save(tmp_path / "two")
    text = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert text == (tmp_path / "two" / "README.md").read_text(encoding="utf-8") and str(tmp_path) not in text
    adapter.home[0].config._name_or_path = "someone/base"
    adapter.save(tmp_path / "one")
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert card.data.base_model == "someone/base" and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.tags == ["vblora", "base_model:adapter:someone/base"]
    tensors, _ = read_tensors(tmp_path / "one" / "adapter_model.safetensors")
    heads = {name: t for name, t in tensors.items() if "classifier" in name}
    numbers = sum(t.numel() for t in tensors.values()) - sum(t.numel() for t in heads.values())
    assert f"| numbers in the file | {numbers:,} (" in card.text and f"| {adapter.head_parameters():,} (" in card.text
    assert f"| stored parameters | {adapter.stored_parameters().parameters:,}," in card.text


@pytest.mark.parametrize(("kind", "method"), [("bert", "vblora"), ("llama", "vblora"), ("stack", "tied_lora")])
def test_the_code_of_a_card_loads_the_adapter(tmp_path, kind, method):
    base = build(kind)
    if kind != "stack":
        base.save_pretrained(tmp_path / "base")
    model = build(kind)
    model.config = getattr(base, "config", None)
    adapter = adapt(model, method, kind)
    if kind != "stack":
        model.config._name_or_path = "some-base"
    adapter.save(tmp_path / "adapter")
    codes = blocks((tmp_path / "adapter" / "README.md").read_text(encoding="utf-8"))
    assert len(codes) == (2 if method == "vblora" else 1)
    batch = make_batch(kind)
    for code in codes:
        code = code.replace("some-base", str(tmp_path / "base")).replace(PLACE, str(tmp_path / "adapter"))
        loaded = executed(code, build(kind))["model"]
        assert (run(loaded.eval(), batch) - run(model, batch)).abs().max() < 1e-5


def test_somebody_elses_card_is_left_alone_and_ours_is_written_anew(tmp_path):
    adapter = changed("bert", **HEAD)
    adapter.save(tmp_path)
    card = tmp_path / "README.md"
    before = card.read_text()
    card.write_text(before.replace(MARK, ""))
    adapter.save(tmp_path)
    assert card.read_text() == before.replace(MARK, "")
    card.write_text(f"{MARK}\nold\n")
    adapter.save(tmp_path, card=False)
    assert card.read_text() == f"{MARK}\nold\n"
    adapter.save(tmp_path)
    assert card.read_text() == before


def test_a_card_that_cannot_be_written_leaves_the_adapter_as_it_was(tmp_path):
    adapter = changed("bert", **HEAD)
    (tmp_path / "README.md").mkdir()
    with pytest.raises(ValueError, match=r"README\.md is a folder, where the model card is to be written"):
        adapter.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    adapter.save(tmp_path, card=False)
    vblora.load(build("bert"), tmp_path)


# --- PEFT's classes by task -------------------------------------------------------------------------------------------


def small(kind, **settings):
    widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = {**widths, "vocab_size": 50, "initializer_range": 0.2, **settings}
    torch.manual_seed(0)
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        ).eval()
    return getattr(transformers, kind)(transformers.BertConfig(**bert)).eval()


@pytest.mark.parametrize(
    ("kind", "auto", "head"),
    [
        ("BertForSequenceClassification", "AutoPeftModelForSequenceClassification", "classifier"),
        ("BertForTokenClassification", "AutoPeftModelForTokenClassification", "classifier"),
        ("BertForQuestionAnswering", "AutoPeftModelForQuestionAnswering", "qa_outputs"),
        ("BertLMHeadModel", "AutoPeftModelForCausalLM", None),
        ("t5", "AutoPeftModelForSeq2SeqLM", None),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_pefts_class_for_the_task_loads_it(tmp_path, kind, auto, head, lora):
    small(kind).save_pretrained(tmp_path / "base")
    model = type(small(kind)).from_pretrained(tmp_path / "base").eval()
    config = vblora.VBLoRAConfig(
        r=2,
        num_vectors=12,
        vector_length=8,
        target_modules=["q", "v"] if kind == "t5" else ["query", "value"],
        modules_to_save=head and [head],
        init_vector_bank_bound=0.6,
    )
    adapter = vblora.attach(model, config, seed=1)
    with torch.no_grad():
        for parameter in (p for module in adapter.saved.values() for p in module.parameters()):
            parameter.add_(0.5)
    adapter.export_lora(tmp_path / "adapter") if lora else adapter.save(tmp_path / "adapter")
    theirs = getattr(peft, auto).from_pretrained(str(tmp_path / "adapter")).eval()
    batch = make_batch("bert")
    batch |= {"decoder_input_ids": batch["input_ids"]} if kind == "t5" else {}
    with adapter.disabled():
        base = model(**batch)[0]
    ours = model(**batch)[0]
    assert (ours - base).abs().max() > 1e-3 and (theirs(**batch)[0] - ours).abs().max() < 1e-5


def test_no_task_is_named_where_peft_would_look_for_a_head_in_the_file(tmp_path):
    model = build("bert")
    adapt(model, kind="bert").save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    theirs = peft.PeftModel.from_pretrained(build("bert"), str(tmp_path)).eval()
    batch = make_batch("bert")
    assert (run(theirs, batch) - run(model, batch)).abs().max() < 1e-5


# --- The hub ----------------------------------------------------------------------------------------------------------


def test_an_adapter_is_pushed_and_loaded_by_its_name_revision_and_subfolder(hub):
    adapter = changed("bert", **HEAD)
    batch, expected = make_batch("bert"), []
    for place in ({}, {"revision": "second"}, {"subfolder": "a/b"}, {"revision": "second", "subfolder": "c"}):
        with torch.no_grad():
            adapter.vector_bank.mul_(1.5)
        address = adapter.push_to_hub(NAME, commit_message="one more", **place)
        assert address.startswith(f"{hub.endpoint}/{NAME}/commit/")
        expected.append((place, run(adapter.home[0], batch)))
    for place, output in expected:
        model = build("bert")
        vblora.load(model, NAME, **place)
        assert (run(model, batch) - output).abs().max() < 1e-5
        theirs = peft.PeftModel.from_pretrained(build("bert"), NAME, **place).eval()
        assert (run(theirs, batch) - output).abs().max() < 1e-5
    assert sorted(hub.files(NAME)) == sorted([".gitattributes", *FILES, *(f"a/b/{file}" for file in FILES)])
    assert b"one more" in b"".join(hub.bodies)
    card = hub.files(NAME, "second")["c/README.md"].decode()
    assert f'"{NAME}", revision="second", subfolder="c")' in card and PLACE not in card
    sha = hub.repositories["models", NAME].branches["second"]
    vblora.load(build("bert"), NAME, revision=sha, subfolder="c")


def test_a_method_in_our_own_format_goes_there_and_back(hub):
    model, other = build("stack"), build("stack")
    adapt(model, "lora_xs").push_to_hub(NAME)
    vblora.load(other, NAME)
    assert (run(other, make_batch("stack")) - run(model, make_batch("stack"))).abs().max() < 1e-6


def test_inspect_reads_the_hub(hub, capsys):
    changed("bert", **HEAD).push_to_hub(NAME, revision="x", subfolder="y")
    assert main(["inspect", NAME, "--revision", "x", "--subfolder", "y"]) == 0
    assert "vblora, PEFT VBLoRA, topk form" in capsys.readouterr().out


def test_no_path_and_no_token_is_uploaded(hub, tmp_path):
    adapter = changed("bert", **HEAD)
    base = tmp_path / "secret-place"
    base.mkdir()
    adapter.home[0].config._name_or_path = str(base)
    adapter.push_to_hub(NAME, token=TOKEN, private=True)
    sent = b"".join(hub.bodies) + b"".join(hub.files(NAME).values())
    assert TOKEN.encode() not in sent and b"secret-place" not in sent
    assert hub.repositories["models", NAME].private
    for name, data in hub.files(NAME).items():
        (tmp_path / name).write_bytes(data)
    with opened(tmp_path) as found:
        found.tensors()  # and the checksum is the file's
        assert found.settings["base_model_name_or_path"] is None and not found.interrupted


def test_somebody_elses_card_on_the_hub_is_left_alone(hub):
    hub.add(NAME, {"README.md": b"# Mine\n"})
    changed("bert", **HEAD).push_to_hub(NAME)
    assert hub.files(NAME)["README.md"] == b"# Mine\n" and FILES[2] in hub.files(NAME)
    hub.add("someone/other", {"README.md": f"{MARK}\nold".encode()})
    changed("bert", **HEAD).push_to_hub("someone/other")
    assert len(hub.files("someone/other")["README.md"]) > 1000


def refused(match, name=NAME, **place):
    model = build("bert")
    before = set(vars(model)) | set(model._modules)
    with pytest.raises(ValueError, match=match) as raised:
        vblora.load(model, name, **place)
    assert "\n" not in str(raised.value) and TOKEN not in str(raised.value)
    assert set(vars(model)) | set(model._modules) == before


def test_what_the_hub_does_not_give_is_one_sentence(hub, monkeypatch):
    adapter = changed("bert", **HEAD)
    adapter.push_to_hub(NAME, private=True)
    refused("someone/nothing is no folder here, and on the hub there is none, or it is private", "someone/nothing")
    refused("someone/tiny-adapter has no revision 'nope' on the hub", revision="nope")
    refused("there is no adapter in x of someone/tiny-adapter on the hub", subfolder="x")
    hub.add("someone/model", {"config.json": b"{}"})
    refused("there is no adapter in someone/model on the hub", "someone/model")
    hub.add("someone/broken", {FILES[1]: b"{}", FILES[2]: b"12345678"})
    refused(r"adapter_model\.safetensors is no whole safetensors file", "someone/broken")
    monkeypatch.setenv("HF_TOKEN", "")
    refused("or it is private and the token")
    for repository in (NAME, "someone/new"):
        with pytest.raises(ValueError, match=f"^{repository}") as raised:
            adapter.push_to_hub(repository)
        assert "\n" not in str(raised.value)
    assert ("models", "someone/new") not in hub.repositories
    with pytest.raises(ValueError, match=r"'a/b/c' is no name of a repository on the hub"):
        adapter.push_to_hub("a/b/c")
    with pytest.raises(ValueError, match="form is one of"):
        adapter.push_to_hub("someone/new", form="half", token=TOKEN)
    assert ("models", "someone/new") not in hub.repositories


def test_a_hub_out_of_reach_gives_what_was_fetched_before(hub, monkeypatch):
    from huggingface_hub import constants

    changed("bert", **HEAD).push_to_hub(NAME)
    vblora.load(build("bert"), NAME)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    vblora.load(build("bert"), NAME)
    refused("the hub cannot be reached and its cache has no copy", "someone/other")
    with pytest.raises(ValueError, match="someone/tiny-adapter: the hub cannot be reached"):
        changed("bert", **HEAD).push_to_hub(NAME)


def test_paths_are_paths_and_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = changed("bert", **HEAD)
    adapter.save("runs/here")
    vblora.load(build("bert"), "runs/here")
    vblora.load(build("bert"), "runs", subfolder="here")
    refused(r"runs/here is a path here, and a revision \(x\) is of a repository", "runs/here", revision="x")
    refused("does not exist: name the folder", str(tmp_path / "nothing"))
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("runs/here is no folder here, and to look for it on the hub takes huggingface_hub", "runs/here")
