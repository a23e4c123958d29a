"""The identity of a run, its folder, and the time of a run that was interrupted within an epoch."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from vblora.io import write_json
from vblora.trainer import TrainingClock
from vblora_experiments import records, runs

KINDS = ("glue", "e2e", "instruct", "math", "asr")
HOLD = """
import sys, time
from pathlib import Path
from vblora_experiments import runs
runs.begin(Path(sys.argv[1]), {"seed": 0})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the run's folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_trains_into_is_refused(tmp_path, holder):
    by = f"process {holder.pid} on {platform.node()}"
    with pytest.raises(ValueError, match=rf"another process \({by}\) trains into"):
        runs.begin(tmp_path / "run", {"seed": 0})
    holder.kill()
    holder.wait()
    assert runs.begin(tmp_path / "run", {"seed": 0}) is None  # its end, however it came, frees the folder
    assert runs.begin(tmp_path / "run", {"seed": 0}) is None  # and the same process may begin again
    assert (tmp_path / "run" / runs.LOCK_FILE).read_text() == f"process {os.getpid()} on {platform.node()}\n"


def test_who_holds_a_folder_is_given_time_to_end_where_the_environment_says_so(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(runs, "LOCK_POLL", 0.01)
    monkeypatch.setenv(runs.LOCK_SECONDS, "0.1")
    with pytest.raises(ValueError, match="another process"):
        runs.begin(tmp_path / "run", {"seed": 0})
    monkeypatch.setenv(runs.LOCK_SECONDS, "60")
    ends = threading.Timer(0.2, holder.kill)
    ends.start()
    assert runs.begin(tmp_path / "run", {"seed": 0}) is None
    ends.join()


def test_a_file_system_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def refuse(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ValueError, match=r"is on a file system without locks \(No locks available\)"):
        runs.begin(tmp_path / "run", {"seed": 0})


@pytest.mark.parametrize("result", ["record.json", "training.json", "last/x", "best/x"])
def test_a_folder_with_results_takes_no_other_run(result, tmp_path):
    runs.begin(tmp_path, {"seed": 0})
    assert runs.begin(tmp_path, {"seed": 1}) is None  # only a plan: a wrong setting may be put right
    (tmp_path / result).parent.mkdir(exist_ok=True)
    (tmp_path / result).write_text("{}")
    with pytest.raises(ValueError, match=r"other settings \(seed: 1 before, 2 now\): give another place"):
        runs.begin(tmp_path, {"seed": 2})


def test_what_a_killed_run_left_half_written_is_swept_by_the_next(tmp_path):
    from vblora.io import replacing

    kept = [tmp_path / name for name in ("last/adapter.safetensors", "best/.hidden", "run.json", ".gitignore")]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"seed": 0}')
    for place in ("selections.safetensors", "last/adapter.safetensors", "checkpoint-3/adapter_config.json"):
        with replacing(tmp_path / place) as temporary:
            temporary.write_text("whole")
        temporary.write_text("half")  # as if the process had ended within
    runs.begin(tmp_path, {"seed": 0})
    assert not list(tmp_path.rglob(".*.????????"))
    assert all(path.exists() for path in kept)


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


@pytest.mark.parametrize(
    ("before", "now", "differ"),
    [
        ({"topk": 2, "bf16": True}, {"topk": "2", "bf16": "true"}, []),  # flags are text
        ({"learning_rate": 1e-3}, {"learning_rate": "0.001"}, []),
        ({"learning_rate": 1e-3}, {"learning_rate": "fast"}, ["learning_rate"]),
        ({"targets": "QV"}, {"targets": "qv"}, ["targets"]),
        ({"data": "12"}, {"data": "12.0"}, ["data"]),  # two fingerprints
        ({"rank": None}, {}, []),
        ({"row": "a/b", "output_dir": "here"}, {"output_dir": "there"}, []),
        ({"model_name_or_path": "roberta-base"}, {"model_name_or_path": "FacebookAI/roberta-base"}, []),
        ({"bf16": True, "topk": 1}, {"topk": 1}, ["bf16"]),
    ],
)
def test_two_runs_differ_in_what_decides_their_result(before, now, differ):
    assert runs.differences(before, now) == runs.differences(now, before) == differ


def test_a_plans_print_is_of_what_decides_the_result():
    plan = {"model_name_or_path": "whisper", "seed": 0, "window": 8}
    same = {**plan, "model_name_or_path": "openai/whisper", "output_dir": "there", "rank": None}
    assert runs.plan_print(plan) == runs.plan_print(same) != runs.plan_print({**plan, "window": 30})


@dataclass(frozen=True)
class Trial(runs.Trial):
    flags: dict[str, Any] = field(default_factory=lambda: {"model_name_or_path": "hub/m", "topk": 2, "bf16": True})

    def row_flags(self) -> dict[str, Any]:
        return self.flags


def test_a_record_is_a_trials_by_row_seed_flags_start_and_scores():
    settings = {"model_name_or_path": "m", "topk": 2, "bf16": True, "rank": 4}
    record = {"row": "m/lora", "seed": 1, "overrides": {"rank": "4"}, "settings": settings, "scores": {"gpt-4": 7}}
    trial = Trial("m/lora", changes={"rank": "4"}, seed=1)
    assert trial.is_of(record) and replace(trial, scores=("gpt-4",)).is_of(record)
    for other in (
        replace(trial, row="m/vera"),
        replace(trial, seed=2),
        replace(trial, changes={"rank": "8"}),
        replace(trial, flags={**trial.flags, "topk": 3}),  # the row has changed since
        replace(trial, scores=("gpt-5",)),
    ):
        assert not other.is_of(record)
    begun = {**record, "settings": {**settings, "start_from": "ab12"}}
    assert not trial.is_of(begun)


def test_the_commit_is_this_checkouts():
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no checkout")
    assert (records.commit() or "").removesuffix("+") == done.stdout.strip()


SOUND = {
    "experiment": "glue",
    "task": "cola",
    "method": "vblora",
    "seed": 0,
    "settings": {},
    "scores": {"metric": "accuracy", "last": {"epoch": 2, "accuracy": 0.5}, "best": {"epoch": 1, "accuracy": 0.6}},
    "stored_parameters": {"parameters": 1, "bytes": 4},
}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"scores": None}, "scores is None"),
        ({"scores": {"metric": ["accuracy"], "last": {}, "best": {}}}, r"scores\.metric is \['accuracy'\]"),
        ({"scores": {"metric": "accuracy", "last": [], "best": {}}}, r"scores\.last is \[\]"),
        ({"stored_parameters": {"parameters": True, "bytes": 4}}, r"stored_parameters\.parameters is True"),
        ({"seed": "0"}, "seed is '0'"),
        ({"data": []}, r"data is \[\]"),
        ({"method": {}}, r"method is \{\}"),
    ],
)
def test_a_damaged_record_is_named_with_what_is_wrong(changed, fault, tmp_path):
    write_json(tmp_path / "sound.json", SOUND)
    assert [record for _, record in records.read_files([tmp_path], "glue")] == [SOUND]
    write_json(tmp_path / "worse.json", SOUND | changed)
    with pytest.raises(ValueError, match=rf"worse\.json: no record of a run, or a damaged one: {fault}"):
        records.read_files([tmp_path], "glue")
    assert records.read_files([tmp_path], "e2e") == []


def test_every_record_of_the_repository_is_sound():
    results = Path(__file__).resolve().parents[1] / "results"
    found = [records.read_files([f], kind) for f in results.iterdir() if f.is_dir() for kind in KINDS]
    assert sum(map(len, found)) > 100
