"""Runs on a cluster, as far as no cluster is needed for it; tests/cluster/ has the campaigns on real ones."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from vblora.io import write_json
from vblora_experiments import journal
from vblora_experiments.cluster import follow, on_ray, on_slurm, settings, shared_locks, watch
from vblora_experiments.cluster.worker import LOCK_SECONDS, Failed, Stopped, Work
from vblora_experiments.schedule import Job, in_order


def job(tmp_path, name, code="print('said last')", after=()):
    return Job(name, [sys.executable, "-c", code], tmp_path / "runs" / f"{name}.log", list(after))


# ------------------------------------------------------------------------------------- what a worker does


def test_a_worker_runs_the_command_in_the_folder_of_the_campaign_and_notes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import os; print(os.getcwd(), *(os.environ[n] for n in ('OMP_NUM_THREADS', 'VBLORA_LOCK_SECONDS', 'OWN')))"
    one = job(Path(), "one", code)
    (tmp_path / "runs" / "one" / "checkpoint-24").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "checkpoint-6").mkdir()
    work = Work.of(one, 3, {"OWN": "x"})
    monkeypatch.chdir("/")
    work()
    assert (tmp_path / "runs" / "one.log").read_text() == f"{tmp_path} 3 {LOCK_SECONDS} x\n"
    (attempt,) = journal.attempts(tmp_path / "runs" / "one.log")
    assert (attempt.host, attempt.step, attempt.code) == (platform.node(), 24, 0)
    assert attempt.ended is not None and 0 <= attempt.ended - attempt.began < 60


def test_an_error_of_the_run_is_told_from_a_signal(tmp_path):
    with pytest.raises(Failed, match="wrong: exit code 2: why it failed"):
        Work.of(job(tmp_path, "wrong", "import sys; print('why it failed'); sys.exit(2)"), 1)()
    with pytest.raises(Stopped, match="killed: exit code -9"):
        Work.of(job(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"), 1)()
    assert [a.code for a in journal.attempts(tmp_path / "runs" / "killed.log")] == [-9]


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("noted", [True, False])
def test_a_worker_that_is_interrupted_ends_its_command(noted, tmp_path, monkeypatch):
    def interrupt(*_):
        raise Interruption

    def interrupted(log, process):
        processes.append(process)
        if not noted:
            raise Interruption
        started(log, process)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    processes, started = [], journal.started
    monkeypatch.setattr(journal, "started", interrupted)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interruption):
            Work.of(job(tmp_path, "long", "import time; time.sleep(60)"), 1)()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [attempt.code for attempt in journal.attempts(tmp_path / "runs" / "long.log")] == [None] * noted
    with pytest.raises(ProcessLookupError):
        os.kill(processes[0], 0)


def test_a_line_of_a_journal_that_was_cut_off_does_not_count(tmp_path):
    log = tmp_path / "run.log"
    journal.started(log, 1)
    journal.ended(log, -9)
    journal.started(log, 2)
    with journal.path_of(log).open("a") as file:
        file.write('{"code": 0, "ended')
    assert [(a.process, a.code) for a in journal.attempts(log)] == [(1, -9), (2, None)]
    journal.started(log, 3)
    assert [(a.process, a.code) for a in journal.attempts(log)] == [(1, -9), (2, None), (3, None)]
    journal.path_of(log).write_text('{"began": 1, "other": 2}\n')
    with pytest.raises(ValueError, match="is damaged"):
        journal.attempts(log)


def test_a_run_on_a_full_disk_has_failed_and_it_is_said_why(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(follow, "POLL", 0)
    monkeypatch.setattr(follow, "GRACE", 0)
    one = Job("one", [sys.executable, "-c", "print('x' * 9999); raise SystemExit(2)"], disk / "one.log")
    with (disk / "filling").open("wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(Failed):
        Work.of(one, 1)()
    said: list[str] = []
    assert follow.run_all(Scripted(), [one], said.append) == ["one"]
    assert "FAILED" in said[-1] and f"(no output: the disk of {disk} is full)" in said[-1]


# ------------------------------------------------------------------------------------- waiting for the runs


class Scripted:
    """A cluster whose queue holds what a list says, look by look."""

    def __init__(self, *looks):
        self.looks, self.stopped = list(looks), False

    def submit(self, jobs):
        return len(jobs)

    def queued(self):
        look = self.looks.pop(0) if self.looks else {}
        for ended in look.pop("ended", []):
            journal.started(*ended[:2])
            journal.ended(ended[0], ended[2])
        return look

    def stop(self):
        self.stopped = True


def test_runs_are_followed_until_all_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "POLL", 0)
    monkeypatch.setattr(follow, "GRACE", 0)
    one, two, after = (job(tmp_path, n, after=a) for n, a in (("one", ()), ("two", ()), ("after", ["two"])))
    lost, never = job(tmp_path, "lost"), job(tmp_path, "never")
    jobs = [one, two, after, lost, never]
    journal.started(lost.log, 1)
    cluster = Scripted(
        dict.fromkeys(("one", "two", "after", "lost"), "waiting (Priority)"),
        {"one": "running", "two": "running", "after": "waiting"},
        {"ended": [(one.log, 7, 0), (two.log, 8, 1)], "after": "waiting"},
        {},
    )
    said: list[str] = []
    assert sorted(follow.run_all(cluster, jobs, said.append)) == ["after", "lost", "never", "two"]
    assert said[0] == "5 runs queued, 0 were in the queue; they go on without this process"
    assert [line for line in said if line.startswith("one")] == [
        "one: waiting (Priority)",
        "one: running",
        f"one: done after 0.0 min on {platform.node()}: (no output)",
    ]
    assert any(line.startswith("two: FAILED (exit code 1") for line in said)
    assert any(line == "after: left out, as two failed" for line in said)
    assert any(line.startswith(f"lost: FAILED: lost on {platform.node()}") for line in said)
    assert any(line.startswith("never: FAILED: no worker wrote that it began it") for line in said)
    assert cluster.stopped  # nothing is left of other commands


def test_the_end_of_a_run_may_be_seen_late(tmp_path, monkeypatch):
    """As on NFS: the queue has forgotten the run before its last words are read here."""
    monkeypatch.setattr(follow, "POLL", 0)
    one = job(tmp_path, "one")
    journal.started(one.log, 1)
    cluster = Scripted({"one": "running"}, {}, {}, {"ended": [(one.log, 1, 0)]})
    assert follow.run_all(cluster, [one], lambda line: None) == []


def test_jobs_come_behind_those_they_wait_for():
    assert in_order({"b": ["a", "elsewhere"], "c": ["b"], "a": []}) == ["a", "b", "c"]


# ------------------------------------------------------------------------------------- settings


def settings_of(tmp_path, text, part="slurm"):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return settings.read(file, part)


def test_settings_are_read_by_kind_of_cluster(tmp_path):
    text = "slurm: {partition: gpu, account: me, hours: 2, options: {qos: low}}\nray: {address: 'h:1', gpus: 2}\n"
    own = settings_of(tmp_path, text)
    assert (own.partition, own.account, own.hours, own.gpus, own.options) == ("gpu", "me", 2.0, 1, {"qos": "low"})
    assert settings_of(tmp_path, text, "ray") == settings.RaySettings(address="h:1", gpus=2)
    assert settings_of(tmp_path, "slurm: {gpus: 0}", "ray") == settings.RaySettings()
    assert settings.read(None, "slurm") == settings.SlurmSettings() and settings.read(None, "local") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slurm: {partitions: gpu}", "slurm: unknown key 'partitions'; near it: partition"),
        ("slum: {}", "unknown key 'slum'; near it: slurm"),
        ("slurm: {gpus: -1}", "gpus must be at least 0, not -1"),
        ("slurm: {gpus: one}", "gpus is a whole number, not 'one'"),
        ("slurm: {gpus: true}", "gpus is a whole number, not True"),
        ("slurm: {hours: .nan}", "hours must be at least"),
        ("slurm: {hours: 0}", "hours must be at least"),
        ("slurm: {setup: [1]}", "setup is a list of texts"),
        ("slurm: 3", "slurm holds no map"),
        ("ray: {retries: -2}", "retries must be at least -1"),
        ("ray: {wait_for_nodes: 1}", "wait_for_nodes is true or false"),
        ("[]", "holds no map"),
        ("slurm: {gpus: 1, gpus: 2}", "the key 'gpus' is there twice"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        settings_of(tmp_path, text)
    with pytest.raises(ValueError, match=r"--cluster .*none\.yaml cannot be read"):
        settings.read(tmp_path / "none.yaml", "ray")


# ------------------------------------------------------------------------------------- Slurm's commands

PROGRAM = f"""#!{sys.executable}
import json, sys
from pathlib import Path
here = Path(__file__).parent
name = Path(__file__).name
with (here / "told").open("a") as told:
    print(json.dumps([name, *sys.argv[1:]]), file=told)
answer = here / f"{{name}}.answer"
code, out, err = json.loads(answer.read_text()) if answer.exists() else (0, "", "")
if name == "sbatch":
    number = len(list(here.glob("script*"))) + 1
    (here / f"script{{number}}").write_text(Path(sys.argv[-1]).read_text())
    out = f"Submitted batch job {{number}}" if not code else out
print(out)
print(err, file=sys.stderr)
sys.exit(code)
"""


class Programs:
    """Stand-ins for Slurm's commands, which write down what they are told."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue", "scancel", "srun"):
            (folder / name).write_text(PROGRAM)
            (folder / name).chmod(0o755)

    def answer(self, name, out="", err="", code=0):
        (self.folder / f"{name}.answer").write_text(json.dumps([code, out, err]))

    def told(self, name):
        return [
            told[1:]
            for line in (self.folder / "told").read_text().splitlines()
            if (told := json.loads(line))[0] == name
        ]

    def scripts(self):
        return [path.read_text() for path in sorted(self.folder.glob("script*"))]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    programs = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{programs.folder}:{os.environ['PATH']}")
    return programs


def queue(slurm, *lines):
    """What squeue answers from now on: of each job its array's number, place, number, state and reason."""
    names = [re.search(r"job-name=(\S+)", script)[1] for script in slurm.scripts()]
    text = "\n".join(f"{names[array]}|{'|'.join(map(str, rest))}" for array, *rest in lines)
    slurm.answer("squeue", text)


def test_runs_are_one_array_and_those_that_wait_another_behind_it(tmp_path, slurm):
    own = settings.SlurmSettings("gpu", "me", 1.5, 2, 8, 16, 5, 3, ["module load cuda"], {"qos": "low"})
    cluster = on_slurm.Slurm(tmp_path / "runs", own)
    one, two = job(tmp_path, "one"), job(tmp_path, "two")
    waits = job(tmp_path, "waits", after=["two", "elsewhere"])
    assert cluster.queued() == {}
    assert cluster.submit([waits, one, two]) == 3
    first, second = slurm.scripts()
    for line in (
        *("partition=gpu", "account=me", "time=90", "gpus-per-node=2", "cpus-per-task=8", "mem=16384M", "qos=low"),
        *("requeue", "array=0-1%2", "kill-on-invalid-dep=yes"),
    ):
        assert f"#SBATCH --{line}\n" in first
    assert "module load cuda\n" in first and "--cpus-per-task=8" in first.partition("srun")[2]
    assert "dependency=afterok:1_" in second and "--array" not in second
    assert "dependency" not in first


def test_what_is_in_the_queue_is_not_queued_again(tmp_path, slurm):
    jobs = [job(tmp_path, "one"), job(tmp_path, "two"), job(tmp_path, "three")]
    cluster = on_slurm.Slurm(tmp_path / "runs", settings.SlurmSettings(gpus=0))
    journal.ended(jobs[2].log, 1)
    cluster.submit(jobs)
    assert not journal.path_of(jobs[2].log).exists()  # of the time before
    queue(slurm, (0, 0, 1, "RUNNING", "None"), (0, 1, 1, "PENDING", "Resources"))
    again = on_slurm.Slurm(tmp_path / "runs", settings.SlurmSettings(gpus=0))  # as from another process
    assert again.queued() == {"one": "running", "two": "waiting (Resources)"}
    assert again.submit([*jobs, job(tmp_path, "waits", after=["two"])]) == 2
    assert len(slurm.scripts()) == 3
    assert any("dependency=afterok:1_1\n" in script for script in slurm.scripts())
    again.stop()
    (told,) = slurm.told("scancel")
    assert sorted(told) == ["1_0", "1_1"]


@pytest.mark.parametrize(
    ("err", "message"),
    [
        (
            "sbatch: error: invalid partition specified: none\nsbatch: error: Batch job submission failed: "
            "Invalid partition name specified",
            "--on slurm: invalid partition specified: none; Batch job submission failed: Invalid partition name",
        ),
        ("", "--on slurm:"),
    ],
)
def test_what_slurm_refuses_is_said_in_its_words(tmp_path, slurm, capsys, err, message):
    cluster = on_slurm.Slurm(tmp_path / "runs", settings.SlurmSettings("none"))
    slurm.answer("sbatch", "", err, 1)
    with pytest.raises(ValueError, match=message) as caught:
        cluster.submit([job(tmp_path, "one")])
    assert "\n" not in str(caught.value) and capsys.readouterr().err == ""
    slurm.answer("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1)
    with pytest.raises(ValueError, match=r"--on slurm: .*Unable to contact slurm controller"):
        cluster.queued()


def test_a_slurm_that_does_not_answer_is_found_before_anything_is_queued(tmp_path, slurm):
    slurm.answer("squeue", "", "squeue: error: Unable to contact slurm controller (connect failure)", 1)
    with pytest.raises(ValueError, match=r"--on slurm: Unable to contact slurm controller"):
        on_slurm.Slurm(tmp_path / "runs", settings.SlurmSettings())


def test_slurm_is_asked_for_only_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(on_slurm, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--on slurm needs submitit: pip install submitit"):
        on_slurm.Slurm(tmp_path, settings.SlurmSettings())
    monkeypatch.setattr(on_slurm, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="--on slurm: there is no sbatch here"):
        on_slurm.Slurm(tmp_path, settings.SlurmSettings())


# ------------------------------------------------------------------------------------- Ray's address


def test_ray_is_asked_for_only_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--on ray needs Ray: pip install ray"):
        on_ray.Ray(tmp_path, settings.RaySettings())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_an_address_that_leads_nowhere_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    for address, message in (
        (f"127.0.0.1:{free}", f"127.0.0.1:{free} cannot be reached"),
        ("ray://there:10001", "neither"),
        ("127.0.0.1:99999999", "cannot be reached"),
        ("there", "neither"),
    ):
        with pytest.raises(ValueError, match=message):
            on_ray.Ray(tmp_path, settings.RaySettings(address=address))


class Tasks:
    """In Ray's place: it keeps which tasks were queued, behind which others."""

    def __init__(self):
        self.queued: list[tuple[str, ...]] = []

    def remote(self, *arguments):
        if callable(arguments[0]):
            return self
        self.queued.append((self.name, *arguments[1:]))
        return self.name

    def options(self, name, **_):
        self.name = name
        return self

    def wait(self, tasks, num_returns, timeout):
        return [], tasks


def test_the_actor_queues_runs_behind_their_starts_also_when_it_was_lost(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", ray := Tasks())
    after = {"z": [], "a": ["z"], "b": ["a"], "y": [], "c": ["y"], "d": ["c"]}  # the file has them by the alphabet
    runs = {n: {"work": {"log": str(tmp_path / f"{n}.log")}, "after": a, "options": {}} for n, a in after.items()}
    write_json(tmp_path / "ray.json", runs)
    queue = on_ray.Queue(str(tmp_path / "ray.json"))
    assert {task[0]: task[1:] for task in ray.queued} == {n: tuple(a) for n, a in after.items()}
    assert sorted(queue.going()) == sorted(after)
    ray.queued.clear()
    for name, code in (("z", 0), ("y", 2), ("a", -9)):
        journal.started(tmp_path / f"{name}.log", 1)
        journal.ended(tmp_path / f"{name}.log", code)
    queue = on_ray.Queue(str(tmp_path / "ray.json"))  # z has ended well, y by an error, a was killed
    assert ray.queued == [("a",), ("b", "a")] and queue.going() == ["a", "b"]
    ray.queued.clear()
    queue.add(["y", "c"])  # given again, by the command
    assert ray.queued == [("y",), ("c", "y")]


# ------------------------------------------------------------------------------------- locks

ROOT_MOUNT = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("40 22 0:40 / /data rw - nfs4 server:/data rw,vers=4.2,local_lock=none", ""),
        (
            "40 22 0:40 / /data rw - nfs server:/data rw,vers=3,nolock,local_lock=all",
            "mounted with locks of each machine",
        ),
        ("40 22 0:40 / /data rw - nfs server:/data rw,local_lock=flock", "mounted with locks of each machine"),
        ("40 22 0:40 / /data rw - lustre mgs@tcp:/fs rw,flock,lazystatfs", ""),
        ("40 22 0:40 / /data rw - lustre mgs@tcp:/fs rw,localflock", "with the option flock"),
        ("40 22 0:40 / /data rw - fuse.sshfs me@there:/ rw", "not known whether locks hold"),
        ("40 22 0:40 / /other rw - nfs4 server:/data rw", "other machines do not see"),
        ("40 22 0:40 / /data/my\\040runs rw - nfs4 server:/data rw", ""),
        ("broken", "other machines do not see"),
    ],
)
def test_whether_locks_hold_between_machines_is_told_from_the_mount(line, says):
    found = shared_locks.fault(Path("/data/my runs/glue"), f"{ROOT_MOUNT}\n{line}\n")
    assert says in found and bool(says) == bool(found)


# ------------------------------------------------------------------------------------- watching


def test_the_table_shows_states_scores_and_the_time_left(tmp_path):
    done = {"scores": {"metric": "pearson", "best": {"pearson": 0.912345, "epoch": 3.0}, "last": {}}}
    write_json(
        tmp_path / "going" / "checkpoint-40" / "trainer_state.json",
        {
            "global_step": 40,
            "max_steps": 100,
            "log_history": [
                {"epoch": 1.0, "eval_pearson": 0.1, "eval_runtime": 3.0},
                {"epoch": 2.0, "eval_loss": 0.7, "eval_pearson": 0.25, "eval_runtime": 3.0},
                {"epoch": 2.0, "loss": 0.6},
            ],
        },
    )
    (tmp_path / "going" / "checkpoint-20").mkdir()
    journal.started(tmp_path / "going.log", os.getpid())
    now = time.time()
    event = {"host": "there", "process": 5, "began": now - 200, "step": 20}
    journal.path_of(tmp_path / "going.log").write_text(json.dumps(event) + "\n")
    os.utime(tmp_path / "going" / "checkpoint-40" / "trainer_state.json", (now, now))  # 20 steps in 200 seconds
    journal.started(tmp_path / "failed.log", 5)
    journal.ended(tmp_path / "failed.log", 2)
    journal.started(tmp_path / "here.log", os.getpid())
    seen = [
        watch.see("done", tmp_path, done, None, 5.0),
        watch.see("going", tmp_path, None, "running", 5.0),
        watch.see("lost", tmp_path, None, "waiting (Resources)", 90.0),
        watch.see("failed", tmp_path, None, None, None),
        watch.see("here", tmp_path, None, None, None),
        watch.see("going", tmp_path, None, None, None),
        watch.see("new", tmp_path, None, None, None),
    ]
    lines = watch.render(seen).splitlines()
    assert lines[2:9] == [
        "| done | done |  | pearson 0.9123 |  |",
        "| going | running | 40/100 | loss 0.7, pearson 0.25 (epoch 2) | 10 min |",
        "| lost | waiting (Resources) |  |  | 1.5 h |",
        "| failed | failed (exit code 2) |  |  |  |",
        "| here | running |  |  |  |",
        "| going | interrupted on there | 40/100 | loss 0.7, pearson 0.25 (epoch 2) | 10 min |",
        "| new | not begun |  |  |  |",
    ]
    assert lines[-1] == "7 runs: 1 done, 2 running, 1 waiting, 1 failed, 1 interrupted on there, 1 not begun"


def test_a_terminal_shows_it_again_until_nothing_is_going(monkeypatch, capsys):
    class Terminal:
        text = ""

        def isatty(self):
            return True

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    monkeypatch.setattr(watch, "POLL", 0)
    looks = [[watch.Seen("one", "waiting")], [watch.Seen("one", "running")], [watch.Seen("one", "done")]]
    terminal = Terminal()
    watch.watch(lambda: looks.pop(0), terminal)
    assert not looks and terminal.text.count(watch.CLEAR) == 3 and "1 done" in terminal.text
    watch.watch(lambda: [watch.Seen("one", "running")])  # no terminal: once
    assert capsys.readouterr().out.count("| one |") == 1
