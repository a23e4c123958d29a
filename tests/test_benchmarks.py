"""Each benchmark runs, small, and its record holds what its table shows. Nothing here looks at a time."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from core_helpers import Stack
from language_helpers import byte_tokenizer, save_tiny_llama
from transformers import BertConfig, BertModel

import vblora
from vblora.io import read_json

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SHARED = ("turns", "adapters", "damage", "small_slurm", "triton_composition", "gpu_kit")  # no benchmarks themselves
SHARED += ("serving_client",)
# The commands themselves, one that reads records, one that needs a run of GLUE, three that kill runs for minutes, one
# that needs another version, one that damages files, three that start servers, one that counts, and one that
# needs a model.
NOT_IN_ALL = ("all", "gpu", "show", "going_on", "kills", "killed_saves", "cluster_campaign", "against", "fuzz")
NOT_IN_ALL += ("serving", "serving_soak", "vllm_adapters", "experts", "grpo")
sys.path.append(str(FOLDER))  # what benchmarks share; last, as NLG has a generation.py too


def benchmark(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_step_time(tmp_path, capsys):
    record = tmp_path / "r.json"
    benchmark("step_time").main(["--shapes", "small", "small_nf4", "--rounds", "1", "--record", str(record)])
    found = read_json(Path(record))
    for name in ("small", "small_nf4"):
        small = found[name]
        assert small["times_lora"]["LoRA in PEFT"] == 1 and all(value > 0 for value in small["seconds"].values())
        state = small["state_bytes"]
        assert state["floor"] < state["LoRA in PEFT"] and ("VB-LoRA in PEFT" in state) is (name == "small")
    printed = capsys.readouterr().out
    assert "VB-LoRA here" in printed
    benchmark("show").main([str(record)])
    assert capsys.readouterr().out == printed


def test_the_rates_of_narrow_models(tmp_path, capsys, monkeypatch):
    narrow, record = benchmark("narrow"), tmp_path / "r.json"
    for name in ("LEARN_FIRST", "STEPS", "LAST"):
        monkeypatch.setattr(narrow, name, 4)
    narrow.main(["--widths", "8", "--seeds", "0", "1", "--record", str(record)])
    found = {one["law"]: one for one in read_json(record)["measured"]}
    assert {law: one["rate"] for law, one in found.items()} == {
        "the same": 2e-3,
        "1/root": pytest.approx(2e-3 * 48**0.5),
        "1/width": pytest.approx(2e-3 * 48),
    }
    losses = [found[law]["losses"] for law in narrow.LAWS]
    assert list(map(len, losses)) == [2, 2, 2] and losses[0] != losses[1] != losses[2]
    benchmark("show").main([str(record)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[:5] == printed[5:] and printed[3].startswith("| 8 | 0.014 | 1/root | ")


def test_active_logits_and_what_follows_on_paper(tmp_path, capsys):
    record = tmp_path / "active.json"
    command = ["--steps", "2", "--stds", "0.01", "--record", str(record)]
    benchmark("active_logits").main(command)
    (last,) = [at for at in read_json(record)["runs"]["0.01"] if at["step"] == 2]
    assert 2 <= last["mean"] <= last["p99"] <= last["largest"] < last["width"] == 32
    assert last["of_dense"] < 0.05
    benchmark("scaling").main(["--active", str(record), "--record", str(tmp_path / "scaling.json")])
    seven = read_json(tmp_path / "scaling.json")["models"]["Llama2-7B"]
    assert seven["sub_vectors"] == 39_040 and seven["gradient_bytes"]["PEFT"] == 321_912_832
    assert "Llama2-70B" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no record of active_logits"):
        benchmark("scaling").main(["--active", str(tmp_path / "scaling.json")])


def test_training_memory(tmp_path, capsys):
    record = tmp_path / "r.json"
    benchmark("training_memory").main(["--rows", "2", "--record", str(record)])
    models = read_json(record)["models"]
    for found in models.values():
        assert (
            found["ddp_nf4"]
            < found["fsdp2"]["1"]
            == sum(found["parts"].values()) - found["parts"]["memory_bytes"] - (found["parts"]["gathered_bytes"])
        )
    largest = models["Llama2-70B"]["fsdp2"]
    assert largest["1"] > largest["2"] > largest["4"] > largest["8"]
    printed = capsys.readouterr().out
    assert "FSDP2 over 4 of 80 GB" in printed and "2,048 tokens on each GPU" in printed
    with pytest.raises(ValueError, match="--rows must be at least 1, not 0"):
        benchmark("training_memory").main(["--rows", "0"])


def test_against_another_version(tmp_path, capsys):
    record = tmp_path / "r.json"
    work = ["evaluation", "save", "load"]
    benchmark("against").main([str(FOLDER.parent), "--rounds", "1", "--only", *work, "--record", str(record)])
    found = read_json(Path(record))["work"]
    assert set(found) == set(work) and all(one["ratio"] > 0 for one in found.values())
    with pytest.raises(ValueError, match="holds no vblora/"):
        benchmark("against").main([str(tmp_path)])


def test_many_adapters(tmp_path, capsys):
    model = save_tiny_llama(tmp_path / "model", width=64)
    record = tmp_path / "r.json"
    command = ["--model", str(model), "--adapters", "8", "--rounds", "1", "--record", str(record)]
    benchmark("many_adapters").main(command)
    found = read_json(Path(record))
    assert set(found["tokens_per_second"]) == {"1", "8"} and found["waiting_bytes"]["store"] > 0
    assert "8 adapters." in capsys.readouterr().out


def test_experts(tmp_path, capsys):
    record = tmp_path / "r.json"
    benchmark("experts").main(["--models", "Mixtral-8x7B", "--record", str(record)])
    found = read_json(record)["models"]["Mixtral-8x7B"]
    full = found["full"]
    r, layers, hidden, inner = 4, 32, 4096, 14336
    attention = 2 * (hidden + hidden) + 2 * (hidden + 1024)
    assert full["layers"]["lora"] == r * layers * attention
    of_experts = 8 * (hidden + 2 * inner + inner + hidden)
    assert full["with_experts"]["lora"] == r * layers * (attention + of_experts)
    n = full["with_experts"]["lora"] // 256
    assert full["with_experts"]["sub_vectors"] == n and full["with_experts"]["vblora"] == 2048 * 256 + n + n // 2
    assert max(found["tiny"]["apart"].values()) < 1e-4 < 0.1 < found["tiny"]["effect"]
    assert "| Mixtral-8x7B |" in capsys.readouterr().out


def test_grpo(tmp_path, capsys):
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    model = save_tiny_llama(tmp_path / "model", width=64)
    grpo, record = benchmark("grpo"), tmp_path / "r.json"
    texts = [" 44", " 44\n1", "44 is", " 45", "so 44"]
    assert grpo.reward(texts, [44] * 5) == [1.0, 1.0, 0.25, 0.0, 0.0]
    small = ["--steps", "2", "--group", "2", "--held_out", "3"]
    grpo.main(["--model", str(model), *small, "--record", str(record)])
    found = read_json(record)
    ours, theirs = found["methods"]["VB-LoRA"], found["methods"]["LoRA r 4"]
    assert len(ours["log"]) == len(theirs["log"]) == 2 and ours["before"] == theirs["before"]
    sent = ours["sync_bytes"]
    assert sent["packed"] < theirs["sync_bytes"]["the file"] < sent["the merged model in bfloat16"]
    assert "LoRA r 4" in capsys.readouterr().out


def test_exchange(tmp_path, capsys):
    record = tmp_path / "r.json"
    command = "--layers 1 --width 64 --num_vectors 300 --vector_length 32 --steps 2 --record"
    importlib.import_module("exchange").main([*command.split(), str(record)])  # its processes import it by its name
    found = read_json(Path(record))
    quiet = found["ways"]["VB-LoRA here, forward_sync_buffers=False"]
    assert quiet["bytes"]["buffers"] == 0
    for way, one in found["ways"].items():
        assert one["bytes"]["gradients"] == found["counted"][way]
        assert max(one["largest_difference"].values()) < 1e-5
    assert found["ways"]["VB-LoRA here"]["bytes"]["gradients"] < found["ways"]["VB-LoRA in PEFT"]["bytes"]["gradients"]
    large = found["llama2_7b"]
    assert large["VB-LoRA in PEFT"] == 4 * (39_040 * 2048 + 2048 * 256)
    assert large["VB-LoRA here"] < 0.01 * large["VB-LoRA in PEFT"]
    assert "0.75%" in capsys.readouterr().out


def test_exchange_needs_whole_vectors():
    with pytest.raises(ValueError, match="--width 96 must be a multiple of --vector_length 64"):
        importlib.import_module("exchange").main(["--width", "96", "--vector_length", "64"])


def test_generation(tmp_path, capsys):
    command = "--layers 1 --width 64 --batches 1 2 --rounds 1 --record"
    benchmark("generation").main([*command.split(), str(tmp_path / "r.json")])
    batches = read_json(tmp_path / "r.json")["batches"]
    assert set(batches) == {"1", "2"} and all(all(found["same_text"].values()) for found in batches.values())
    assert batches["2"]["times_merged"]["merged"] == 1
    assert "Goal: unmerged" in capsys.readouterr().out


def test_growth(tmp_path, capsys):
    growth, record = benchmark("growth"), tmp_path / "r.json"
    growth.main(["--axes", "h", "batch", "--points", "2", "--rounds", "1", "--record", str(record)])
    axes = read_json(record)["axes"]
    assert [point["value"] for point in axes["h"]] == [64, 128] and [p["value"] for p in axes["batch"]] == [1, 2]
    assert all(point["times_lora"]["LoRA in PEFT"] == 1 for point in axes["h"])
    small, large = (point["state_bytes"] for point in axes["h"])
    assert small["LoRA in PEFT"] == large["LoRA in PEFT"] and small["VB-LoRA in PEFT"] < large["VB-LoRA in PEFT"]
    growth.main(["--plot", str(record), "--figures", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in ("growth_time.png", "growth_state.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in printed
    with pytest.raises(ValueError, match="--plot takes a record"):
        growth.draw({"benchmark": "padding"}, tmp_path)


def test_composition(tmp_path, capsys):
    small = "--rows 30 --num_vectors 16 --vector_length 8 --topk 3 --rounds 1 --record"
    benchmark("composition").main([*small.split(), str(tmp_path / "r.json")])
    found = read_json(tmp_path / "r.json")
    assert found["times_bag"]["embedding bag"] == 1 and set(found["ms"]) >= {"gather", "PEFT, factor by factor"}
    assert all(max(apart) < 1e-5 for apart in found["largest_difference"].values())
    assert ("left out" in capsys.readouterr().out) is not found["triton"]
    with pytest.raises(ValueError, match="--topk 9 is more than the 8"):
        benchmark("composition").main(["--topk", "9", "--num_vectors", "8"])


def test_loading(tmp_path, capsys):
    benchmark("loading").main(["--layers", "1", "--width", "64", "--rounds", "1", "--record", str(tmp_path / "r.json")])
    found = read_json(tmp_path / "r.json")
    assert {"vblora.load, packed file", "LoRA in PEFT, from_pretrained"} < set(found["opening_ms"])
    assert {"AdapterStore, composed", "VB-LoRA in PEFT, set_adapter"} < set(found["switching_ms"])
    assert all(size > 0 for size in found["bytes"].values())
    assert "from file to first output" in capsys.readouterr().out


def test_pipeline(tmp_path, capsys):
    pipeline = benchmark("pipeline")
    before = [vars(owner).get(name) for owner, name, _ in pipeline.PARTS]
    pipeline.main(["--small", "--record", str(tmp_path / "r.json")])
    for found in read_json(tmp_path / "r.json")["runs"].values():
        seconds = found["seconds"]
        assert set(seconds) >= {*pipeline.MODEL[:4], *pipeline.ONCE, "batches: padding", "saving", "logging"}
        assert sum(seconds.values()) == pytest.approx(found["whole"])
        assert found["in_model"] == pytest.approx(sum(seconds.get(part, 0) for part in pipeline.MODEL))
    assert [vars(owner).get(name) for owner, name, _ in pipeline.PARTS] == before
    assert "outside the model" in capsys.readouterr().out


def test_pipeline_says_which_flags_do_not_go_together():
    with pytest.raises(ValueError, match="--data_dir and --model are for one run"):
        benchmark("pipeline").main(["--model", "somewhere"])
    with pytest.raises(ValueError, match="--task mrpc needs --data_dir"):
        benchmark("pipeline").main(["--runs", "glue", "--task", "mrpc"])


def test_scheduling(tmp_path, capsys):
    benchmark("scheduling").main(["--runs", "2", "--rounds", "1", "--record", str(tmp_path / "r.json")])
    found = read_json(tmp_path / "r.json")["per_run"]
    assert all(0 < one["seconds"] == pytest.approx(60 * one["of_a_minute"]) for one in found.values())
    assert "schedule.run_all" in capsys.readouterr().out


def test_all(tmp_path, capfd, monkeypatch):
    everything = benchmark("all")
    assert {path.stem for path in FOLDER.glob("*.py")} == {*everything.SMALL, *NOT_IN_ALL, *SHARED}
    everything.main(["--small", "--only", "composition", "padding", "--records", str(tmp_path)])
    assert read_json(tmp_path / "composition.json")["benchmark"] == "composition"
    printed = capfd.readouterr().out
    assert "times the bag" in printed and "padding is left out" in printed
    monkeypatch.setitem(everything.SMALL, "composition", "--rounds 0")
    with pytest.raises(ValueError, match="failed: composition"):
        everything.main(["--small", "--only", "composition"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are killed in processes of their own")
def test_a_run_that_is_killed_ends_with_the_record_of_one_that_is_not(capfd):
    assert benchmark("kills").main(["--kills", "2"]) == 0
    assert "2 kills over" in capfd.readouterr().out


def test_a_killed_save_leaves_one_whole_adapter(capfd):
    assert benchmark("killed_saves").main(["--kills", "2"]) == 0
    assert "nothing mixed, nothing refused" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["step_time", "many_adapters", "generation", "growth", "loading", "composition"])
def test_a_wrong_number_is_named(name):
    with pytest.raises(ValueError, match="--rounds must be at least 1"):
        benchmark(name).main(["--rounds", "0"])


@pytest.mark.parametrize(("alike", "expected"), [(True, 8.0), (False, 1.0)])
def test_pull_is_one_for_orthogonal_gradients_and_n_for_equal_ones(alike, expected):
    """Two layers of width 8, r 1, sub-vectors of 8: 8 of them, on a bank of one vector."""
    model = Stack(width=8, inner=8)
    config = {"r": 2, "num_vectors": 1, "vector_length": 8, "topk": 1, "init_vector_bank_bound": 0.5}
    adapter = vblora.attach(model, vblora.VBLoRAConfig(**config, target_modules=["up"]), seed=0)
    table = adapter.compose()[0].detach().requires_grad_()  # (8, 8)
    table.grad = torch.ones(8, 8) if alike else torch.eye(8)
    found = benchmark("learning").look_at_bank(adapter, model, table)
    assert found["pull"] == pytest.approx(expected)
    assert found["along"] == pytest.approx(1.0 if alike else 8**-0.5)


def test_fuzz(tmp_path, capsys):
    record = tmp_path / "fuzz.json"
    benchmark("fuzz").main(["--cases", "220", "--record", str(record)])
    found = read_json(Path(record))
    assert found["wrong"] == {} and sum(sum(kind.values()) for kind in found["outcomes"].values()) == 220
    assert "packed, shared bank" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = byte_tokenizer()
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_serving(tiny_encoder, tmp_path, capsys):
    small = "--adapters 3 --in_use 1 3 --bound 3 --peft 2 --requests 9 --clients 3 --rows 4 --rounds 1"
    benchmark("serving").main(["--model", tiny_encoder, *small.split(), "--record", str(tmp_path / "r.json")])
    found = read_json(tmp_path / "r.json")
    assert found["over_http"]["ways"].keys() == {"all kept, 1", "all kept, 3"}
    assert found["over_http"]["ways"]["all kept, 1"]["of_one_adapter"] == 1
    assert found["batches"]["adapters"]["1"]["times_the_store"]["store"] == 1
    assert "PEFT loaded" in capsys.readouterr().out


def test_serving_under_load_of_all_kinds(tiny_encoder, tmp_path):
    record = str(tmp_path / "r.json")
    benchmark("serving_soak").main(
        ["--model", tiny_encoder, "--minutes", "0.05", "--adapters", "4", "--record", record]
    )
    found = read_json(Path(record))
    seen = found["seen"]
    assert found["wrong"] == [] and seen["in flight at the end: 200"] == 8
    assert {
        "asked: 200",
        "rows compared",
        "replaced",
        "hung up",
        "hostile: 404",
        "hostile: 413",
        "hostile: 422",
    } <= set(seen)
