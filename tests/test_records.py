"""Run folders: one process at a time, and the time of a run that was interrupted within an epoch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vblora.trainer import TrainingClock
from vblora_experiments import records

HOLD = """
import sys, time
from pathlib import Path
from vblora_experiments import records
records.begin(Path(sys.argv[1]), {"seed": 0})
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_that_another_process_trains_into_is_refused(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process trains into"):
            records.begin(tmp_path / "run", {"seed": 0})
    finally:
        process.kill()
        process.wait()
    assert records.begin(tmp_path / "run", {"seed": 0}) is None  # its end, however it came, frees the folder
    assert records.begin(tmp_path / "run", {"seed": 0}) is None  # and the same process may begin again


def test_the_clock_counts_what_came_before_a_checkpoint_within_an_epoch(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = TrainingClock()
    clock.on_epoch_begin(None, None, None)
    now[0] += 7
    kept = clock.state()["args"]["seconds"]
    now[0] += 3
    clock.on_epoch_end(None, None, None)
    now[0] += 50  # evaluation
    assert (kept, clock.seconds, clock.state()["args"]["seconds"]) == (7, 10, 10)
    resumed = TrainingClock(kept)
    resumed.on_epoch_begin(None, None, None)
    now[0] += 5
    resumed.on_epoch_end(None, None, None)
    assert resumed.seconds == 12
