"""One bank for many adapters: frozen in training, in a file of its own when packed."""

from __future__ import annotations

import pytest
import torch
from language_helpers import tiny_llama

import vblora
from vblora.cli import main as command
from vblora.files import packed, shared_bank
from vblora.files.reading import read_bank
from vblora.methods.given_bank import use_bank

CONFIG = {"r": 2, "num_vectors": 20, "vector_length": 16, "topk": 2, "target_modules": ["q_proj", "v_proj"]}


def trained(folder, seed, bank_from=None):
    """A model, its adapter after some steps, and the adapter's folder."""
    model = tiny_llama(61)
    adapter = vblora.attach(model, vblora.VBLoRAConfig(**CONFIG), seed=seed)
    rates = {"lr_vector_bank": 1e-2, "lr_logits": 1e-1}
    if bank_from is not None:
        use_bank(adapter, bank_from)
        del rates["lr_vector_bank"]
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-3, **rates))
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
    losses = []
    for _ in range(10):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    adapter.save(folder)
    return model.eval(), adapter


@pytest.fixture
def two(tmp_path):
    """Two tasks on the first one's bank."""
    _, first = trained(tmp_path / "first", 1)
    model, second = trained(tmp_path / "second", 2, bank_from=tmp_path / "first")
    return first, second, model


def test_a_further_adapter_is_its_indices_and_weights(two, tmp_path):
    first, second, model = two
    assert torch.equal(first.vector_bank, second.vector_bank)
    folder = tmp_path / "packed"
    sizes = [a.pack(folder / f"{n}.safetensors", bank="shared", weights=8) for n, a in (("a", first), ("b", second))]
    whole = second.pack(tmp_path / "whole.safetensors", weights=8)
    files = sorted(path.name for path in folder.iterdir())
    (bank,) = [name for name in files if name.endswith(".bank.safetensors")]
    assert sorted(files) == sorted(["a.safetensors", "b.safetensors", bank])
    assert bank == shared_bank.file_of(shared_bank.key_of(first.vector_bank))
    assert max(sizes) < whole - 20 * 16 * 3  # some of the bank's bytes deflate
    other = tiny_llama(61).eval()
    vblora.load(other, folder / "b.safetensors")
    ids = torch.randint(3, 61, (2, 9))
    with torch.no_grad():
        assert torch.allclose(other(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-2)
    assert packed.read(folder / "b.safetensors").stored["vector_bank"] == ("shared", 0)


def test_the_store_reads_the_bank_of_its_folder(two, tmp_path):
    first, second, _ = two
    folder = tmp_path / "packed"
    for name, adapter in (("a", first), ("b", second)):
        adapter.pack(folder / f"{name}.safetensors", bank="shared")
    model, ids = tiny_llama(61).eval(), torch.randint(3, 61, (1, 9))
    store = vblora.AdapterStore(model, folder)
    store.add("memory", (folder / "b.safetensors").read_bytes())
    assert store.names() == ["a", "b", "memory"]
    with store.rows(["a", "b", "memory"]), torch.no_grad():
        a, b, memory = model(input_ids=ids.expand(3, -1)).logits
    assert torch.equal(b, memory) and not torch.allclose(a, b, atol=1e-3)


def test_commands_read_and_write_shared_banks(two, tmp_path, capsys):
    file = tmp_path / "packed" / "b.safetensors"
    assert command(["pack", str(tmp_path / "second"), str(file), "--bank", "shared"]) == 0
    assert command(["inspect", str(file)]) == 0 and "shared" in capsys.readouterr().out
    assert command(["unpack", str(file), str(tmp_path / "again")]) == 0
    assert torch.equal(read_bank(tmp_path / "again"), two[0].vector_bank)
    assert torch.equal(read_bank(file), two[0].vector_bank)


def test_a_missing_or_other_bank_is_named(two, tmp_path):
    _, second, _ = two
    file = tmp_path / "packed" / "b.safetensors"
    second.pack(file, bank="shared")
    (bank,) = file.parent.glob("*.bank.safetensors")
    with pytest.raises(ValueError, match=f"shared and in another file, called {bank.name}"):
        packed.loads(file.read_bytes())
    with torch.no_grad():
        second.vector_bank.add_(1)
    second.pack(tmp_path / "other" / "b.safetensors", bank="shared")
    (other,) = (tmp_path / "other").glob("*.bank.safetensors")
    bank.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match="does not hold the bank that its name says"):
        packed.read(file)
    bank.unlink()
    with pytest.raises(ValueError, match=f"{bank.name} does not exist"):
        packed.read(file)


def test_only_vblora_has_a_bank_to_share(tmp_path):
    adapter = vblora.attach(tiny_llama(61), vblora.TiedLoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="tied_lora has no bank to share"):
        adapter.pack(tmp_path / "a.safetensors", bank="shared")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "F" * 64, "0" * 63, 5])
def test_keys_are_hexadecimal(key):
    assert not shared_bank.is_key(key)


def test_a_frozen_bank_with_one_vector_to_a_sub_vector_is_refused(two, tmp_path):
    adapter = vblora.attach(tiny_llama(61), vblora.VBLoRAConfig(**{**CONFIG, "topk": 1}), seed=3)
    before = adapter.vector_bank.clone()
    with pytest.raises(ValueError, match="topk 1 with a frozen bank leaves nothing of it to train"):
        use_bank(adapter, tmp_path / "first")
    assert torch.equal(adapter.vector_bank, before) and adapter.vector_bank.requires_grad
