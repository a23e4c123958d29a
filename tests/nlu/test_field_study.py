"""The methods at equal bytes: their commands, the choice of a rate on other seeds, and the tables."""

from __future__ import annotations

import argparse
import json
import math

import pytest

import field_study
import run_glue
from field_study import ROWS


def record(score, seed=0):
    last = {"epoch": 3, "matthews_correlation": score / 100}
    return {
        **{"method": "vblora", "model": "m", "seed": seed, "task": "cola", "settings": {}, "steps": 189},
        "stored_parameters": {"parameters": 9, "bytes": 36},
        "scores": {"metric": "matthews_correlation", "epochs": [last], "last": last, "best": last},
    }


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_taken_by_run_glue(name, tmp_path):
    low, middle, high = ROWS[name].rates(field_study.FIRST)
    assert 4 * low == 2 * middle == high and middle == ROWS[name].middle
    values = field_study.recipe_study.flags_with(
        field_study.changes(name, middle), field_study.SENTENCES, 3, 1, tmp_path, tmp_path / "out"
    )
    glue, method, training = run_glue.parts(run_glue.of(values))
    assert method.settings(glue.targets, None) and middle in method.rates().values() and training.seed == 1


def test_the_rate_is_chosen_on_the_seeds_of_the_search_alone():
    rates = ROWS["vera"].rates(field_study.FIRST)
    found = {(3, "vera", rate, 10): record(score) for rate, score in zip(rates, (40, 50, 45), strict=True)}
    found |= {(3, "vera", rates[0], seed): record(99) for seed in range(5)}
    assert field_study.best_rate(found, 3, "vera", [10]) == rates[1]
    assert field_study.best_rate(found, 3, "vera", [10, 11]) is None


@pytest.fixture
def folder(tmp_path):
    """The recipe at 80, 82, 84 and VeRA at 60, 61, 65; VeRA's other rates were worse in the search."""
    scores = {"recipe": ((70, 75, 60), (80, 82, 84)), "vera": ((10, 20, 15), (60, 61, 65))}
    for name, (search, seeds) in scores.items():
        rates = ROWS[name].rates(field_study.FIRST)
        keys = {(3, name, rate, 10): score for rate, score in zip(rates, search, strict=True)}
        keys |= {(3, name, rates[1], seed): score for seed, score in enumerate(seeds)}
        for key, score in keys.items():
            (tmp_path / f"{field_study.name_of(key)}.json").write_text(json.dumps(record(score, key[3])))
    sizes = {"stored": 1000, "bytes": 4000, "trained": 900, "state_bytes": 14400, "step_of_lora": 1.25}
    (tmp_path / "steps.json").write_text(json.dumps({"rows": {"vera": sizes}}))
    return tmp_path


def test_the_table_from_records(folder, capsys):
    """Differences -20, -21, -19: t = 20 sqrt(3), 2 degrees of freedom, half width 4.3027 / sqrt(3)."""
    field_study.main(["field", "--records", str(folder), "--no_runs", "--seeds", "0", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    ran = [line for line in lines if "not run" not in line][2:]
    assert ran[0].startswith("| recipe |") and "| 0.004 | 82.0 ± 2.0 | 80.0 82.0 84.0 |  |  |  |" in ran[0]
    assert ran[1].startswith("| vera | 1,000 | 4,000 | 900 | 14,400 | 1.25 | 0.01 | 62.0 ± 2.6 | 60.0 61.0 65.0 |")
    assert "-20.0 [-22.5, -17.5] | 0.00083 | below |" in ran[1]
    assert len(lines) == 2 + len(ROWS)
    field_study.main(["field", "--records", str(folder), "--no_runs", "--table", "search"])
    assert "| vera | 0.005: 10.0, 0.01: 20.0, 0.02: 15.0 |  |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e-2, [5e-3, 1e-2, 2e-2]),
        (8e-2, [5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 16e-2]),
        (1.25e-3, [5e-3, 1e-2, 2e-2, 2.5e-3, 1.25e-3, 6.25e-4]),
        (0.0, [5e-3, 1e-2, 2e-2, *(5e-3 / 2**n for n in range(1, 6))]),
    ],
)
def test_a_search_goes_on_while_the_best_stands_at_an_end(best, tried, monkeypatch):
    """Down where all are as good, and never beyond eight rates."""
    ran = []

    def run(key, options):
        ran.append(key[2])
        return record(100 - abs(math.log2(key[2] / best)) if best else 0)

    monkeypatch.setattr(field_study, "run", run)
    options = argparse.Namespace(epochs=3, search_seeds=[10])
    found = {}
    assert field_study.search("vera", found, options) == (best or min(tried))
    assert ran == tried


def test_the_search_must_not_see_the_seeds_of_the_table():
    with pytest.raises(ValueError, match="seed 4 is in --search_seeds and --seeds"):
        field_study.main(["field", "--search_seeds", "4"])


def test_sizes_are_measured_into_the_file_beside_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(field_study, "measure", lambda names: {name: {"stored": 2} for name in names})
    before = {"rows": {"vera": {"stored": 1}, "recipe": {"stored": 1}}}
    (tmp_path / "steps.json").write_text(json.dumps(before))
    field_study.main(["field", "--rows", "vera", "vera", "--measure", str(tmp_path / "steps.json")])
    found = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert found == {"vera": {"stored": 2}, "recipe": {"stored": 1}}
