"""One bank for many tasks: every variant on a tiny encoder, and the table from records."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import many_tasks
import vblora
from many_tasks import TASKS, TOGETHER, Refinement
from vblora.io import read_json


@pytest.fixture(scope="module")
def glue(data, tmp_path_factory):
    """The generated sentences as each of the four tasks."""
    folder = tmp_path_factory.mktemp("glue")
    lines = {
        part: [line for name in names for line in (data / f"{name}.tsv").read_text().splitlines()]
        for part, names in {"train": ["train"], "dev": ["dev_in_domain", "dev_out_of_domain"]}.items()
    }
    for task in TOGETHER:
        row = TASKS[task]
        (folder / row.folder).mkdir()
        if task == "cola":
            for part in lines:
                (folder / row.folder / f"{part}.tsv").write_text("\n".join(lines[part]) + "\n")
            continue
        for part, rows in lines.items():
            cells = [line.split("\t") for line in rows]
            numbers = task == "qnli"  # whose labels are words
            written = ["\t".join(row.tsv_columns)]
            for cell in cells:
                label = row.labels[int(cell[1])] if numbers else cell[1]
                written.append("\t".join([*[cell[3]] * (len(row.tsv_columns) - 1), label]))
            (folder / row.folder / f"{part}.tsv").write_text("\n".join(written) + "\n")
    return folder


def test_every_variant_runs_and_what_has_a_record_is_not_run_again(glue, encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(many_tasks, "MINILM", str(encoder))
    monkeypatch.setattr(many_tasks, "MOST_ROWS", 32)
    variants = [name for name in many_tasks.VARIANTS if name != "lorashare"]
    call = ["many", "--glue_dir", str(glue), "--unseen", "sst2", "--seeds", "0", "--runs", str(tmp_path / "runs")]
    many_tasks.main([*call, "--variants", *variants, "--collect", str(tmp_path / "kept")])
    printed = capsys.readouterr().out
    records = {v: read_json(tmp_path / "kept" / f"sst2_{v}_seed0.json") for v in variants}
    assert all(len(record["scores"]) == many_tasks.EPOCHS for record in records.values())
    together = read_json(tmp_path / "runs" / "without_sst2_seed0" / "record.json")
    assert set(together["scores"]) == {"cola", "mrpc", "qnli"}
    assert records["head"]["bytes"] == 0 < records["refined"]["bytes"] and records["selection"]["bytes"] > 0
    assert records["added"]["bytes"] == records["small"]["bytes"] < 5000
    assert records["added_int4"]["bytes"] == records["small_int4"]["bytes"] < 5000
    monkeypatch.setattr(many_tasks, "run", lambda *_: pytest.fail("ran again"))
    many_tasks.main([*call, "--variants", *variants])
    again = capsys.readouterr().out
    assert again.splitlines() == printed.splitlines()[-len(again.splitlines()) :]
    shutil.copytree(glue, tmp_path / "other")
    with (tmp_path / "other" / TASKS["cola"].folder / "train.tsv").open("a") as file:
        file.write("x\t1\t\tOne more sentence.\n")
    with pytest.raises(ValueError, match="holds runs on other rows of cola: give another --runs"):
        many_tasks.main([*call, "--variants", "own", "--glue_dir", str(tmp_path / "other")])


def test_a_refined_bank_starts_as_it_was_and_moves_by_the_rank(encoder):
    model = many_tasks.load_classifier(str(encoder), 2, many_tasks.HEAD, "--model")[0]
    adapter = vblora.attach(model, vblora.VBLoRAConfig(target_modules=["query"], r=2, num_vectors=8, vector_length=16))
    bank = adapter.vector_bank.detach().clone()
    change = Refinement(8, 16, 2)
    many_tasks.parametrize.register_parametrization(adapter, "vector_bank", change)
    assert torch.equal(adapter.vector_bank, bank)
    with torch.no_grad():
        change.u.normal_()
    moved = adapter.vector_bank - bank
    torch.testing.assert_close(moved, change.u @ change.v)
    assert torch.linalg.matrix_rank(moved) == 2


def test_the_table_from_records(tmp_path, capsys):
    """Differences -4, -5, -6: t = 5 sqrt(3), half width 4.3027 / sqrt(3)."""
    for variant, scores in {"own": (80, 82, 84), "refined": (76, 77, 78)}.items():
        for seed, score in enumerate(scores):
            record = {"scores": [0, score], "bytes": 4600 if variant == "refined" else 110000}
            (tmp_path / f"sst2_{variant}_seed{seed}.json").write_text(json.dumps(record))
    many_tasks.main(["many", "--records", str(tmp_path), "--no_runs", "--seeds", "0", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| sst2 | own | 110,000 | 82.0 ± 2.0 | 80.0 82.0 84.0 |")
    assert lines[3] == "| sst2 | refined | 4,600 | 77.0 ± 1.0 | 76.0 77.0 78.0 | -5.0 [-7.5, -2.5] | 0.013 | below |"


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--glue_dir"):
        many_tasks.main(["many"])
    monkeypatch.setattr(many_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lorashare is missing"):
        many_tasks.main(["many", "--glue_dir", str(tmp_path)])
