"""Campaigns on a real Ray and a real Slurm, which the tests start on this machine and end again: pytest -m cluster

They take minutes, and are left out unless they are asked for. Ray comes with `pip install ray`, Slurm with
`apt-get install slurm-wlm munge`; what is missing is said when a test is skipped for it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest

from vblora_experiments import journal
from vblora_experiments.cluster import follow, settings
from vblora_experiments.schedule import Job

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(FOLDER))

import small_slurm  # noqa: E402

pytestmark = pytest.mark.cluster
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")


@pytest.fixture(scope="session")
def needs_slurm():
    if problem := small_slurm.missing():
        pytest.skip(f"Slurm cannot be started: {problem}")
    pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")


def job(folder, name, code="print('said last')", after=()):
    return Job(name, [sys.executable, "-c", code], folder / f"{name}.log", list(after))


def wait_until(done) -> None:
    end = time.monotonic() + 120
    while not done():
        assert time.monotonic() < end
        time.sleep(0.2)


# ------------------------------------------------------------------------------------- campaigns


@pytest.fixture(scope="session")
def campaign(tmp_path_factory):
    """Of benchmarks/cluster_campaign.py, done on this machine: a function that does it on a cluster."""
    spec = importlib.util.spec_from_file_location("cluster_campaign", FOLDER / "cluster_campaign.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.Campaign(tmp_path_factory.mktemp("campaign"), epochs=15)
    module.finish(made, "local", made.driver("local", "--jobs", "1"))
    return lambda on: module.measure(made, on)


def check(found: dict, losses: int) -> None:
    """Every run is finished once, its record and tensors are those of this machine alone, and what was lost went on."""
    runs = found["runs"].values()
    assert len(runs) == 5 and all(run["finished"] == 1 and run["equal"] for run in runs)
    assert sum(run["attempts"] for run in runs) >= 5 + losses
    assert all(run["went_on_from"][0] == 0 for run in runs)
    assert sum(step > 0 for run in runs for step in run["went_on_from"]) >= losses


@needs_ray
def test_on_ray_everything_is_lost_once_and_the_records_are_those_of_one_machine(campaign):
    found = campaign("ray")
    assert len(found["events"]) == 5
    check(found, losses=4)  # the driver's end is none for the runs


def test_on_slurm_a_requeued_and_a_preempted_run_go_on(needs_slurm, campaign):
    found = campaign("slurm")
    assert len(found["events"]) == 3
    check(found, losses=2)


# ------------------------------------------------------------------------------------- what is refused


def test_a_real_slurm_queues_follows_refuses_and_stops(tmp_path, needs_slurm, monkeypatch):
    from vblora_experiments.cluster.on_slurm import Slurm

    monkeypatch.setattr(follow, "POLL", 1)
    monkeypatch.setattr(follow, "GRACE", 3)
    runs = tmp_path / "runs"
    small = settings.SlurmSettings(gpus=0, cpus=1, hours=1)
    jobs = [job(runs, "wrong", "import sys; print('why'); sys.exit(2)"), job(runs, "waits", after=["wrong"])]
    jobs += [job(runs, "right"), job(runs, "after", after=["right"])]
    with small_slurm.slurm(tmp_path / "daemons"):
        cluster = Slurm(runs, small)
        assert sorted(follow.run_all(cluster, jobs, lambda line: None)) == ["waits", "wrong"]
        assert [a.code for a in journal.attempts(jobs[3].log)] == [0] and not journal.attempts(jobs[1].log)
        for wrong, message in (
            (settings.SlurmSettings("nowhere", gpus=0), "invalid partition specified: nowhere"),
            (settings.SlurmSettings(gpus=1), "Invalid generic resource"),
        ):
            with pytest.raises(ValueError, match=f"--on slurm: .*{message}"):
                Slurm(runs, wrong).submit(jobs[:1])
        assert cluster.submit([job(runs, "long", "import time; time.sleep(600)")]) == 1
        assert cluster.submit([job(runs, "long", "import time; time.sleep(600)")]) == 0
        wait_until(lambda: journal.attempts(runs / "long.log"))
        process = journal.attempts(runs / "long.log")[0].process
        cluster.stop()
        wait_until(lambda: not cluster.queued())
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    with pytest.raises(ValueError, match="--on slurm: "):  # there is no controller any more
        cluster.queued()


@needs_ray
def test_a_real_ray_queues_follows_refuses_and_stops(tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    from vblora_experiments.cluster.on_ray import Ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setattr(follow, "POLL", 0.5)
    runs = tmp_path / "runs"
    jobs = [job(runs, "wrong", "import sys; print('why'); sys.exit(2)"), job(runs, "waits", after=["wrong"])]
    jobs += [job(runs, "right"), job(runs, "after", after=["right"])]
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        small = settings.RaySettings(address=made.address, gpus=0, cpus=1)
        cluster = Ray(runs, small)
        assert sorted(follow.run_all(cluster, jobs, lambda line: None)) == ["waits", "wrong"]
        assert [a.code for a in journal.attempts(jobs[3].log)] == [0] and not journal.attempts(jobs[1].log)
        assert [a.code for a in journal.attempts(jobs[0].log)] == [2]  # an error of its own is not tried again
        with pytest.raises(ValueError, match="no node has room for a run of 1 cores and 3 GPUs"):
            Ray(runs, settings.RaySettings(address=made.address, gpus=3, cpus=1)).submit(jobs)
        assert cluster.submit([job(runs, "long", "import time; time.sleep(600)")]) == 1
        assert cluster.submit([job(runs, "long", "import time; time.sleep(600)")]) == 0
        wait_until(lambda: cluster.queued() == {"long": "running"})
        process = journal.attempts(runs / "long.log")[0].process
        cluster.stop()
        wait_until(lambda: not Path(f"/proc/{process}").exists())
        assert cluster.queued() == {}
    finally:
        ray.shutdown()
        made.shutdown()
