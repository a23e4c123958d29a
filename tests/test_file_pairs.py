"""A directory's two files belong together, and what is replaced keeps its mode, its link and its bank."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch
from torch import nn

import vblora
from vblora import container
from vblora.io import read_json, write_json


def make(alpha: float) -> vblora.Adapter:
    settings = vblora.TiedLoRAConfig(r=2, lora_alpha=alpha, target_modules=["0", "1"])
    adapter = vblora.attach(base(), settings, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(alpha)
    return adapter


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def test_settings_of_another_save_are_refused(tmp_path):
    for name, alpha in (("a", 2.0), ("b", 64.0)):
        make(alpha).save(tmp_path / name)
    (tmp_path / "b" / "adapter_config.json").replace(tmp_path / "a" / "adapter_config.json")
    with pytest.raises(ValueError, match="does not belong to the adapter_config"):
        vblora.load(base(), tmp_path / "a")


def state(directory):
    """Which of `make`'s adapters this directory holds, all of it: the value is in its settings and in its numbers."""
    adapter = vblora.load(base(), directory)
    assert all((parameter == adapter.config.lora_alpha).all() for parameter in adapter.parameters())
    return adapter.config.lora_alpha


def killed_at(event, directory, alpha):
    """Another process saves, and ends at this of its file events; whether it came to it."""
    adapter, count = make(alpha), 0
    pid = os.fork()
    if pid == 0:

        def count_events(name, _):
            nonlocal count
            if name in ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "os.listdir"):
                count += 1
                if count > event:
                    os._exit(9)

        sys.addaudithook(count_events)
        adapter.save(directory)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_a_save_killed_at_any_file_event_leaves_one_of_the_two_adapters(tmp_path):
    found, event, before = [], 0, 2.0
    make(before).save(tmp_path)
    while killed_at(event, tmp_path, before + 1):
        now = state(tmp_path)
        assert now in (before, before + 1)
        found.append(now == before)
        before, event = now, event + 1
    assert state(tmp_path) == before + 1 and len(found) > 10 and not all(found)
    make(64.0).save(tmp_path)
    assert state(tmp_path) == 64.0 and read_json(tmp_path / "adapter_config.json")["lora_alpha"] == 64.0
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_save_after_a_killed_one_that_fails_leaves_the_adapter(tmp_path, monkeypatch):
    make(2.0).save(tmp_path)
    event = 0
    while killed_at(event, tmp_path, 3.0) and state(tmp_path) == 2.0:
        event += 1  # up to the tensors in their place, and the settings not yet
    assert read_json(tmp_path / "adapter_config.json")["lora_alpha"] == 2.0

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(container, "write", full)
    with pytest.raises(OSError, match="no space"):
        make(4.0).save(tmp_path)
    assert state(tmp_path) == 3.0


def test_readers_and_writers_at_once_see_whole_adapters(tmp_path):
    make(2.0).save(tmp_path)

    def write(alpha):
        adapter = make(alpha)
        for _ in range(20):
            adapter.save(tmp_path)

    writers = [threading.Thread(target=write, args=(alpha,)) for alpha in (3.0, 4.0)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(state(tmp_path))
    assert seen <= {2.0, 3.0, 4.0}
    assert read_json(tmp_path / "adapter_config.json")["lora_alpha"] == state(tmp_path) != 2.0


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
