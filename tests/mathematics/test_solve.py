"""Answers to problems: prompts, batches, stopping, resuming, merged or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from language_helpers import byte_tokenizer, save_tiny_llama, vllm_environment

import finetune_math
import generate_problems
import solve
from math_references import read
from vblora import models
from vblora.cli import main as vblora_command
from vblora.io import read_json
from vblora.sampling import spaced


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    generate_problems.main([str(folder), "--rows", "30"])
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def trained(problems):
    """A function that trains a base model so far that its answers differ, and returns the run's folder."""

    def train(base, out):
        command = ["--model_name_or_path", str(base), "--data", str(problems / "train.json"), "--max_length", "400"]
        command += ["--num_vectors", "12", "--vector_length", "16", "--rank", "4", "--learning_rate_vector_bank", "0.1"]
        command += ["--init_vector_bank_bound", "0.5", "--num_train_epochs", "2", "--output_dir", str(out)]
        command += ["--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "4"]
        finetune_math.main(command)
        return out

    return train


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, trained):
    return trained(base, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def command(problems, tmp_path):
    """A function from a model and further flags to the arguments."""

    def make(model, *more, out="answers.jsonl"):
        few = ["--max_samples", "6", "--max_new_tokens", "12", "--batch_size", "4"]
        return [str(model), str(problems / "test.jsonl"), "--output", str(tmp_path / out), *few, *more]

    return make


def texts(path):
    return [row["output"] for row in map(json.loads, path.read_text().splitlines())]


def test_answers_are_in_order_and_the_same_in_any_batch(command, base, problems):
    first = solve.main(command(base))
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    wanted = spaced(read(problems / "test.jsonl"), 6)
    assert [(row["number"], row["question"]) for row in rows] == [(p.number, p.question) for p in wanted]
    assert len({p.number for p in wanted}) == 6 and wanted[-1].number > 6  # spaced, not the first
    assert texts(solve.main(command(base, "--batch_size", "1", out="one.jsonl"))) == texts(first)


def test_merged_or_not_the_answers_are_the_same_and_not_the_base_models(command, base, run, tmp_path, capsys):
    apart = solve.main(command(run, "--model_name_or_path", str(base)))
    assert texts(apart) != texts(solve.main(command(base, out="base.jsonl")))
    merged = tmp_path / "merged"
    assert vblora_command(["merge", str(run), str(merged), "--model_name_or_path", str(base)]) == 0
    assert texts(solve.main(command(merged, out="merged.jsonl"))) == texts(apart)
    adapter = ["--adapter", str(run / "last")]
    assert texts(solve.main(command(base, *adapter, out="adapter.jsonl"))) == texts(apart)
    capsys.readouterr()
    assert vblora_command(["merge", str(run), str(merged), "--model_name_or_path", str(base)]) == 2
    assert "merged exists: remove it" in capsys.readouterr().err
    assert vblora_command(["merge", str(base), str(tmp_path / "none")]) == 2
    assert "no adapter to merge" in capsys.readouterr().err


def test_a_run_that_was_trained_on_four_bits_is_merged_into_what_they_stand_for(problems, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = save_tiny_llama(tmp_path / "wide", width=128)
    command = ["--model_name_or_path", str(wide), "--data", str(problems / "train.json"), "--max_length", "400"]
    command += ["--num_vectors", "12", "--vector_length", "16", "--bits", "4", "--dtype", "float32", "--max_steps", "2"]
    out = tmp_path / "run"
    finetune_math.main([*command, "--output_dir", str(out), "--use_cpu", "true", "--disable_tqdm", "true"])
    for name, more in (("quantised", []), ("original", ["--original_weights"])):
        merge = ["merge", str(out), str(tmp_path / name), "--model_name_or_path", str(wide), *more]
        assert vblora_command(merge) == 0
    ours, plain = (models.load_model(str(tmp_path / name)).state_dict() for name in ("quantised", "original"))
    reference = models.load_model(str(wide), "float32", 4).dequantize().state_dict()
    base = models.load_model(str(wide)).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    update = plain[name] - base[name]
    assert update.abs().max() > 0 and (ours[name] - reference[name] - update).abs().max() < 1e-5
    assert (ours[name] - plain[name]).abs().max() > 1e-3  # NF4 is not the original


class Stop(Exception):
    pass


def test_interrupted_it_goes_on_to_the_same_answers(command, base, tmp_path, monkeypatch):
    whole = texts(solve.main(command(base, out="whole.jsonl")))
    original, calls = solve.Progress.add, []

    def failing(self, found):
        original(self, found)
        calls.append(found)
        raise Stop

    monkeypatch.setattr(solve.Progress, "add", failing)
    with pytest.raises(Stop):
        solve.main(command(base))
    assert len(calls) == 1 and not (tmp_path / "answers.jsonl").exists()
    with (tmp_path / "answers.partial.jsonl").open("a") as file:
        file.write('{"number": 5, "te')  # as after a power cut
    seen = []
    monkeypatch.setattr(solve.Progress, "add", lambda self, found: (seen.append(found), original(self, found)))
    assert texts(solve.main(command(base))) == whole
    assert sum(map(len, seen)) == 2 and not (tmp_path / "answers.partial.jsonl").exists()


def test_the_prompt_is_the_papers_with_the_first_token(problems):
    tokenizer, seen = byte_tokenizer(), []
    problem = read(problems / "test.jsonl")[0]

    class Engine:
        batch_size = 8

        def __init__(self):
            self.tokenizer = tokenizer

        def texts(self, prompts):
            seen.extend(prompts)
            return [" 4.\n\n### Instruction:\nAnother"] * len(prompts)

    class Kept:
        def add(self, found):
            self.texts = found

    kept = Kept()
    solve.answer(Engine(), [problem], kept)
    assert tokenizer.decode(seen[0]) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{problem.question}\n\n### Response: Let's think step by step."
    )
    assert kept.texts == {problem.number: "4."}  # the new instruction is cut, the answer is not


@pytest.fixture
def asked(monkeypatch):
    """What a stand-in for vLLM, which answers by transformers, is asked for; LoRA it has from PEFT."""
    asked = {}

    class LLM:
        def __init__(self, model, dtype, **settings):
            asked.update(settings, model=model, dtype=dtype)

        def generate(self, prompts, sampling, lora_request=None):
            asked.update(sampling=sampling, lora=lora_request)
            adapter = None if lora_request is None else Path(lora_request[2])
            self.engine = solve.TransformersEngine(solve.Tuned.of(asked["model"], adapter=adapter), 12, 4)
            found = self.engine.texts([prompt["prompt_token_ids"] for prompt in prompts])
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]) for text in found]

    module, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = LLM, lambda **settings: settings
    module.__spec__ = types.SimpleNamespace(name="vllm")
    request.LoRARequest = lambda *arguments: arguments
    for name, stand_in in {"vllm": module, "vllm.lora": types.ModuleType("x"), "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    return asked


def test_vllm_is_given_the_merged_model_the_same_tokens_and_the_same_stop(command, base, run, tmp_path, asked):
    places = ["--model_name_or_path", str(base)]
    expected = texts(solve.main(command(run, *places, out="here.jsonl")))
    assert texts(solve.main(command(run, *places, "--engine", "vllm", out="there.jsonl"))) == expected
    assert asked["sampling"] == {"temperature": 0, "max_tokens": 12, "stop": ["### Instruction:"]}
    (merged,) = tmp_path.glob("merged-*")
    assert asked["model"] == str(merged) and (merged / "model.safetensors").exists() and "enable_lora" not in asked


def test_vllm_is_given_the_adapter_as_lora(command, base, run, tmp_path, asked):
    places = ["--model_name_or_path", str(base)]
    expected = texts(solve.main(command(run, *places, out="here.jsonl")))
    more = ["--engine", "vllm", "--as_lora"]
    assert texts(solve.main(command(run, *places, *more, out="there.jsonl"))) == expected
    (lora,) = tmp_path.glob("lora-*")
    assert asked["model"] == str(base) and asked["lora"] == ("adapter", 1, str(lora)) and asked["max_lora_rank"] == 8
    assert not list(tmp_path.glob("merged-*"))
    # PEFT's own LoRA, which that folder is, is taken as it is.
    given = command(base, "--adapter", str(lora), *more, out="again.jsonl")
    assert texts(solve.main(given)) == expected and len(list(tmp_path.glob("lora-*"))) == 1
    with pytest.raises(ValueError, match="comes with no adapter"):
        solve.main(command(base, *more, out="none.jsonl"))
    with pytest.raises(ValueError, match="not quantised"):
        solve.main(command(run, *places, *more, "--bits", "4", out="none.jsonl"))


@pytest.mark.vllm
def test_the_real_vllm_gives_the_same_answers(tmp_path, problems, trained):
    """Merged, and as LoRA. Wider than elsewhere here, as vLLM's kernels for the CPU take no head of 16; and with ASCII
    alone, as it writes nothing for a character that is not complete where transformers writes a replacement."""
    python = vllm_environment() / "bin" / "python"
    base = save_tiny_llama(tmp_path / "tiny", width=64, ascii_alone=True)
    few = ["--max_samples", "6", "--max_new_tokens", "12", "--dtype", "float32", "--model_name_or_path", str(base)]
    places = [str(trained(base, tmp_path / "run")), str(problems / "test.jsonl"), *few]
    here = texts(solve.main([*places, "--output", str(tmp_path / "here.jsonl")]))
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    for more in ([], ["--as_lora"]):
        out = tmp_path / f"there{len(more)}.jsonl"
        command = [python, solve.__file__, *places, "--engine", "vllm", *more, "--output", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        assert texts(out) == here and any(here)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_samples", "0"], "--max_samples must be at least 1"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--adapter", "nonesuch"], "--adapter nonesuch"),
        (["--model_name_or_path", "x"], "is given with the folder of a run"),
        (["--bits", "3"], "--bits"),
        (["--as_lora"], "--as_lora goes with --engine vllm"),
    ],
)
def test_wrong_input_is_named(more, message, command, base):
    with pytest.raises(ValueError, match=message):
        solve.main(command(base, *more))


def test_other_settings_on_the_same_output_are_refused(command, base, tmp_path, monkeypatch):
    solve.main(command(base))
    assert read_json(tmp_path / "answers.settings.json")["max_new_tokens"] == 12
    with pytest.raises(ValueError, match=r"other settings \(max_new_tokens: 12 before, 5 now\)"):
        solve.main(command(base, "--max_new_tokens", "5"))
    monkeypatch.setattr(solve, "answer", lambda *_: pytest.fail("answered again"))
    solve.main(command(base))
