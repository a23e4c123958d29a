"""gpu.sh: its rehearsal, what it does at its limit, and its kit."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from language_helpers import save_tiny_llama
from safetensors.torch import load_file
from test_benchmarks import benchmark

from vblora.io import read_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # last, as NLG has a generation.py too

import gpu
import gpu_kit

ROOT = Path(__file__).resolve().parents[1]
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="stages are processes that are forked and stopped")


@fork
def test_the_rehearsal_runs_each_kind_of_stage_once(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # What gpu.py sets for each stage is read when the hub's package is imported, which is before a fork.
    environment["HF_HUB_CACHE"] = str(tmp_path / "runs" / "rehearsal" / "kit" / "hub")
    flags = ["--rehearse", "--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records"), "--minutes", "60"]
    command = [sys.executable, str(ROOT / "tests" / "rehearse_gpu.py"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    logs = "\n".join(path.read_text()[-1500:] for path in (tmp_path / "runs" / "rehearsal").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    stages = read_json(tmp_path / "records" / "stages.json")
    assert set(stages) == set(gpu.REHEARSED) and len(stages) == 9
    for stage in stages.values():
        assert stage["ended"] and stage["rehearsal"] and stage["calls"] == 1
        assert stage["versions"]["torch"] == torch.__version__ and stage["device"].startswith("CPU")
    for name in ("step_time_bf16", "step_time_nf4", "composition", "composition_bf16", "generation", "many_adapters"):
        assert read_json(tmp_path / "records" / f"{name}.json")["device"].startswith("CPU")
    step = read_json(tmp_path / "records" / "step_time_nf4.json")["small_nf4"]
    assert all(step["peak_bytes"][way] > 0 for way in ("floor", "LoRA in PEFT", "VB-LoRA here"))
    for folder, experiment in (("table1", "glue"), ("recipe", "glue"), ("e2e", "e2e")):
        (record,) = (tmp_path / "records" / folder).glob("*.json")
        assert read_json(record)["experiment"] == experiment
    again = subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh"), *flags], capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.splitlines() == [f"all is done: {tmp_path / 'records'}"]


SCRIPT = """
import pathlib, sys, time
count = pathlib.Path(sys.argv[1])
count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
if count.read_text() < sys.argv[2]:
    time.sleep(60)
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """A function that makes the stages small scripts: how many calls each needs, and its exit code in the last."""
    (tmp_path / "stage.py").write_text(SCRIPT)
    monkeypatch.setattr(gpu_kit, "generate", lambda kit: None)
    counts = tmp_path / "counts"
    counts.mkdir()

    def make(**wanted):
        made = [
            gpu.Stage(name, f"{tmp_path}/stage.py {counts}/{name}", f"{calls} {code}", f"{calls} {code}")
            for name, (calls, code) in wanted.items()
        ]
        monkeypatch.setattr(gpu, "STAGES", made)
        monkeypatch.setattr(gpu, "REHEARSED", list(wanted))

    def call(*flags):
        gpu.main(["--rehearse", "--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records"), *flags])
        return {path.name: int(path.read_text()) for path in counts.iterdir()}

    make.call = call
    return make


def test_what_the_limit_stopped_goes_on_and_what_has_ended_is_not_run_again(stages, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    stages(quick=(1, 0), long=(2, 0))
    of_the_clock, counted = gpu.Call.left.fget, tmp_path / "counts" / "long"

    def left(call):  # the limit counts once both are where they should be, however slow the machine
        ready = "quick" in call.done and counted.exists() and counted.read_text()
        return of_the_clock(call) if ready else 1.0

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(gpu.Call, "left", property(left))
        stages.call("--minutes", "0.001", "--at_once", "2")
    assert ended.value.code == 3 and "long: stopped" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert stages.call() == {"quick": 1, "long": 2}
    kept = read_json(tmp_path / "records" / "stages.json")
    assert [(kept[name]["ended"], kept[name]["calls"]) for name in ("quick", "long")] == [(True, 1), (True, 2)]
    assert kept["long"]["seconds"] > kept["quick"]["seconds"]
    assert stages.call() == {"quick": 1, "long": 2}


def test_a_stage_that_fails_leaves_the_others_and_is_tried_again(stages, tmp_path):
    stages(bad=(1, 7), good=(1, 0))
    for attempt in (1, 2):
        with pytest.raises(ValueError, match=r"failed: bad; see their logs"):
            stages.call("--at_once", "1")
        kept = read_json(tmp_path / "records" / "stages.json")
        assert kept["good"]["ended"] and not kept["bad"]["ended"] and kept["bad"]["calls"] == attempt


def test_times_are_measured_alone(monkeypatch, tmp_path):
    alone, shared = gpu.Stage("a", "", "", "", minutes=2), gpu.Stage("s", "", "", "", alone=False, minutes=0)
    call = gpu.Call(tmp_path, tmp_path, tmp_path, False, 2, 0.0, {})

    def may(stage, *running, left=500, began=True):
        monkeypatch.setattr(gpu.Call, "left", left)
        call.running = {str(number): (one, None, 0.0) for number, one in enumerate(running)}
        return gpu.may_start(stage, call, began)

    assert may(alone) and may(shared) and may(shared, shared)
    assert not may(alone, shared) and not may(shared, alone) and not may(shared, shared, shared)
    assert not may(alone, left=100) and may(alone, left=100, began=False) and may(shared, left=100)
    assert not may(shared, left=5)


def test_the_stages_commands_are_such_as_their_scripts_take(tmp_path, capsys):
    """With all flags of a real run, up to where it would begin."""
    for folder in (*gpu.TASKS.values(), "e2e"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (tmp_path / "data" / "e2e" / name).touch()
    places = {"records": tmp_path / "records", "runs": tmp_path / "runs", "kit": tmp_path}
    planned = 0
    for stage in gpu.STAGES:
        script, *words = [word.format(**places) for word in f"{stage.command} {stage.flags}".split()]
        if script.startswith("benchmarks/"):
            with pytest.raises(ValueError, match="--rounds must be at least 1, not 0"):
                benchmark(Path(script).stem).main([*words, "--rounds", "0"])
            continue
        sys.path.append(str(ROOT / Path(script).parent))
        module = importlib.import_module(Path(script).stem)
        if script == "NLU/recipe_study.py":
            assert module.parse(words).seeds == [0, 1, 2, 3, 4]
        else:
            module.main([words[0], "--plan", *words[1:]])
            planned += 6 if stage.name == "e2e" else 5
    assert len(re.findall(r"_seed\d", capsys.readouterr().out)) == planned == 6 + 5 * 7 * 3


def test_a_kit_has_weights_in_sixteen_bits_that_load_as_they_were(tmp_path, monkeypatch, capsys):
    import encoders

    model = save_tiny_llama(tmp_path / "models" / "SmolLM2-135M-Instruct")
    monkeypatch.setattr(encoders, "find_encoder", lambda: model)
    for place in ("glue/CoLA", "e2e"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "rows.csv").write_text("row")
    kit = tmp_path / "kit"
    places = {"--pack": "kit", "--glue_dir": "glue", "--e2e_dir": "e2e", "--models_dir": "models"}
    gpu.main([word for flag, place in places.items() for word in (flag, str(tmp_path / place))])
    assert "data/CoLA: 0.0 MiB" in capsys.readouterr().out and (kit / "data" / "e2e" / "rows.csv").is_file()
    for name in (gpu_kit.MINILM, gpu_kit.SMOLLM2):
        folder = kit / gpu_kit.cached(name) / "snapshots" / gpu_kit.COMMIT
        kept, own = load_file(folder / "model.safetensors"), load_file(model / "model.safetensors")
        assert kept.keys() == own.keys() and {t.dtype for t in kept.values()} == {torch.bfloat16}
        assert all(torch.equal(kept[key], own[key].bfloat16()) for key in own)
        assert read_json(folder / "config.json")["dtype"] == "float32"


def test_a_kits_packages_are_installed_once(tmp_path, monkeypatch):
    calls = []

    def pip(command, **settings):
        calls.append(command)
        Path(command[command.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_kit.subprocess, "run", pip)
    assert gpu_kit.install(tmp_path, tmp_path / "site") is None
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "one-1-py3-none-any.whl").write_bytes(b"")
    for _ in range(2):
        assert gpu_kit.install(tmp_path, tmp_path / "site") == tmp_path / "site"
    assert len(calls) == 1 and "--no-index" in calls[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rehearse", "--minutes", "0"], "--minutes must be above 0, not 0"),
        (["--rehearse", "--at_once", "0"], "--at_once must be at least 1, not 0"),
        (["--kit", "nowhere"], "--kit nowhere: no such folder; --pack makes one"),
        (["--rehearse", "--kit", "."], "--rehearse makes a kit of its own"),
        (["--pack", "kit", "--e2e_dir", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_use_is_named(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        gpu.main(flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(ValueError, match="PyTorch finds no GPU here; --rehearse runs the same on the CPU"):
        gpu.main([])


def test_stages_find_models_and_packages_in_the_kit(stages, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kit, "install", lambda kit, site: site)
    call = gpu.begin(gpu.parse(["--rehearse", "--runs", str(tmp_path / "runs")]))
    assert call.environment["HF_HUB_CACHE"] == str(call.kit / "hub") and call.environment["HF_HUB_OFFLINE"] == "1"
    assert call.environment["PYTHONPATH"].startswith(str(tmp_path / "runs" / "rehearsal" / "site") + os.pathsep)
    assert call.environment["CUDA_VISIBLE_DEVICES"] == ""


def test_stages_whose_data_are_missing_are_left_out(stages, monkeypatch, capsys):
    stages(lacking=(1, 0))
    monkeypatch.setattr(gpu, "STAGES", [gpu.Stage("lacking", "none.py", "", "", needs=("data/none",))])
    stages.call()
    assert "lacking: left out, as" in capsys.readouterr().out
