"""Many adapters in one batch: each row as if its adapter alone were attached."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from functools import partial

import pytest
import torch
from language_helpers import tiny_llama
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import vblora

VOCABULARY = 61


def llama():
    return tiny_llama(VOCABULARY).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def bert():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **size)).eval()


def loud(adapter):
    """As after training: factors that change the output by much."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return adapter


def config(r, **more):
    more = {"target_modules": "all-linear", **more}
    return vblora.VBLoRAConfig(r=r, num_vectors=11, vector_length=16, topk=2, init_vector_bank_bound=0.5, **more)


SETTINGS = {
    "llama": (
        llama,
        {
            "one": config(4),
            "two": config(2, target_modules=["q_proj", "v_proj"]),
            "tied": vblora.TiedLoRAConfig(r=3, target_modules=["q_proj", "o_proj"]),
        },
    ),
    "gpt2": (
        gpt2,
        {
            "one": config(4),
            "two": config(2, target_modules=["c_attn", "c_fc"], split_modules={"c_attn": ["q", "k", "v"]}),
            "three": config(3, target_modules=["c_attn"]),
        },
    ),
    "bert": (
        bert,
        {
            "one": config(4, target_modules=["query", "value"], modules_to_save=["classifier"]),
            "two": config(2, target_modules=["query", "key"], modules_to_save=["pooler", "classifier"]),
            "three": config(1, target_modules=["value"]),
        },
    ),
}


@pytest.fixture(params=SETTINGS)
def served(request, tmp_path):
    """The bare model, a folder of packed adapters, and a function from a name to a model with that adapter alone."""
    make, configs = SETTINGS[request.param]
    for number, (name, of_name) in enumerate(configs.items()):
        model = make()
        adapter = loud(vblora.attach(model, of_name, seed=number))
        with torch.no_grad():
            for module in adapter.saved.values():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter))
        adapter.pack(tmp_path / f"{name}.safetensors")

    def alone(name):
        model = make()
        if name is not None:
            vblora.load(model, tmp_path / f"{name}.safetensors")
        return model.eval()

    return make(), tmp_path, alone, list(configs)


def ids(rows, length=7):
    return torch.randint(3, VOCABULARY, (rows, length))


@torch.no_grad()
def test_each_row_is_as_with_its_adapter_alone(served):
    model, folder, alone, known = served
    store = vblora.AdapterStore(model, folder)
    assert sorted(store.names()) == sorted(known) and len(store) == 3 and "one" in store
    names = [known[0], None, known[1], known[2], known[0], None]
    batch = ids(len(names))
    plain = model(input_ids=batch).logits
    with store.rows(names):
        mixed = model(input_ids=batch).logits
    for row, name in enumerate(names):
        single = alone(name)(input_ids=batch[row : row + 1]).logits[0]
        assert torch.allclose(mixed[row], single, atol=1e-5), name
        assert name is None or not torch.allclose(mixed[row], plain[row], atol=1e-4)
    assert torch.equal(model(input_ids=batch).logits, plain)  # after the block, the base model


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_each_adapter_alone(make, beams, tmp_path):
    for number, name in enumerate("ab"):
        adapter = loud(vblora.attach(make(), config(4), seed=number))
        adapter.pack(tmp_path / f"{name}.safetensors")
    model, names = make(), ["a", "b", None, "b"]
    store, batch = vblora.AdapterStore(model, tmp_path), ids(4)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 2}
    how["attention_mask"] = torch.ones_like(batch[:1])
    with store.rows(names):
        mixed = model.generate(batch, **how | {"attention_mask": torch.ones_like(batch)})
    for row, name in enumerate(names):
        single = make()
        if name is not None:
            vblora.load(single, tmp_path / f"{name}.safetensors")
        assert torch.equal(mixed[row], single.generate(batch[row : row + 1], **how)[0])
    assert not torch.equal(mixed[1, 7:], mixed[2, 7:])


@torch.no_grad()
def test_an_attached_adapter_and_the_store_add_up_and_half_precision_is_the_models(tmp_path):
    loud(vblora.attach(llama(), config(4), seed=1)).pack(tmp_path / "a.safetensors")
    model = llama()
    own = loud(vblora.attach(model, config(2), name="own", seed=2))
    both = copy.deepcopy(model)
    vblora.load(both, tmp_path / "a.safetensors")
    batch, store = ids(2), vblora.AdapterStore(model, tmp_path)
    with store.rows(["a", "a"]):
        assert torch.allclose(model(input_ids=batch).logits, both(input_ids=batch).logits, atol=1e-5)
    own.detach()
    half = model.to(torch.bfloat16)
    with store.rows(["a", None]):
        assert half(input_ids=batch).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_what_was_not_used_lately_is_dropped_and_comes_back(tmp_path):
    for number in range(5):
        loud(vblora.attach(llama(), config(2), seed=number)).pack(tmp_path / f"{number}.safetensors")
    model, batch = llama(), ids(1)
    store = vblora.AdapterStore(model, tmp_path, max_composed=2)
    first: dict[str, torch.Tensor] = {}
    for name in [*"01234", *"01234"]:
        with store.rows([name]):
            logits = model(input_ids=batch).logits
        assert torch.equal(first.setdefault(name, logits), logits)
        assert len(store._composed) <= 2
    with store.rows([*"01234"]):  # more at once than are kept
        model(input_ids=batch.expand(5, -1))
    assert list(store._composed) == ["3", "4"]
    assert store.resident_bytes() > 0
    store.close()
    assert not store.resident_bytes() and not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_adapters_may_be_kept_packed_in_memory(tmp_path):
    path = tmp_path / "a.safetensors"
    loud(vblora.attach(llama(), config(2), seed=0)).pack(path)
    model, batch = llama(), ids(2)
    store = vblora.AdapterStore(model)
    store.add("memory", path.read_bytes())
    store.add("disk", path)
    assert store.resident_bytes() == path.stat().st_size
    with store.rows(["memory", "disk"]):
        one, other = model(input_ids=batch[:1].expand(2, -1)).logits
    assert torch.equal(one, other)
    path.unlink()
    store.remove("memory")
    assert store.names() == ["disk"]


def test_wrong_use_is_named(tmp_path):
    model = llama()
    loud(vblora.attach(llama(), config(2), seed=0)).pack(tmp_path / "a.safetensors")
    vblora.attach(tiny_llama(VOCABULARY, width=64), config(2), seed=0).pack(tmp_path / "wide.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    store = vblora.AdapterStore(model, tmp_path)
    for names, message in (
        (["b"], "no adapter 'b'"),
        (["../a"], "no adapter"),
        ([], "a name, or None"),
        ("a", "a list of names"),
        (["broken"], "adapter 'broken'"),
        (["wide"], "adapter 'wide'"),
    ):
        with pytest.raises(ValueError, match=message), store.rows(names):
            pass
    with store.rows(["a", None]):
        with pytest.raises(ValueError, match="2 names, and the batch 3 rows"):
            model(input_ids=ids(3))
        with pytest.raises(ValueError, match="one batch at a time"), store.rows(["a"]):
            pass
        with pytest.raises(ValueError, match="is in use"):
            store.remove("a")
    with pytest.raises(ValueError, match="already"):
        store.add("a", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no such folder"):
        vblora.AdapterStore(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="max_composed"):
        vblora.AdapterStore(model, max_composed=-1)
    with torch.no_grad(), store.rows(["a", None]):
        model(input_ids=ids(2))  # all is as it was


def run_all(works):
    """Every work in a thread of its own, at once; what went wrong in them."""
    wrong = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_threads_get_their_own_adapters_and_heads_and_others_the_base_model(served):
    model, folder, alone, known = served
    store = vblora.AdapterStore(model, folder, max_composed=0)  # composed and dropped again all the time
    batch = ids(2)
    with torch.no_grad():
        expected = {name: alone(name)(input_ids=batch).logits for name in (*known, None)}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def ask(name):
        for _ in range(15):
            with store.rows([name, name]) if name else contextlib.nullcontext(), torch.no_grad():
                torch.testing.assert_close(model(input_ids=batch).logits, expected[name], rtol=1e-4, atol=1e-5)

    try:
        assert run_all([partial(ask, name) for name in expected]) == []
    finally:
        sys.setswitchinterval(before)
    assert store.resident_bytes() == 0


def test_an_adapter_that_another_thread_uses_is_not_removed(served):
    model, folder, _, _ = served
    store = vblora.AdapterStore(model, folder)
    with store.rows(["one"]):
        (error,) = run_all([lambda: store.remove("one")])
    assert "in use" in str(error)


@torch.no_grad()
def test_a_replaced_file_is_read_again(served):
    model, folder, alone, _ = served
    store, batch = vblora.AdapterStore(model, folder), ids(1)
    with store.rows(["one"]):
        first = model(input_ids=batch).logits
    new = folder / "new"
    new.write_bytes((folder / "two.safetensors").read_bytes())
    new.replace(folder / "one.safetensors")
    with store.rows(["one"]):
        second = model(input_ids=batch).logits
    torch.testing.assert_close(second, alone("two")(input_ids=batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder, private = tmp_path / "adapters", tmp_path / "private"
    folder.mkdir()
    vblora.attach(llama(), config(2)).pack(private)
    (folder / "one.safetensors").symlink_to(private)
    store = vblora.AdapterStore(llama(), folder)
    with pytest.raises(ValueError, match="link out of the folder"), store.rows(["one"]):
        pass
    store.add("other", private)  # what is named by its path may lie anywhere
    with store.rows(["other"]):
        assert store.resident_bytes() > 0


def test_what_a_failed_batch_composed_is_let_go(served):
    model, folder, _, _ = served
    store = vblora.AdapterStore(model, folder, max_composed=0)
    with pytest.raises(ValueError, match="no adapter 'nobody'"), store.rows(["one", "nobody"]):
        pass
    assert store.resident_bytes() == 0


def test_a_batch_that_ends_in_an_error_leaves_no_more_adapters_than_any_other(tmp_path):
    make, configs = SETTINGS["llama"]
    model = make()
    adapter = loud(vblora.attach(model, configs["two"], seed=0))
    names = [f"user{i}" for i in range(9)]
    for name in names:
        adapter.pack(tmp_path / f"{name}.safetensors")
    adapter.detach()
    store = vblora.AdapterStore(model, tmp_path, max_composed=2)
    with pytest.raises(RuntimeError, match="of the batch"), store.rows(names):
        raise RuntimeError("of the batch")
    assert len(store._composed) == 2
    with pytest.raises(ValueError, match="no adapter 'nobody'"), store.rows([*names, "nobody"]):
        pass
    assert len(store._composed) == 2


@torch.no_grad()
def test_what_the_folder_holds_later_is_found_and_what_is_gone_forgotten(served):
    model, folder, alone, known = served
    store, batch = vblora.AdapterStore(model, folder), ids(1)
    store.add("mine", (folder / "one.safetensors").read_bytes())
    with store.rows(["two"]):
        (folder / "late.vblora.safetensors").write_bytes((folder / "two.safetensors").read_bytes())
        (folder / "mine.safetensors").write_bytes(b"of the folder: what was added by hand stays")
        (folder / "two.safetensors").unlink()
        store.refresh()
    assert sorted(store.names()) == sorted(["late", "mine", "one", known[2]]) and store.composed() == 0
    with store.rows(["late"]):
        late = model(input_ids=batch).logits
    (folder / "two.safetensors").write_bytes((folder / "late.vblora.safetensors").read_bytes())
    torch.testing.assert_close(late, alone("two")(input_ids=batch).logits, rtol=1e-4, atol=1e-5)
    with store.rows(["mine"]):
        mine = model(input_ids=batch).logits
    torch.testing.assert_close(mine, alone("one")(input_ids=batch).logits, rtol=1e-4, atol=1e-5)
    folder.rename(folder.with_name(f"{folder.name}_elsewhere"))
    with pytest.raises(ValueError, match="no such folder"):
        store.refresh()
    assert "late" in store


@torch.no_grad()
def test_what_is_kept_has_a_bound_in_bytes(tmp_path):
    for number in range(4):
        loud(vblora.attach(llama(), config(2), seed=number)).pack(tmp_path / f"{number}.safetensors")
    store = vblora.AdapterStore(llama(), tmp_path)
    with store.rows(["0"]):
        pass
    size = store.resident_bytes()
    store = vblora.AdapterStore(store.model, tmp_path, max_bytes=2 * size + 1)
    with store.rows([*"0123"]):
        pass
    assert list(store._composed) == ["2", "3"] and store.resident_bytes() == 2 * size
    small = vblora.AdapterStore(store.model, tmp_path, max_bytes=size - 1)
    with pytest.raises(ValueError, match=f"adapter '0': it takes {size:,} bytes"), small.rows(["0"]):
        pass
    with pytest.raises(ValueError, match="max_bytes must be at least 0"):
        vblora.AdapterStore(store.model, max_bytes=-1)


def test_an_adapter_is_checked_without_being_kept(served):
    model, folder, _, known = served
    seen = []
    store = vblora.AdapterStore(model, folder, strict_base=True, check=lambda content: seen.append(content.config.r))
    assert store.check(known[0]).config.r == seen[0] and store.composed() == 0
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        store.check("nobody")

    def refuse(content):
        raise ValueError("it is not wanted")

    refusing = vblora.AdapterStore(model, folder, check=refuse)
    for ask in (refusing.check, lambda name: refusing.rows([name]).__enter__()):
        with pytest.raises(ValueError, match=f"adapter '{known[0]}': it is not wanted"):
            ask(known[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    other = vblora.AdapterStore(model, folder, strict_base=True)
    with pytest.raises(ValueError, match="another base model"):
        other.check(known[0])


@torch.no_grad()
def test_a_head_of_fewer_labels_has_nan_for_the_others(tmp_path):
    def narrow(labels):
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=labels, **size)).eval()

    few = loud(vblora.attach(narrow(2), config(2, target_modules=["query"], modules_to_save=["classifier"])))
    few.pack(tmp_path / "few.safetensors")
    model, alone, batch = narrow(3), narrow(2), ids(1)
    vblora.load(alone, tmp_path / "few.safetensors")
    with pytest.raises(ValueError, match=r"classifier\.\w+ has shape"):
        vblora.AdapterStore(model, tmp_path).check("few")
    with vblora.AdapterStore(model, tmp_path, shorter=("classifier.weight", "classifier.bias")).rows(["few"]):
        found = model(input_ids=batch).logits[0]
    torch.testing.assert_close(found[:2], alone(input_ids=batch).logits[0], rtol=1e-4, atol=1e-5)
    assert found[2].isnan()
    with pytest.raises(ValueError, match=r"classifier\.bias has shape"):
        vblora.AdapterStore(model, tmp_path, shorter=("classifier.weight",)).check("few")
    with pytest.raises(ValueError, match=r"classifier\.\w+ has shape"):
        vblora.AdapterStore(narrow(1), tmp_path, shorter=("classifier.weight", "classifier.bias")).check("few")
    names = ("classifier.weight", "classifier.bias")
    store, wanted = (
        vblora.AdapterStore(model, shorter=names),
        dict(zip(names, (torch.ones(3, 4), torch.ones(3)), strict=True)),
    )
    with pytest.raises(ValueError, match="differ in their numbers of labels"):
        store._as_long({**wanted, names[0]: torch.ones(2, 4)}, wanted)
