"""One bank for many tasks: every variant on a tiny encoder, and the table from records."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import many_loop
import many_tasks
import many_variants
import vblora
from glue_tasks import TASKS
from many_loop import Settings
from many_variants import TOGETHER, Refinement, Run
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


@pytest.fixture()
def small(encoder, monkeypatch):
    """The tiny encoder, and 32 rows of a task."""
    monkeypatch.setattr(many_loop, "MINILM", str(encoder))
    monkeypatch.setattr(many_tasks, "Settings", lambda: Settings(most_rows=32))


def test_every_variant_runs_and_what_has_a_record_is_not_run_again(glue, small, tmp_path, monkeypatch, capsys):
    variants = [name for name in many_tasks.VARIANTS if name != "lorashare"]
    call = ["many", "--glue_dir", str(glue), "--unseen", "sst2", "--seeds", "0", "--runs", str(tmp_path / "runs")]
    many_tasks.main([*call, "--variants", *variants, "--collect", str(tmp_path / "kept")])
    printed = capsys.readouterr().out
    records = {v: read_json(tmp_path / "kept" / f"sst2_{v}_seed0.json") for v in variants}
    assert all(len(record["scores"]) == Settings().epochs for record in records.values())
    assert records["own"]["settings"]["most_rows"] == 32
    together = read_json(tmp_path / "kept" / "without_sst2_seed0.json")
    assert set(together["scores"]) == {"cola", "mrpc", "qnli"}
    assert records["head"]["bytes"] == 0 < records["refined"]["bytes"] and records["selection"]["bytes"] > 0
    assert records["added"]["bytes"] == records["small"]["bytes"] < 5000
    assert records["added_int4"]["bytes"] == records["small_int4"]["bytes"] < 5000
    monkeypatch.setattr(many_tasks.Study, "train", lambda *_: pytest.fail("ran again"))
    many_tasks.main([*call, "--variants", *variants])
    again = capsys.readouterr().out
    assert again.splitlines() == printed.splitlines()[-len(again.splitlines()) :]


def test_a_folder_of_other_rows_or_settings_is_refused(glue, small, tmp_path, monkeypatch):
    """What has a record there would pass for one of these."""
    call = ["many", "--unseen", "sst2", "--variants", "own", "--seeds", "0", "--runs", str(tmp_path / "runs")]
    many_tasks.main([*call, "--glue_dir", str(glue)])
    shutil.copytree(glue, tmp_path / "other")
    with (tmp_path / "other" / TASKS["cola"].folder / "train.tsv").open("a") as file:
        file.write("x\t1\t\tOne more sentence.\n")
    with pytest.raises(ValueError, match=r"holds a run with other settings \(rows: "):
        many_tasks.main([*call, "--glue_dir", str(tmp_path / "other")])
    monkeypatch.setattr(many_tasks, "Settings", lambda: Settings(most_rows=32, epochs=1))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(epochs: 3 before, 1 now"):
        many_tasks.main([*call, "--glue_dir", str(glue)])


def test_a_run_draws_the_same_whether_what_it_starts_from_was_there(glue, small, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(many_variants, "file_bytes", lambda tensors: trained.append(dict(tensors)) or 1)
    call = ["many", "--glue_dir", str(glue), "--unseen", "sst2", "--variants", "refined", "--seeds", "0"]
    runs = tmp_path / "runs"
    for _ in range(2):
        many_tasks.main([*call, "--runs", str(runs)])
        shutil.rmtree(runs / "sst2_refined_seed0")  # the other tasks' adapter stays
    one, other = trained
    assert one["u"].any() and all(torch.equal(one[name], other[name]) for name in ("u", "v"))


def run_of(glue, seed=0):
    settings = Settings(most_rows=32, batch=8, epochs=2)
    model, tokenizer = many_loop.encoder(seed)
    return Run(model, many_loop.rows_of("sst2", glue, tokenizer, seed, settings), seed, glue, settings)


@pytest.mark.parametrize("variant", ["selection", "refined", "added", "head", "own", "small"])
def test_each_variant_trains_what_it_says(variant, glue, small, monkeypatch):
    """By name, all that has moved when the run is over."""
    run = run_of(glue)

    def together(self):
        config = vblora.VBLoRAConfig(target_modules=["query"], r=2, num_vectors=8, vector_length=16)
        adapter = vblora.attach(self.model, config)
        adapter.vector_bank.requires_grad_(False)
        return adapter

    monkeypatch.setattr(Run, "together", together)
    before = {}
    train = Run.train

    def look(self, groups, model=None):
        before.update({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return train(self, groups, model)

    monkeypatch.setattr(Run, "train", look)
    monkeypatch.setattr(many_variants, "packed", SimpleNamespace(read=lambda path: SimpleNamespace(tensors={})))
    monkeypatch.setattr(many_variants.VBLoRA, "load_tensors", lambda *_: None)  # what is rounded moves too
    many_variants.VARIANTS[variant](run)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in moved if not any(part in many_loop.HEAD for part in name.split("."))}
    assert moved - adapters
    ends = {
        "selection": {"topk_logits"},
        "refined": {"parametrizations.vector_bank.0.u", "parametrizations.vector_bank.0.v"},
        "added": {"small_adapter.vector_bank"},
        "head": set(),
        "own": {"vector_bank"},
        "small": {"small_adapter.vector_bank"},
    }[variant]
    assert len(adapters) == len(ends) and all(any(name.endswith(end) for name in adapters) for end in ends)


def test_a_refined_bank_starts_as_it_was_and_moves_by_the_rank(encoder):
    model = many_loop.load_classifier(str(encoder), 2, many_loop.HEAD, "--model")[0]
    adapter = vblora.attach(model, vblora.VBLoRAConfig(target_modules=["query"], r=2, num_vectors=8, vector_length=16))
    bank = adapter.vector_bank.detach().clone()
    change = Refinement(8, 16, 2)
    many_variants.parametrize.register_parametrization(adapter, "vector_bank", change)
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
            size = 4600 if variant == "refined" else 110000
            record = {"unseen": "sst2", "variant": variant, "seed": seed, "scores": [0, score], "bytes": size}
            (tmp_path / f"sst2_{variant}_seed{seed}.json").write_text(json.dumps(record))
    many_tasks.main(["many", "--records", str(tmp_path), "--no_runs", "--seeds", "0", "1", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| sst2 | own | 110,000 | 82.0 ± 2.0 | 80.0 82.0 84.0 |")
    assert lines[3] == "| sst2 | refined | 4,600 | 77.0 ± 1.0 | 76.0 77.0 78.0 | -5.0 [-7.5, -2.5] | 0.013 | below |"


def test_what_is_missing_is_named_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--glue_dir"):
        many_tasks.main(["many"])
    with pytest.raises(ValueError, match="none is no folder"):
        many_tasks.main(["many", "--records", str(tmp_path / "none"), "--no_runs"])
    kept = {"unseen": "sst2", "variant": "own", "seed": 0, "scores": [80.0], "bytes": 9}
    for change, message in (
        ({"bytes": None}, r"sst2_own_seed0\.json: no record of a run, or a damaged one: bytes is None"),
        ({"variant": "lora"}, r"sst2_own_seed0\.json is no record of this run: variant is lora"),
        ({"scores": []}, r"sst2_own_seed0\.json has no scores"),
    ):
        (tmp_path / "sst2_own_seed0.json").write_text(json.dumps({**kept, **change}))
        with pytest.raises(ValueError, match=message):
            many_tasks.main(["many", "--records", str(tmp_path), "--no_runs"])
    monkeypatch.setattr(many_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lorashare is missing"):
        many_tasks.main(["many", "--glue_dir", str(tmp_path)])
