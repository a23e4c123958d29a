"""Each benchmark runs, small, and its record holds what its table shows. Nothing here looks at a time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from language_helpers import save_tiny_llama

from vblora.storage.files import read_json

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_step_time(tmp_path, capsys):
    benchmark("step_time").main(["--shapes", "small", "--rounds", "1", "--record", str(tmp_path / "r.json")])
    small = read_json(tmp_path / "r.json")["small"]
    assert small["times_lora"]["LoRA in PEFT"] == 1 and all(value > 0 for value in small["seconds"].values())
    state = small["state_bytes"]
    assert state["floor"] < state["LoRA in PEFT"] and state["VB-LoRA here"] < state["VB-LoRA in PEFT"]
    assert "VB-LoRA here" in capsys.readouterr().out


def test_many_adapters(tmp_path, capsys):
    model = save_tiny_llama(tmp_path / "model", width=64)
    record = tmp_path / "r.json"
    command = ["--model", str(model), "--adapters", "8", "--rounds", "1", "--record", str(record)]
    benchmark("many_adapters").main(command)
    found = read_json(record)
    assert set(found["tokens_per_second"]) == {"1", "8"} and found["waiting_bytes"]["store"] > 0
    assert "8 adapters." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["step_time", "many_adapters"])
def test_a_wrong_number_is_named(name):
    with pytest.raises(ValueError, match="--rounds must be at least 1"):
        benchmark(name).main(["--rounds", "0"])
