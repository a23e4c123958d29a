"""One run on two "machines": two of torchrun's agents that meet on loopback, and what one process trains alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import on_two_machines
import pytest
import torch
from language_helpers import save_tiny_llama

from vblora.io import read_json, read_tensors

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, the data, and the runs of both machines and of one process."""
    place = tmp_path_factory.mktemp("machines")
    save_tiny_llama(place / "model")
    words = ["blue", "green", "one", "two", "sun", "moon"] * 6
    rows = [{"instruction": f"Say {w}.", "input": "", "output": f"{w} " * (at % 3 + 1)} for at, w in enumerate(words)]
    (place / "rows.json").write_text(json.dumps(rows))
    said = run_machines(place)
    assert all(code == 0 for code, _ in said), said
    for case in ("one_ddp", "one_nf4"):
        on_two_machines.train(place, case, 4)
    return place


def run_machines(place):
    """Exit code and output of both agents."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--monitor-interval=0.2"]
    command += ["--local-addr=127.0.0.1"]
    # Else the processes that are started anew meet in the lost ones' store, whose addresses are gone: some then wait.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    agents = []
    for machine in range(2):
        own = [f"--rdzv-conf=is_host={1 - machine}", str(ROOT / "tests" / "on_two_machines.py"), str(place)]
        output = (place / f"machine_{machine}.log").open("w")
        agents.append(subprocess.Popen([*command, *own], stdout=output, stderr=output, env=environment))
    try:
        codes = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(code, (place / f"machine_{machine}.log").read_text()[-3000:]) for machine, code in enumerate(codes)]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not there")
@pytest.mark.parametrize(("case", "alone"), [("ddp", "one_ddp"), ("nf4", "one_nf4"), ("fsdp2", "one_ddp")])
def test_two_machines_train_what_one_process_does(case, alone, place):
    """DDP through a lost process, DDP over a base in NF4, and FSDP2; the global batch is the same."""
    found, expected = (read_tensors(place / name / "last" / "adapter_model.safetensors")[0] for name in (case, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda said, name=name: name + said)


@pytest.mark.parametrize(("case", "alone"), [("ddp", "one_ddp"), ("nf4", "one_nf4")])
def test_losses_and_gradients_are_those_of_the_whole_batch(case, alone, place):
    logs = [
        read_json(place / name / f"checkpoint-{on_two_machines.STEPS}" / "trainer_state.json")["log_history"]
        for name in (case, alone)
    ]
    for name in ("loss", "grad_norm"):
        two, one = ([entry[name] for entry in log if name in entry] for log in logs)
        assert len(one) == on_two_machines.STEPS and two == pytest.approx(one, rel=1e-3)


def test_a_process_was_lost_and_the_run_went_on(place):
    assert (place / "lost").exists()
    starts = (place / "starts").read_text().splitlines()
    assert sorted(starts) == ["rank 0 anew", "rank 0 checkpoint-2", "rank 1 anew", "rank 1 checkpoint-2"]


def test_fsdp2_divides_the_base_and_leaves_the_adapter_whole(place):
    found = [read_json(place / f"divided_{rank}.json") for rank in range(2)]
    for one in found:
        assert one["whole"] and all(name.startswith("vblora_adapter.") for name in one["whole"])
        assert one["bytes"] <= 0.51 * one["of"]
    assert sum(one["bytes"] for one in found) == found[0]["of"]


def test_machines_that_share_no_folder_are_refused(place):
    for rank in range(2):
        said = (place / f"own_{rank}" / "said").read_text()
        assert (
            "holds checkpoint-2 on rank 0 and no checkpoint on rank 1: --output_dir must be a folder that all" in said
        )
