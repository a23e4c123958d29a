"""benchmarks/packed.py on a trained run, on adapters by themselves and on nothing; benchmarks/going_on.py on a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import run_glue
import sizes
from vblora.files.convert import pack_directory
from vblora.io import read_json

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    return loaded("packed")


def test_without_an_adapter_it_measures_robertas_shape(benchmark, tmp_path, capsys):
    benchmark.main(["--record", str(tmp_path / "record.json")])
    (result,) = read_json(tmp_path / "record.json")["adapters"].values()
    share = {(row["bank"], row["weights"]): row["bytes"] / result["peft_bytes"] for row in result["rows"]}
    assert share["lossless", "lossless"] < 0.9 and share["int8", 8] < 0.3
    assert "| lossless | lossless |" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["vblora", "tied_lora", "lora_xs"])
def test_a_run_is_scored_in_every_setting(method, benchmark, encoder, data, tmp_path, capsys):
    places = ["--model_name_or_path", str(encoder), "--data_dir", str(data)]
    sizes = ["--num_vectors", "10", "--vector_length", "16"] if method == "vblora" else ["--rank", "2"]
    small = ["--num_train_epochs", "1", "--learning_rate", "4e-3", "--disable_tqdm", "true", "--use_cpu", "true"]
    run = tmp_path / "run"
    run_glue.main([*places, *small, *sizes, "--task", "cola", "--method", method, "--output_dir", str(run)])
    benchmark.main([str(run), *places, "--record", str(tmp_path / "record.json")])
    result = read_json(tmp_path / "record.json")["adapters"]["run"]
    assert result["rows"][0]["score"] == pytest.approx(result["trained_score"], abs=1e-6)
    assert len(result["rows"]) == (8 if method == "vblora" else 4)
    assert "the run's record has" in capsys.readouterr().out
    if method == "vblora":
        pack_directory(run / "best", tmp_path / "a.vblora.safetensors")
        benchmark.main([str(tmp_path / "a.vblora.safetensors"), str(run / "best")])


def test_a_run_on_anothers_bank_is_packed_without_it_and_sizes_are_drawn(benchmark, encoder, data, tmp_path, capsys):
    places = ["--model_name_or_path", str(encoder), "--data_dir", str(data)]
    small = ["--num_train_epochs", "1", "--learning_rate", "4e-3", "--disable_tqdm", "true", "--use_cpu", "true"]
    small += ["--num_vectors", "10", "--vector_length", "16", "--task", "cola", "--method", "vblora"]
    run_glue.main([*places, *small, "--output_dir", str(tmp_path / "own")])
    on = tmp_path / "shared"
    run_glue.main([*places, *small, "--bank_from", str(tmp_path / "own" / "best"), "--output_dir", str(on)])
    record = tmp_path / "record.json"
    benchmark.main([str(tmp_path / "own"), str(on), *places, "--record", str(record)])
    own, shared = read_json(record)["adapters"].values()
    assert {row["bank"] for row in shared["rows"]} == {"shared"} and own["task"] == shared["task"] == "cola"
    assert shared["rows"][-1]["bytes_without_heads"] < own["rows"][-1]["bytes_without_heads"]
    assert shared["rows"][0]["score"] == pytest.approx(shared["trained_score"], abs=0.02)
    capsys.readouterr()
    benchmark.main(["--show", str(record)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| largest error | change on CoLA |") and len(lines) == 2 + 8 + 2
    assert lines[2].startswith("| lossless | lossless | lossless |") and lines[2].endswith("| 0 | +0.00 |")
    picture = tmp_path / "bytes.png"
    folder = sizes.ROOT / "results" / "glue_minilm"
    sizes.main(["--task", "cola", "--records", str(folder), "--packed", str(record), "--output", str(picture)])
    out = capsys.readouterr().out
    assert "| VB-LoRA packed, shared bank, weights 8 bits |" in out and "| full fine-tuning | 90,855,944 |" in out
    assert out.count("| VB-LoRA packed, int8 bank, weights 8 bits |") == 1  # the head, 8 or 16 bits, is not counted
    assert out.count("| VB-LoRA, top-k file of PEFT |") == 1
    assert picture.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no packed run of mrpc"):
        sizes.main(["--task", "mrpc", "--packed", str(record)])


def test_going_on_starts_from_the_runs_loss(encoder, data, tmp_path, capsys):
    places = ["--model_name_or_path", str(encoder), "--data_dir", str(data)]
    small = ["--num_train_epochs", "1", "--disable_tqdm", "true", "--use_cpu", "true", "--seed", "0"]
    rates = ["--learning_rate", "4e-3", "--learning_rate_vector_bank", "4e-3", "--learning_rate_logits", "1e-2"]
    shape = ["--num_vectors", "10", "--vector_length", "16", "--task", "cola", "--method", "vblora"]
    run = tmp_path / "run"
    run_glue.main([*places, *small, *rates, *shape, "--output_dir", str(run)])
    record = tmp_path / "record.json"
    loaded("going_on").main([str(run), *places, "--steps", "2", "--record", str(record)])
    found = read_json(record)
    for name, row in found["from"].items():
        close = 1e-2 if "int8" in name else 1e-5
        assert row["loss_before"] == pytest.approx(found["run_loss"], rel=close), name
    assert len(found["from"]) == 4
    shown = capsys.readouterr().out
    loaded("going_on").main(["--show", str(record)])
    assert capsys.readouterr().out in shown and "| all logits | 0." in shown
    with pytest.raises(ValueError, match="--steps must be at least 1"):
        loaded("going_on").main([str(run), "--steps", "0"])
