"""No tensor is left on the CPU beside a model that is elsewhere, seen without a GPU: on_second_device.py runs there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

FOLDER = Path(__file__).resolve().parent


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no backends in Python",
)
def test_everything_runs_on_a_device_other_than_the_cpu():
    """In a process of its own, which cannot take the device back."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "on_second_device.py"]
    paths = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=FOLDER, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
