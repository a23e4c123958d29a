"""The rows of Table 4 against the paper, and every script against the rows."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

import math_paper
import math_rows
import run_math
from math_rows import METHODS, MODELS, ROWS, row
from vblora.switch import field_names
from vblora_experiments import estimate
from vblora_experiments.paper_counts import MODELS as SHAPES
from vblora_experiments.paper_counts import ways_to_print

FOLDER = Path(math_rows.__file__).parent
PAPER = {
    "data": "meta-math/MetaMathQA",
    "data_format": "metamath",
    "split": "train[:100000]",
    "targets": "all",
    "num_train_epochs": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.02,
    "method": "vblora",
    "rank": 4,
    "topk": 2,
    "num_vectors": 2048,
    "vector_length": 256,
    "learning_rate_vector_bank": 1e-3,
    "learning_rate_logits": 1e-2,
}


@pytest.mark.parametrize("model", ["mistral_7b", "gemma_7b"])
def test_vb_loras_rows_are_the_papers(model):
    flags = row(f"{model}/vblora")
    assert {name: flags[name] for name in PAPER} == PAPER
    assert flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"] == 128


@pytest.mark.parametrize(("model", "method"), math_paper.PARAMETERS)
def test_the_ranks_give_the_papers_parameters(model, method):
    from vblora.counts import METHODS as COUNTS
    from vblora.counts import count_full

    flags = row(f"{model}/{method}")
    shapes = SHAPES[{"mistral_7b": "Mistral-7B", "gemma_7b": "Gemma-7B"}[model]]
    if method == "full":
        counts = count_full(shapes.parameters)
    else:
        names = {"rank": "r", "num_vectors": "num_vectors", "vector_length": "vector_length", "topk": "topk"}
        settings = {field: flags[flag] for flag, field in names.items() if flag in flags}
        counts = COUNTS[method](shapes.shapes("all"), **settings)
    assert any(ways_to_print(count, f"{math_paper.PARAMETERS[model, method]:g}M") for count in counts[:3])


def test_every_row_is_accepted_by_the_scripts_and_by_its_method():
    for model in MODELS:
        for method in METHODS:
            run = run_math.parse(["--row", f"{model}/{method}", "--use_cpu", "true", "--bf16", "false"])
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
    recipes = {("mistral_7b", "recipe"), ("gemma_7b", "recipe")}
    assert named - recipes == math_paper.TABLE_4.keys() == math_paper.PARAMETERS.keys() and named >= recipes


def test_prints_flags_one_per_line(capsys):
    assert ROWS.main("math_rows.py", ["gemma_7b/vblora"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed == {f"--{name}": str(value) for name, value in row("gemma_7b/vblora").items()}
