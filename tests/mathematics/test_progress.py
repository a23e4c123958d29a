"""The file of texts that an interrupted run goes on from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vblora_experiments import progress
from vblora_experiments.progress import Progress, alone, append

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"a": 1}
FIRST = json.dumps(SETTINGS).encode() + b"\n"
ENTRY = b'{"number": 3, "text": "x"}\n'


def full(_):
    raise OSError(28, "No space left on device")


def test_texts_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    texts = {0: "", 7: "é \u2028 \ud800\n", 3: "x"}
    Progress.of(path, SETTINGS).add(texts)
    assert Progress.of(path, SETTINGS).texts == texts
    assert [file.name for file in path.parent.iterdir()] == ["x.jsonl"]


def test_a_file_of_before_is_read_and_a_line_that_was_cut_off_goes(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(FIRST + '{"number": 3, "text": "é"}\n{"number": 4, "te'.encode())
    found = Progress.of(path, SETTINGS)
    assert found.texts == {3: "é"}
    found.add({4: "y"})
    assert Progress.of(path, SETTINGS).texts == {3: "é", 4: "y"}


def test_other_settings_are_refused_once_there_are_texts(tmp_path):
    path = tmp_path / "x.jsonl"
    Progress.of(path, {"a": 2})
    Progress.of(path, SETTINGS).add({1: "x"})
    with pytest.raises(ValueError, match="holds 1 texts of other settings"):
        Progress.of(path, {"a": 2})


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"1",
        b"\xff",
        b"{}",
        b"[" * 10**5,
        b'{"number": [1], "text": "x"}',
        b'{"number": true, "text": "x"}',
        b'{"number": 1, "text": null}',
        b'{"number": ' + b"9" * 5000 + b', "text": "x"}',
    ],
)
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(FIRST + ENTRY + line + b"\n" + ENTRY)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3: no number with its text"):
        Progress.of(path, SETTINGS)


def test_what_cannot_be_written_leaves_the_texts_and_the_file_as_they_were(tmp_path, monkeypatch):
    found = Progress.of(tmp_path / "x.jsonl", SETTINGS)
    found.add({1: "x"})
    before = found.path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(progress.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            found.add({2: "y"})
    assert found.path.read_bytes() == before and found.texts == {1: "x"}
    found.add({2: "z"})
    assert Progress.of(found.path, SETTINGS).texts == {1: "x", 2: "z"}


def test_half_a_write_is_taken_back(tmp_path):
    """The system stops the write itself: no file of this process may grow beyond some bytes."""
    code = """if True:
        import resource, sys
        from pathlib import Path
        from vblora_experiments.progress import append
        path = Path(sys.argv[1])
        append(path, b"x" * 900)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            append(path, b"y" * 500)
        except OSError as error:
            print(path.stat().st_size, error.strerror)
        append(path, b"z" * 100)
        print(path.stat().st_size)
    """
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "900 File too large\n1000\n", done.stderr


HOLDS = """if True:
    import sys
    from pathlib import Path
    from vblora_experiments.progress import Progress
    held = Progress.of(Path(sys.argv[1]), {"a": 1})
    held.add({1: "x"})
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_until_the_first_one_ends(tmp_path):
    path = tmp_path / "x.jsonl"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(ValueError, match=r"another process adds to .*x\.jsonl: wait for it, or end it"):
            Progress.of(path, SETTINGS)
        with pytest.raises(ValueError, match="another process"), alone(path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert Progress.of(path, SETTINGS).texts == {1: "x"}  # the lock of a killed process is free


def test_appended_content_follows_what_was_there(tmp_path):
    append(tmp_path / "x", b"one\n")
    append(tmp_path / "x", b"two\n")
    assert (tmp_path / "x").read_bytes() == b"one\ntwo\n"


def test_a_file_of_somebodys_own_is_not_replaced(tmp_path):
    path, target = tmp_path / "x.partial.jsonl", tmp_path / "x.jsonl"
    target.write_text("mine")
    with pytest.raises(ValueError, match=r"x\.jsonl was not written by this command, .*: move it away first"):
        Progress.of(path, SETTINGS, target)
    assert target.read_text() == "mine" and not path.exists()
    target.unlink()
    Progress.of(path, SETTINGS, target)
    target.write_text("mine")  # meanwhile
    with pytest.raises(ValueError, match="was not written by this command"):
        Progress.of(path, SETTINGS, tmp_path / "other", target)
    target.unlink()
    Progress.of(path, SETTINGS, target).add({1: "x"})
    target.write_text("x")  # a crash between the file and its note
    assert Progress.of(path, SETTINGS, target).texts == {1: "x"}
