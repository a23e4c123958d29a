"""Every example runs as its first line says, and prints what it is about."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def output_of(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    return done.stdout


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


def test_there_are_no_others():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "classify.py",
        "generate.py",
        "many_adapters.py",
        "own_method.py",
    }


def test_classify_learns_and_loads_what_it_learned(tmp_path):
    before, after, loaded = numbers(r": ([\d.]+) of 500", output_of("classify.py", tmp_path))
    assert before < 0.7
    assert after > 0.85
    assert loaded == after


def test_generate_counts_on(tmp_path):
    assert "5 6 7 goes on: 8 9 10 11 12 13 14 15 16 17" in output_of("generate.py", tmp_path)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg")
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "first_adapter.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    kept = [out["text"] for cell in notebook["cells"] for out in cell.get("outputs", []) if "text" in out]
    # The file shows what its cells print: to the letter before training, whose sums another processor rounds otherwise.
    assert printed.startswith("".join(kept[0])) and "right before training" in kept[0][-1]
    assert ["".join(lines).count("\n") for lines in kept[1:]] == [1, 1, 4, 1]
    before, after = numbers(r"right \w+ training: ([\d.]+)", printed)
    assert before < 0.6 and after > 0.8
    assert numbers(r"([\d.]+) right\n", printed) == pytest.approx([after] * 3, abs=0.01)
    lossless, small = numbers(r"([\d,]+)(?: bytes|\n)", printed.split("packed: ")[1].replace(",", ""))[:2]
    assert small < 0.6 * lossless
    assert "'adapter_config.json', 'adapter_model.safetensors'" in printed


def test_own_method_trains_and_exports(tmp_path):
    text = output_of("own_method.py", tmp_path)
    losses = numbers(r"loss ([\d.]+)", text)
    assert losses[-1] < 0.95 * losses[0]
    assert "adapter_config.json adapter_model.safetensors" in text


def test_many_adapters_in_a_batch_are_as_each_alone(tmp_path):
    assert numbers(r"at a time: (\S+)", output_of("many_adapters.py", tmp_path))[0] < 1e-5
