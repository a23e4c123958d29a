"""No number of a file is believed before the bytes behind it are counted: ranks, banks, and files of gigabytes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_helpers import METHODS, adapt, build

import vblora
from vblora.files import convert, packed, shared_bank
from vblora.files.describe import describe
from vblora.io import read_tensors, write_tensors

ROOT = Path(__file__).resolve().parents[1]
HUGE = 10**9


def old_directory(folder, method="vblora", format="auto", **changed):
    """A directory as version 0.1 wrote it, with other settings beside its tensors."""
    adapt(build("stack"), method).save(folder, format=format)
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    write_tensors(folder / "adapter_model.safetensors", tensors, {})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_above_every_width_is_refused_before_anything_is_made(method, tmp_path):
    model = build("stack")  # 32 and 64 wide
    with pytest.raises(ValueError, match=f"r {HUGE} is above every width of its layers, of which the widest is 64"):
        adapt(model, method, r=HUGE)
    assert not any(isinstance(module, vblora.Adapter) for module in model.children())
    with pytest.raises(ValueError, match=f"r {HUGE} is above every width"):
        vblora.load(model, old_directory(tmp_path, method, r=HUGE))


@pytest.mark.parametrize("setting", ["r", "num_vectors", "vector_length", "topk"])
@pytest.mark.parametrize("format", ["native", "peft"])
def test_no_setting_of_a_directory_makes_anything_large(setting, format, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of all tests before, and in kB
    changed = {setting: HUGE} | ({"num_vectors": HUGE} if setting == "topk" else {})
    folder = old_directory(tmp_path / "adapter", format=format, **changed)
    actions = [
        lambda: vblora.load(build("stack"), folder),
        lambda: convert.read_directory(folder, build("stack")),
        lambda: convert.read_directory(folder),
    ]
    if setting != "r":  # what it holds can be said without its layers
        actions.append(lambda: describe(folder))
    for action in actions:
        with pytest.raises(ValueError):
            action()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # a bank of HUGE vectors takes more


def sparse(path, metadata, size=3 * 2**30):
    """A file of 3 GB, of which nothing but the header takes space, and whose header fits."""
    header = {"__metadata__": metadata, "vector_bank": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)


MEASURED = """
import resource, sys
sys.path.insert(0, "tests")
from core_helpers import build
import vblora
from pathlib import Path
from vblora.files import shared_bank
folder = Path(sys.argv[1])
model = build("stack")
store = vblora.AdapterStore(model, folder)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def rows():
    with store.rows(["large"]):
        pass
actions = (rows, lambda: vblora.load(model, folder / "large.safetensors"), lambda: vblora.load(model, folder),
           lambda: shared_bank.read_beside(folder, "0" * 64))
for action in actions:
    try:
        action()
    except ValueError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "MiB")
"""


def test_files_of_gigabytes_are_refused_by_their_size(tmp_path):
    sparse(tmp_path / "large.safetensors", {packed.HEADER: "{}"})
    sparse(tmp_path / shared_bank.file_of("0" * 64), {})
    old_directory(tmp_path)
    sparse(tmp_path / "adapter_model.safetensors", {})
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    *said, memory = run.stdout.splitlines()
    assert len(said) == 4 and all("bytes" in line for line in said), run.stderr
    assert int(memory.split()[0]) < 100


def test_a_file_may_hold_the_whole_model_as_heads(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "MOST_BYTES", 4000)
    model = build("stack", hidden=64)
    adapter = adapt(model, modules_to_save=["embed", "layers.1"], target_modules=["layers.0.up"])
    assert adapter.pack(tmp_path / "a", bank="float32", heads="float32") > 4000
    vblora.load(build("stack", hidden=64), tmp_path / "a")
    small = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="bytes, more than the"):
        vblora.load(small, tmp_path / "a")
