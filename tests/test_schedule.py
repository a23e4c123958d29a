"""Many runs over the devices there are."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from vblora_experiments import schedule
from vblora_experiments.schedule import Job, run_all


def job(tmp_path, name, code="print('said last')", after=()):
    return Job(name, [sys.executable, "-c", code], tmp_path / "logs" / f"{name}.log", list(after))


def test_all_run_each_with_a_place_of_its_own(tmp_path):
    code = "import os, time; print(os.environ['PLACE'], time.time()); time.sleep(0.3); print(time.time())"
    said: list[str] = []
    jobs = [job(tmp_path, f"job{i}", code) for i in range(4)]
    assert run_all(jobs, [{"PLACE": "a"}, {"PLACE": "b"}], said.append) == []
    spans: dict[str, list[tuple[float, float]]] = {}
    for each in jobs:
        place, begin, end = each.log.read_text().split()
        spans.setdefault(place, []).append((float(begin), float(end)))
    assert spans.keys() == {"a", "b"}
    for times in spans.values():  # never two at a time in one place
        ordered = sorted(times)
        assert all(one[1] <= other[0] for one, other in pairwise(ordered))
    assert sum("done" in line for line in said) == 4


ENDS_WITH_ITS_PARENT = """
import sys
from pathlib import Path
from vblora_experiments.schedule import Job, run_all
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
run_all([Job("long", [sys.executable, "-c", code], Path(sys.argv[1]))], [{}])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent has ended")
def test_a_campaign_that_is_killed_leaves_no_run_going(tmp_path):
    log = tmp_path / "long.log"
    campaign = subprocess.Popen([sys.executable, "-c", ENDS_WITH_ITS_PARENT, str(log)])
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
    run = int(log.read_text())
    campaign.kill()
    campaign.wait()
    wait_until(lambda: not is_going(run))


def is_going(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(done) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_failure_leaves_the_others_be_but_those_that_wait_for_it(tmp_path):
    jobs = [
        job(tmp_path, "waits", after=["fails"]),
        job(tmp_path, "fails", "import sys; print('why it failed'); sys.exit(3)"),
        job(tmp_path, "works"),
        job(tmp_path, "waits_too", after=["works", "elsewhere"]),  # not among the jobs: there already
    ]
    said: list[str] = []
    assert sorted(run_all(jobs, [{}], said.append)) == ["fails", "waits"]
    assert any("fails: FAILED (exit code 3" in line and line.endswith("why it failed") for line in said)
    assert any(line.startswith("waits: left out") for line in said)
    assert any(line.startswith("waits_too: done") and line.endswith("said last") for line in said)


def test_an_interruption_stops_what_runs(tmp_path):
    marker = tmp_path / "finished"
    code = f"import time; time.sleep(20); open({str(marker)!r}, 'w')"

    def say(line):
        if "started" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([job(tmp_path, "long", code)], [{}], say)
    assert not marker.exists()


def test_places_are_the_gpus_or_shares_of_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert schedule.devices(None) == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)]
    assert len(schedule.devices(2)) == 2
    for text, count, names in (
        ("0,-1,1", 1, ["0"]),
        ("0,7", 1, ["0"]),
        ("0,", 1, ["0"]),
        ("GPU-a, 2", 2, ["GPU-a", "2"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert schedule.devices(None) == [{"CUDA_VISIBLE_DEVICES": name} for name in names]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert schedule.devices(None) == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]
    with pytest.raises(ValueError, match="--jobs 3, but there are 2 GPUs"):
        schedule.devices(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert schedule.devices(None) == [{"OMP_NUM_THREADS": "7"}] and schedule.devices(3) == 3 * [
        {"OMP_NUM_THREADS": "2"}
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a user's own goes before
    assert schedule.devices(None) == [{"OMP_NUM_THREADS": "1"}]
    with pytest.raises(ValueError, match="at least 1"):
        schedule.devices(0)
