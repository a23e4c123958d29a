"""The rows of Table 3 against the paper, every script against the rows, and the generated instructions."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

import generate_instructions
import instruct_paper
import instruct_rows
import run_instruct
from instruct_rows import METHODS, MODELS, ROWS, row
from vblora.switch import field_names
from vblora_experiments import estimate
from vblora_experiments.paper_counts import MODELS as SHAPES
from vblora_experiments.paper_counts import ways_to_print

FOLDER = Path(instruct_rows.__file__).parent
TABLE_9 = {
    "data": "yahma/alpaca-cleaned",
    "data_format": "alpaca",
    "bits": 4,
    "dtype": "bfloat16",
    "bf16": True,
    "targets": "all",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
}


def test_the_rows_are_table_9():
    for model in ("llama2_7b", "llama2_13b"):
        for method in METHODS:
            flags = row(f"{model}/{method}")
            assert {name: flags[name] for name in TABLE_9} == TABLE_9
        lora, own = row(f"{model}/lora"), row(f"{model}/vblora")
        assert (lora["rank"], lora["learning_rate"]) == (64, 4e-4)
        assert (own["num_vectors"], own["vector_length"], own["topk"]) == (2048, 256, 2)
        assert (own["learning_rate_vector_bank"], own["learning_rate_logits"]) == (1e-3, 1e-2)
    assert (row("llama2_7b/vblora")["rank"], row("llama2_13b/vblora")["rank"]) == (4, 6)


# Figures that no counting rule gives with Table 9's settings: docs/paper_versus_code.md.
UNEXPLAINED = {("llama2_7b", "vblora"), ("llama2_13b", "vblora")}


@pytest.mark.parametrize(("model", "method"), instruct_paper.PARAMETERS)
def test_the_ranks_give_the_papers_parameters(model, method):
    from vblora.counts import METHODS as COUNTS

    flags = row(f"{model}/{method}")
    shapes = SHAPES[{"llama2_7b": "Llama2-7B", "llama2_13b": "Llama2-13B"}[model]]
    names = {"rank": "r", "num_vectors": "num_vectors", "vector_length": "vector_length", "topk": "topk"}
    settings = {field: flags[flag] for flag, field in names.items() if flag in flags}
    counts = COUNTS[method](shapes.shapes("all"), **settings)
    agrees = any(ways_to_print(count, f"{instruct_paper.PARAMETERS[model, method]:g}M") for count in counts[:3])
    assert agrees != ((model, method) in UNEXPLAINED)


def test_every_row_is_accepted_by_the_scripts_and_by_its_method():
    for model in MODELS:
        for method in METHODS:
            run = run_instruct.parse(["--row", f"{model}/{method}", "--use_cpu", "true", "--bf16", "false"])
            known = field_names(run.method.method) | {"modules_to_save", "target_modules", "recipe"}
            settings = run.method.settings(estimate.target_modules(run.instruct.targets), None)
            assert settings.keys() <= known, (model, method)


def test_each_script_names_its_row():
    named = set()
    for script in sorted((FOLDER / "scripts").iterdir()):
        command = shlex.split(script.read_text().splitlines()[-1], comments=True)
        assert command[0] == "exec" and command[1].endswith("/../run.sh") and command[3] == "$@"
        model, method = command[2].split("/")
        assert script.stem == f"{method}_{model}" and os.access(script, os.X_OK) and row(command[2])
        named.add((model, method))
    assert named == {(model, method) for model in ("llama2_7b", "llama2_13b") for method in METHODS}


def test_prints_flags_one_per_line(capsys):
    assert ROWS.main("instruct_rows.py", ["llama2_7b/vblora"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed == {f"--{name}": str(value) for name, value in row("llama2_7b/vblora").items()}


def test_generated_instructions_are_distinct_right_and_the_same_for_the_same_seed(tmp_path):
    path = tmp_path / "rows.json"
    generate_instructions.main([str(path), "--rows", "400", "--seed", "3"])
    rows = json.loads(path.read_text())
    assert rows == generate_instructions.generate(400, 3) != generate_instructions.generate(400, 4)
    assert len({(one["instruction"], one["input"]) for one in rows}) == 400
    assert all(one["output"].strip() for one in rows) and any(one["input"] for one in rows)
    for one in rows:
        if one["instruction"].startswith("Sort"):
            assert one["output"].split(", ") == sorted(one["input"].split(", "))
        if one["instruction"].startswith("How many letters"):
            words = one["instruction"].split()
            assert one["output"] == f"They have {len(words[4]) + len(words[6])} letters together."
    for wrong in (["x.txt"], [str(path), "--rows", "0"]):
        with pytest.raises(ValueError, match=r"must end in \.json|at least 1"):
            generate_instructions.main(wrong)
