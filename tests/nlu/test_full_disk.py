"""A disk that is full, or a folder that is read-only: one line, what was there stays, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from language_helpers import save_tiny_llama
from transformers import AutoModelForCausalLM

import run_glue
import vblora
from vblora import cli, io
from vblora.files import packed
from vblora_experiments import commands

SIZES = ["--num_vectors", "10", "--vector_length", "16", "--topk", "2", "--method", "vblora"]


def fill(disk: Path, left: int) -> None:
    """Fill it up but for so many bytes."""
    with (disk / "filling").open("wb", buffering=0) as file:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        file.write(b"x" * (free - left))


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def names(disk: Path) -> list[str]:
    return sorted(str(path.relative_to(disk)) for path in disk.rglob("*") if path.name != "filling")


def an_adapter(folder: Path, seed: int = 1) -> vblora.Adapter:
    model = AutoModelForCausalLM.from_pretrained(folder)
    settings = {"num_vectors": 60, "vector_length": 16, "r": 8, "target_modules": "all-linear"}
    return vblora.attach(model, vblora.VBLoRAConfig(**settings), seed=seed)


@pytest.fixture
def llama(tmp_path):
    return save_tiny_llama(tmp_path / "llama")


@pytest.mark.parametrize("way", ["full", "read-only"])
def test_commands_end_with_one_line_and_leave_nothing(way, disk, llama, tmp_path, capsys):
    adapter = an_adapter(llama)
    adapter.save(tmp_path / "adapter")
    for name in ("old.safetensors", "new.safetensors"):
        an_adapter(llama, 2).pack((disk if name[0] == "o" else tmp_path) / name)
    old, before = (disk / "old.safetensors").read_bytes(), names(disk)
    fill(disk, 4096) if way == "full" else read_only(disk)
    model, source = str(llama), str(tmp_path / "adapter")
    for command in (
        ["pack", source, str(disk / "old.safetensors")],
        ["pack", source, str(disk / "shared.safetensors"), "--bank", "shared"],
        ["unpack", str(tmp_path / "new.safetensors"), str(disk / "unpacked" / "here")],
        ["export", str(tmp_path / "new.safetensors"), str(disk / "exported" / "here")],
        ["export", model, str(disk / "exported"), "--adapter", source],
        ["merge", model, str(disk / "merged" / "here"), "--adapter", source],
    ):
        capsys.readouterr()
        assert cli.main(command) == 2, command
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert (line.startswith("vblora: error: ") and str(disk) in line) or "space" in line or "Read-only" in line
        assert names(disk) == before, command
    assert (disk / "old.safetensors").read_bytes() == old


def test_a_new_bank_goes_where_its_adapter_cannot_be_written_and_an_old_one_stays(llama, tmp_path, monkeypatch):
    adapter = an_adapter(llama)
    real = packed.replacing

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "replacing", full)
    with pytest.raises(OSError, match="No space"):
        adapter.pack(tmp_path / "packed" / "a.safetensors", bank="shared")
    assert not (tmp_path / "packed").exists()
    monkeypatch.setattr(packed, "replacing", real)
    adapter.pack(tmp_path / "packed" / "a.safetensors", bank="shared")
    monkeypatch.setattr(packed, "replacing", full)
    with pytest.raises(OSError, match="No space"):
        adapter.pack(tmp_path / "packed" / "b.safetensors", bank="shared")
    monkeypatch.undo()
    assert torch.equal(packed.read(tmp_path / "packed" / "a.safetensors").tensors["vector_bank"], adapter.vector_bank)


def test_training_on_a_full_disk_ends_with_one_line_and_goes_on_later(disk, encoder, data, monkeypatch, capsys):
    flags = ["--model_name_or_path", str(encoder), "--data_dir", str(data), "--task", "cola", "--use_cpu", "true"]
    flags += ["--num_train_epochs", "2", "--disable_tqdm", "true", "--output_dir", str(disk / "run"), *SIZES]
    monkeypatch.setattr("sys.argv", ["run_glue.py", *flags])
    for left in (20_000, 60_000, 120_000):  # of some 150 kB that a checkpoint has
        fill(disk, left)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.run(run_glue.main, "run_glue")
        assert ended.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("run_glue: error: ") and ("No space" in last or "is the disk full" in last)
        parts = [folder for folder in disk.glob("run/checkpoint-*") if not (folder / "trainer_state.json").exists()]
        assert not parts and not any(name.endswith(".tmp") for name in names(disk))
        (disk / "filling").unlink()
    run_glue.main(flags)
    assert (disk / "run" / "record.json").exists()


def test_other_errors_of_writers_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), io.writing(tmp_path):
        raise RuntimeError("something else")
    for text in (
        "[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0",
        "Error while serializing: I/O error: No space left on device (os error 28)",
    ):
        with pytest.raises(OSError, match=f"{tmp_path.name} cannot be written: is the disk full"), io.writing(tmp_path):
            raise RuntimeError(text)
