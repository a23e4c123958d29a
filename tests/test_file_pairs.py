"""A directory's two files belong together, and what is replaced keeps its mode, its link and its bank."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import vblora
from vblora.io import read_json, write_json


def make(alpha: float) -> vblora.Adapter:
    settings = vblora.TiedLoRAConfig(r=2, lora_alpha=alpha, target_modules=["0", "1"])
    return vblora.attach(base(), settings, seed=1)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def test_settings_of_another_save_are_refused(tmp_path):
    for name, alpha in (("a", 2.0), ("b", 64.0)):
        make(alpha).save(tmp_path / name)
    (tmp_path / "b" / "adapter_config.json").replace(tmp_path / "a" / "adapter_config.json")
    with pytest.raises(ValueError, match="does not belong to the adapter_config"):
        vblora.load(base(), tmp_path / "a")


def test_changed_numbers_are_refused(tmp_path):
    make(2.0).save(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # another number, just as finite
    path.write_bytes(data)
    with pytest.raises(ValueError, match="or is damaged"):
        vblora.load(base(), tmp_path)


def test_a_private_file_stays_private_and_a_link_a_link(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    write_json(target, {})
    target.chmod(0o600)
    link.symlink_to("target.json")
    write_json(link, {"new": 1})
    assert link.is_symlink() and read_json(target) == {"new": 1} and target.stat().st_mode & 0o777 == 0o600


def test_a_huge_json_file_is_refused_by_its_size(tmp_path):
    path = tmp_path / "huge.json"
    path.write_bytes(b"{")
    os.truncate(path, 2**31)
    with pytest.raises(ValueError, match="2147483648 bytes"):
        read_json(path)


def test_a_damaged_shared_bank_is_written_again(tmp_path):
    config = vblora.VBLoRAConfig(r=2, num_vectors=6, vector_length=8, topk=2, target_modules=["0", "1"])
    adapter = vblora.attach(base(), config, seed=1)
    adapter.pack(tmp_path / "a.vblora.safetensors", bank="shared")
    bank = next(tmp_path.glob("*.bank.safetensors"))
    bank.write_bytes(bank.read_bytes()[:-40])
    adapter.pack(tmp_path / "a.vblora.safetensors", bank="shared")
    assert torch.equal(vblora.load(base(), tmp_path / "a.vblora.safetensors").vector_bank, adapter.vector_bank)


def test_a_setting_that_a_later_version_adds_leaves_the_checksum_what_it_was():
    from dataclasses import dataclass

    from vblora.files.directory import pair_checksum

    @dataclass(kw_only=True)
    class Later(vblora.VBLoRAConfig):
        added: int = 0

    tensors = {"vector_bank": torch.arange(6.0)}
    settings = {"target_modules": ["query"], "num_vectors": 12}
    now, later = vblora.VBLoRAConfig(**settings), Later(**settings)
    other = Later(**settings, added=1)
    assert pair_checksum(now, tensors, {}) == pair_checksum(later, tensors, {})
    assert pair_checksum(now, tensors, {}) != pair_checksum(other, tensors, {})
