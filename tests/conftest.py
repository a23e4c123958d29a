"""What every test starts from."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed_and_one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _power_stays_on():
    """Waiting for the disk to have written each file would take minutes in all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own, mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") is not None and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def real_data():
    """A function from a folder name to that folder of real data; skips where it is missing."""
    base = Path(os.environ.get("VBLORA_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

    def folder(name: str) -> Path:
        if not (base / name).is_dir():
            pytest.skip(f"real data {name!r} is not in {base} (set VBLORA_DATA to its place)")
        return base / name

    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process takes for huggingface.co, with an empty cache and the token of its owner."""
    from hub_server import TOKEN, serving
    from huggingface_hub import constants, hf_api

    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
