"""Files are written whole or not at all, leave nothing behind, and are the same bytes for the same content."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch
from safetensors import safe_open

from vblora import container
from vblora.io import alone_in, is_being_replaced, new_directory, read_tensors, replacing, write_json, write_tensors

TENSORS = {
    "a": torch.arange(6.0).view(2, 3).T,
    "b": torch.tensor([True, False]),
    "c": torch.tensor(3, dtype=torch.int64),
    "d": torch.zeros(0, 4, dtype=torch.bfloat16),
}
METADATA = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}


def killed_within(block, path):
    """Another process enters the block, writes something, and ends at once."""
    pid = os.fork()
    if pid == 0:
        with block(path) as temporary:
            (temporary / "part" if temporary.is_dir() else temporary).write_bytes(b"half")
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_the_same_content_is_the_same_bytes_and_reads_everywhere(tmp_path):
    for name in "xy":
        write_tensors(tmp_path / name, TENSORS, dict(reversed(METADATA.items())) if name == "y" else METADATA)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    tensors, metadata = read_tensors(tmp_path / "x")
    assert metadata == {"format": "pt", **METADATA}
    with safe_open(tmp_path / "x", framework="pt") as theirs:
        assert theirs.metadata() == metadata
        for name, tensor in TENSORS.items():
            for read in (tensors[name], theirs.get_tensor(name)):
                assert read.dtype == tensor.dtype and torch.equal(read, tensor)


@pytest.mark.parametrize("name", ["plain", "n" * 255, "漢" * 85, os.fsdecode(b"\xff\xfe"), "[a-z]*"])
@pytest.mark.parametrize("block", [replacing, new_directory])
def test_what_a_killed_process_left_goes_with_the_next_write(block, name, tmp_path):
    path = tmp_path / name
    (tmp_path / ".another.settings").write_text("stays")
    killed_within(block, path)
    assert len(list(tmp_path.iterdir())) == 2 and is_being_replaced(path)
    with block(path) as temporary:
        (temporary / "part" if temporary.is_dir() else temporary).write_bytes(b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted([".another.settings", name])


def test_what_a_living_one_writes_is_left_alone(tmp_path):
    path = tmp_path / "file.json"
    with replacing(path) as first:
        first.write_text("first")
        write_json(path, {"second": 2})
        assert first.exists() and path.exists()
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("block", [replacing, new_directory])
def test_a_write_that_fails_takes_the_folders_away_that_it_made(block, tmp_path):
    with pytest.raises(OSError, match="full"), block(tmp_path / "new" / "folders" / "x"):
        raise OSError(errno.ENOSPC, "full")
    assert not any(tmp_path.iterdir())


def test_a_file_and_its_name_are_on_the_disk_when_it_is_announced(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert flushed == [str(temporary), str(tmp_path)]


def test_one_at_a_time_in_a_folder(tmp_path):
    order = []

    def second():
        with alone_in(tmp_path / "folder"):
            order.append("second")

    other = threading.Thread(target=second)
    with alone_in(tmp_path / "folder"):
        other.start()
        other.join(timeout=0.2)
        order.append("first")
    other.join()
    assert order == ["first", "second"] and not any((tmp_path / "folder").iterdir())


def test_a_large_file_of_others_is_refused_by_its_header(tmp_path):
    """Nothing but the header is read: 3 GiB that take no room on the disk."""
    path = tmp_path / "large"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    os.truncate(path, 3 * 2**30)
    with pytest.raises(ValueError, match="3221225462 bytes of data, and its header describes 0"):
        read_tensors(path)


def test_a_type_that_is_not_written_is_refused_by_the_name_of_its_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"head\.x is of type torch.complex64"):
        write_tensors(tmp_path / "x", {"head.x": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not any(tmp_path.iterdir())


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.arange(100_000.0)}, {})
    with container.opened(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 5000)
        with pytest.raises(ValueError, match="a ends too early"):
            file.tensors()
