"""The guide's code is run as it stands in the guide."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import vblora
from vblora.config import AdapterConfig
from vblora.files.describe import describe

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "your_own_method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """What the guide's names hold after its code ran, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(AdapterConfig, "known", dict(AdapterConfig.known))
    monkeypatch.setattr(vblora.Adapter, "methods", dict(vblora.Adapter.methods))
    names: dict = {"__name__": "guide"}
    for block in BLOCKS:
        exec(compile(block, str(GUIDE), "exec", dont_inherit=True), names)
    return names


def test_a_method_takes_at_most_30_lines():
    method = BLOCKS[0][BLOCKS[0].index("@dataclass") :]
    assert len([line for line in method.splitlines() if line]) <= 30


def test_it_trains_is_saved_loaded_packed_exported_and_served(guide, tmp_path):
    model, x, trained = guide["model"], guide["x"], guide["trained"]
    base = model(x).detach()
    assert guide["losses"][-1] < 0.9 * guide["losses"][0]
    assert (trained - base).abs().max() > 0.01
    assert torch.equal(guide["loaded"], trained)
    torch.testing.assert_close(guide["served"][:32], trained[:32])
    torch.testing.assert_close(guide["served"][32:], base[32:])
    packed = vblora.load(model, "store/one-pair.safetensors")
    assert torch.equal(model(x), trained)
    packed.merge()
    torch.testing.assert_close(model(x), trained)
    packed.unmerge()
    packed.detach()
    assert describe("one-pair")["method"] == "one_pair"
    twin = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(peft.PeftModel.from_pretrained(twin, "one-pair-lora")(x), trained)
