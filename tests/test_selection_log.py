"""The log of what VB-LoRA selects: against the selections themselves, step by step."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import vblora
from vblora.io import read_tensors, write_tensors
from vblora_experiments.records import SELECTIONS_FILE
from vblora_experiments.selection_log import SelectionLog, read_log


@pytest.fixture
def logged(tmp_path):
    """Three epochs of four steps, the log of them, and the selections after every step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    config = vblora.VBLoRAConfig(r=2, num_vectors=12, vector_length=8, init_logits_std=0.01, target_modules=["0", "2"])
    adapter = vblora.attach(model, config, seed=0)
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-2, lr_vector_bank=0.1, lr_logits=0.1))
    log = SelectionLog(adapter, tmp_path)
    state = SimpleNamespace(global_step=0, epoch=0.0, is_world_process_zero=True)
    log.on_train_begin(None, state, None)
    steps, snapshots = [], [[t.clone() for t in adapter.selection()]]
    for epoch in range(3):
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().sum().backward()
            optimizer.step()
            log.on_step_end(None, state, None)
            steps.append(adapter.topk_indices.clone())
        state.epoch = epoch + 1.0
        log.on_epoch_end(None, state, None)
        snapshots.append([t.clone() for t in adapter.selection()])
    log.on_train_end(None, state, None)
    return adapter, steps, snapshots, tmp_path / SELECTIONS_FILE


def test_it_holds_every_selection(logged):
    adapter, steps, snapshots, path = logged
    read = read_log(path)
    n, h = adapter.layout.rows, 12
    assert read.footprints.shape == (3, n, h) and read.num_vectors == h
    for epoch in range(3):
        used = np.zeros((n, h), dtype=bool)
        for indices in steps[4 * epoch : 4 * epoch + 4]:
            np.put_along_axis(used, indices.numpy(), True, axis=1)
        assert (read.footprints[epoch] == used).all()
        sets = [[set(row) for row in indices.tolist()] for indices in steps[4 * epoch : 4 * epoch + 4]]
        changes = sum(a != b for one, other in pairwise(sets) for a, b in zip(one, other, strict=True))
        assert read.changes[epoch] == changes
    assert read.changes.sum() > 0
    assert (read.indices == torch.stack([indices for indices, _ in snapshots]).numpy()).all()
    assert read.weights == pytest.approx(torch.stack([weights for _, weights in snapshots]).numpy(), abs=1e-3)
    assert list(read.epochs) == [0.0, 1.0, 2.0, 3.0]
    assert read.bank == pytest.approx(adapter.vector_bank.detach().numpy(), abs=1e-3)
    assert read.factors == [("0", "A", 4), ("0", "B", 6), ("2", "A", 6), ("2", "B", 2)]


def test_a_damaged_or_foreign_file_is_refused(logged, tmp_path):
    *_, path = logged
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        read_log(path)
    from safetensors.torch import save_file

    save_file({"bank": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="no log of a whole epoch's selections"):
        read_log(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_log(tmp_path / "nonesuch")


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("indices", lambda t: t[0], "indices is .* of shape"),
        ("indices", lambda t: t + 100, "outside the bank"),
        ("weights", lambda t: t * float("nan"), "weights holds NaN"),
        ("footprints", lambda t: t[:, :, :0], "footprints is"),
        ("footprints", lambda t: t.to(torch.int16), "footprints is int16"),
        ("changes", lambda t: t.repeat(2), "changes is"),
        ("epochs", lambda t: t.to(torch.int64), "epochs is int64"),
        ("bank", lambda t: t.T, "bank is"),
        ("bank", lambda t: t.to(torch.bfloat16), "bank is bfloat16"),
        ("num_vectors", lambda text: "1" * 5001, "num_vectors"),
        ("factors", lambda text: "[" * 100_000, "no JSON"),
        ("factors", lambda text: '[["a", "A"]]', "factors"),
    ],
)
def test_what_is_wrong_with_a_log_is_named(name, change, fault, logged, tmp_path):
    tensors, metadata = read_tensors(tmp_path / SELECTIONS_FILE)
    for values in (tensors, metadata):
        if name in values:
            values[name] = change(values[name])
    write_tensors(tmp_path / "changed", tensors, metadata)
    with pytest.raises(ValueError, match=f"no log of selections, or damaged.*{fault}"):
        read_log(tmp_path / "changed")
