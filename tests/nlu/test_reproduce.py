"""Whole tables: the plan, the runs of a tiny one, and the table from records."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest

import experiments
import hyperparameters
import paper
import reproduce
import table
from experiments import Trial
from vblora.io import read_json, write_json
from vblora_experiments import campaign
from vblora_experiments.arguments import OF_RECIPE

GLUE = reproduce.Glue()


def cut(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    return campaign.cut(arguments, GLUE.own_flags)


def record(trial: Trial, best: float, last: float, parameters: int = 23_904) -> dict:
    metric = {"cola": "matthews_correlation", "stsb": "pearson"}.get(trial.task, "accuracy")
    return {
        "experiment": "glue",
        "row": trial.row,
        "overrides": dict(trial.overrides),
        "seed": trial.seed,
        "task": trial.task,
        "method": trial.method,
        "settings": hyperparameters.row(trial.row)
        | trial.overrides
        | ({"start_from": "f" * 64} if trial.from_mnli else {})
        | ({"bank_from": "f" * 64} if trial.bank_of else {}),
        "scores": {"metric": metric, "best": {metric: best, "epoch": 3.0}, "last": {metric: last, "epoch": 5.0}},
        "stored_parameters": {"parameters": parameters, "bytes": 4 * parameters},
        "train_seconds": 600.0,
    }


def test_table_1_is_the_papers_rows_tasks_and_seeds():
    trials = GLUE.plan(campaign.parse(GLUE, ["table1"]), {})
    assert len(trials) == 2 * 9 * 6 * 5
    printed = {(model, method) for model, method in paper.TABLE_1}
    planned = {(t.model, t.method) for t in trials}
    # Beyond the paper: full fine-tuning of large, which it does not print, and LoRA-XS.
    assert planned - printed == {("roberta_large", "full"), ("roberta_base", "lora_xs"), ("roberta_large", "lora_xs")}
    assert printed <= planned
    assert len({t.name for t in trials}) == len(trials)


def test_filters_leave_what_they_name():
    options = ["table1", "--sizes", "large", "--tasks", "cola", "rte", "--methods", "vblora_qv", "--seeds", "3", "7"]
    trials = GLUE.plan(campaign.parse(GLUE, options), {})
    assert [t.name for t in trials] == [
        f"roberta_large_{task}_vblora_qv_seed{seed}" for seed in (3, 7) for task in ("cola", "rte")
    ]


def test_the_ablations_have_the_papers_variants_and_share_table_1s_run():
    for name, printed in (("table5", paper.TABLE_5), ("table6", paper.TABLE_6)):
        trials = GLUE.plan(campaign.parse(GLUE, [name, "--seeds", "0"]), {})
        assert {table.variant_name(t, name) for t in trials} == printed.keys()
        assert {(t.model, t.task, t.method) for t in trials} == {("roberta_large", "cola", "vblora_qv")}
    table5 = GLUE.plan(campaign.parse(GLUE, ["table5", "--seeds", "0"]), {})
    (as_it_stands,) = [t for t in table5 if not t.overrides]
    assert as_it_stands.name == "roberta_large_cola_vblora_qv_seed0"
    for study in experiments.ABLATIONS.values():
        for model in hyperparameters.MODELS:
            for changes in study.of(model).values():
                assert all(isinstance(value, (int, float, str)) for value in changes.values())


def test_the_sub_vectors_of_table_6_keep_the_banks_size():
    study = experiments.ABLATIONS["table6"]
    for model, size in (("roberta_large", 30_720), ("minilm", 11_520)):
        assert {c["vector_length"] * c["num_vectors"] for c in study.of(model).values()} == {size}


def test_the_mnli_start_is_planned_first_and_its_runs_wait_for_it(tmp_path):
    options = campaign.parse(
        GLUE, ["table1", "--mnli_start", "--tasks", "cola", "rte", "--methods", "vblora_qv", "--runs", str(tmp_path)]
    )
    trials = GLUE.plan(options, {})
    assert {t.task: t.from_mnli for t in trials} == {"cola": False, "rte": True}
    rte = next(t for t in trials if t.task == "rte")
    start = rte.start()
    assert start.row == "roberta_base/mnli/vblora_qv" and start.overrides == {"form": "full"}
    job = GLUE.job(rte, options, {})
    assert job.after == [start.name] and str(tmp_path / start.name / "best") in job.command
    assert not rte.is_of(record(Trial(rte.row), 0.8, 0.8)) and rte.is_of(record(rte, 0.8, 0.8))


def test_a_further_task_waits_for_the_run_that_gives_its_bank(tmp_path):
    options = campaign.parse(GLUE, ["shared_bank", "--sizes", "minilm", "--seeds", "3", "--runs", str(tmp_path)])
    own, shared, faster, _ = GLUE.plan(options, {})
    assert own.name == "minilm_mrpc_vblora_all_seed3" and shared.name == "minilm_mrpc_vblora_all_bank_of_cola_seed3"
    job = GLUE.job(shared, options, {})
    assert job.after == ["minilm_cola_vblora_all_seed3"]
    assert job.command[-2:] == ["--bank_from", str(tmp_path / "minilm_cola_vblora_all_seed3" / "best")]
    assert not own.is_of(record(shared, 0.8, 0.8)) and not shared.is_of(record(own, 0.8, 0.8))
    assert shared.is_of(record(shared, 0.8, 0.8)) and not faster.is_of(record(shared, 0.8, 0.8))
    assert faster.start() == shared.start()  # the bank is the same


CELL_SCORES = {0: (0.630, 0.610), 1: (0.640, 0.600), 2: (0.655, 0.605)}


def cola_records():
    return [record(Trial("roberta_base/cola/vblora_qv", seed=s), *scores) for s, scores in CELL_SCORES.items()]


def test_a_cell_is_the_median_over_seeds_beside_the_papers_figure():
    trials = [Trial("roberta_base/cola/vblora_qv", seed=seed) for seed in range(5)]
    (cell,) = table.cells(trials, cola_records())
    assert cell.seeds == 3 and cell.best == pytest.approx(64.0) and cell.last == pytest.approx(60.5)
    assert cell.best_sd == pytest.approx(1.2583, abs=1e-3) and cell.last_sd == pytest.approx(0.5)
    assert (cell.paper, cell.paper_parameters) == (63.3, 0.023)
    assert cell.difference == pytest.approx(0.7)


def test_the_table_in_three_formats():
    trials = [Trial(f"roberta_base/{task}/vblora_qv", seed=s) for task in ("cola", "mrpc") for s in range(3)]
    found = [*cola_records(), record(Trial("roberta_base/mrpc/vblora_qv"), 0.895, 0.89)]
    cells = table.cells(trials, found)
    lines = table.render_cells(cells, "table1", "markdown").splitlines()
    assert lines[0] == "| model | method | # params |  | MRPC | CoLA | average |"
    assert lines[2] == "| RoBERTa-base | VB-LoRA qv | 0.024M | best epoch | 89.5 (1) | 64.0 ± 1.3 (3) | 76.8 |"
    assert lines[3] == "|  |  |  | last epoch | 89.0 | 60.5 ± 0.5 | 74.8 |"
    assert lines[4] == "|  |  | 0.023M | paper | 89.5 | 63.3 | 76.4 |"
    assert lines[5] == "|  |  |  | difference | +0.0 | +0.7 | +0.4 |"
    latex = table.render_cells(cells, "table1", "latex")
    assert r"\# params" in latex and r"64.0 $\pm$ 1.3 (3)" in latex and latex.endswith(r"\end{tabular}")
    rows = list(csv.DictReader(io.StringIO(table.render_cells(cells, "table1", "csv"))))
    assert [row["task"] for row in rows] == ["cola", "mrpc"]
    assert float(rows[0]["best"]) == 64.0 and rows[1]["best_sd"] == "" and float(rows[0]["difference"]) == 0.7


def test_an_ablation_names_its_variants_and_drops_the_paper_where_it_has_none():
    trials = GLUE.plan(campaign.parse(GLUE, ["table5", "--seeds", "0", "--sizes", "large", "minilm"]), {})
    found = [record(t, 0.683, 0.68) for t in trials if table.variant_name(t, "table5") in ("top2", "gumbel_top1")]
    lines = table.render_cells(table.cells(trials, found, "table5"), "table5", "markdown").splitlines()
    assert "| RoBERTa-large | CoLA | top2 | 0.024M | 1 | 68.3 | 68.0 | 68.3 | +0.0 |" in lines
    assert "| RoBERTa-large | CoLA | gumbel top1 | 0.024M | 1 | 68.3 | 68.0 | 57.1 | +11.2 |" in lines
    assert "| MiniLM-L6 | CoLA | top2 | 0.024M | 1 | 68.3 | 68.0 |  |  |" in lines
    small = [cell for cell in table.cells(trials, found, "table5") if cell.model == "minilm"]
    assert "paper" not in table.render_cells(small, "table5", "markdown")


def test_lengths_are_estimated_from_records_or_else_from_the_paper():
    trial = Trial("roberta_base/cola/vblora_qv", seed=1)
    assert GLUE.estimate(trial, [])[0] == 80
    assert GLUE.estimate(Trial("roberta_base/cola/lora_qv"), [])[0] == 80  # as many epochs
    assert GLUE.estimate(Trial("roberta_base/cola/full"), [])[0] == 10  # 10 epochs of 80
    assert GLUE.estimate(Trial("minilm/cola/full"), []) == (None, "")
    minutes, source = GLUE.estimate(trial, cola_records())  # 600 seconds for 5 of 80 epochs
    assert minutes == pytest.approx(160) and source == "from this row's records"


def test_flags_after_the_dashes_go_to_every_run_and_into_its_name():
    arguments, extra = cut(["table1", "--plan", "--", "--bf16", "true", "--use_cpu=true"])
    assert arguments == ["table1", "--plan"] and extra == {"bf16": "true", "use_cpu": "true"}
    trial = GLUE.plan(campaign.parse(GLUE, arguments), {"bf16": "true", "use_cpu": "true"})[0]
    assert trial.name == "roberta_base_sst2_full_bf16_true_seed0" and trial.overrides == {"bf16": "true"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["table1", "--tasks", "wnli"], "unknown task 'wnli'"),
        (["table1", "--tasks", "mnli"], "unknown task 'mnli'"),
        (["table1", "--methods", "dora"], "unknown method 'dora'"),
        (["table1", "--variants", "top1"], "--variants is not for table1"),
        (["table5", "--methods", "full"], "--methods is for table1 only"),
        (["table5", "--mnli_start"], "--mnli_start is for table1 only"),
        (["table5", "--variants", "top9"], "table5 has no variant 'top9'"),
        (["table1", "--plan", "--no_runs"], "exclude each other"),
        (["table1", "--glue_dir", "nonesuch"], "nonesuch: no such folder"),
        (["table1", "--jobs", "0"], "--jobs must be at least 1"),
        (["table1", "--no_runs", "--runs", "nonesuch"], "no record of table1"),
        (["table1", "--", "--bf16"], "flags with one value each"),
        (["table1", "--", "--seed", "3"], '--seed after "--" would undo the plan'),
        (["table1", "--", "--num_train_epochs", "many"], "num_train_epochs.*invalid float value: 'many'"),
        (["table1", "--watch", "--", "--num_train_epochs", "many"], "--num_train_epochs 'many' is no number"),
        (["table1", "--sizes", "minilm", "--", "--nonesuch", "3"], "unrecognized arguments|nonesuch"),
        (["table1", "--plan", "--", "--rnak", "2"], "unrecognized arguments: --rnak 2"),
        (["table1", "--records", "nonesuch"], "nonesuch: no such file or folder"),
        (["table1", "--glue_dir", "."], "--glue_dir . has no folder SST-2"),
        (["table1", "--models_dir", "."], "--models_dir . has no folder roberta-base"),
        (["table1", "--on", "ray", "--jobs", "2"], "--jobs does nothing with --on ray"),
        (["table1", "--cluster", "c.yaml"], "--cluster does nothing with --on local"),
        (["table1", "--stop"], "--stop does nothing with --on local"),
        (["table1", "--watch", "--plan"], "exclude each other"),
        (["table1", "--on", "slurm", "--cluster", "none.yaml"], "--cluster none.yaml cannot be read"),
        (["table1", "--sizes", "minilm", "--on", "ray", "--", "--hub_token", "x"], "--hub_token would stand in files"),
    ],
)
def test_wrong_input_is_a_value_error_that_names_it(wrong, message):
    with pytest.raises(ValueError, match=message):
        reproduce.main(wrong)


def test_a_small_table_from_nothing_then_nothing_to_do(encoder, data, tmp_path, monkeypatch, capsys):
    """Two seeds on a tiny encoder, by the real command; the second call finds everything done."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "roberta-base").symlink_to(encoder)
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "CoLA").symlink_to(data)
    places = ["--glue_dir", str(tmp_path / "glue"), "--models_dir", str(tmp_path / "models")]
    places += ["--runs", str(tmp_path / "runs"), "--collect", str(tmp_path / "kept"), "--jobs", "2"]
    small = ["--", "--num_train_epochs", "1", "--vector_length", "16", "--max_length", "32", "--use_cpu", "true"]
    methods = ["table1", "--sizes", "base", "--tasks", "cola", "--methods", "vblora_qv", "--seeds", "0", "1"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reproduce.main([*methods, *places, *small])
    out, progress = capsys.readouterr()
    assert "2 runs, of which 2 are to be done, 2 at a time" in progress and progress.count("done after") == 2
    assert "| RoBERTa-base | VB-LoRA qv |" in out and "(2)" in out and "done" not in out
    assert "With --num_train_epochs 1 --vector_length 16 --max_length 32" in out
    assert sorted(p.name for p in (tmp_path / "kept").glob("*.json")) == sorted(
        f"{t.name}.json" for t in GLUE.plan(campaign.parse(GLUE, methods), cut(small)[1])
    )
    assert len(list((tmp_path / "kept" / "selections").iterdir())) == 1  # of seed 0
    reproduce.main([*methods, *places, *small])
    assert "2 runs, of which 0 are to be done" in capsys.readouterr().err
    reproduce.main([*methods, *places, "--watch", *small])
    watched = capsys.readouterr().out
    assert "2 runs: 2 done" in watched and watched.count("matthews_correlation") == 2
    latex = tmp_path / "table.tex"
    reproduce.main([*methods, *places, "--no_runs", "--format", "latex", "--output", str(latex), *small])
    assert latex.read_text().startswith(r"\begin{tabular}")


def test_rows_start_from_mnli_end_to_end(encoder, tmp_path, capsys):
    """MNLI first, by each method; then RTE from it; then nothing to do; and the dagger says so."""
    for folder, labels in (("MNLI", 3), ("RTE", 2)):
        (tmp_path / "glue" / folder).mkdir(parents=True)
        for name in ("train", "dev_matched" if folder == "MNLI" else "dev"):
            texts = [("premise", "hypothesis") if folder == "MNLI" else ("sentence1", "sentence2")] * 24
            rows = [{one: f"a b {i}", other: f"b {i}", "label": i % labels} for i, (one, other) in enumerate(texts)]
            (tmp_path / "glue" / folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "roberta-base").symlink_to(encoder)
    command = ["table1", "--sizes", "base", "--tasks", "rte", "--methods", "vblora_qv", "--seeds", "0", "--mnli_start"]
    command += ["--glue_dir", str(tmp_path / "glue"), "--models_dir", str(tmp_path / "models")]
    command += ["--runs", str(tmp_path / "runs")]
    small = ["--", "--num-train-epochs", "1", "--vector_length", "16", "--max_length", "32", "--use_cpu", "true"]
    reproduce.main([*command, *small])
    out, progress = capsys.readouterr()
    assert "2 runs, of which 2 are to be done" in progress
    assert progress.index("roberta_base_mnli_vblora_qv") < progress.index("roberta_base_rte_vblora_qv")
    assert "(1)† |" in out and "† started from the adapter trained on MNLI." in out
    reproduce.main([*command, *small])
    assert "0 are to be done" in capsys.readouterr().err


def test_a_record_of_other_numbers_is_not_the_trials():
    trial = Trial("roberta_base/cola/vblora_qv", extra={"bf16": "true"})
    good = record(trial, 0.6, 0.6)
    assert trial.is_of(good)
    for change in ({"learning_rate": 0.5}, {"model_name_or_path": "roberta-large"}, {"init_logits_std": 0.5}):
        other = good | {"settings": good["settings"] | change}
        assert not trial.is_of(other) and trial.differences(other) == list(change)
    local = good | {"settings": good["settings"] | {"model_name_or_path": "roberta-base", "learning_rate": "2e-2"}}
    assert trial.is_of(local)


def test_a_record_of_a_recipe_that_kept_the_rows_numbers_is_not_the_trials():
    """Once --recipe beside a row left all of the row's numbers in their place."""
    options = ["table1", "--tasks", "cola", "--methods", "vblora_qv", "--sizes", "minilm", "--seeds", "0"]
    (trial,) = GLUE.plan(campaign.parse(GLUE, options), {"recipe": "true", "num_vectors": "50"})
    before = record(trial, 0.1, 0.1)
    assert before["settings"]["topk"] == 2 and not trial.is_of(before)
    today = {
        name: value for name, value in before["settings"].items() if name not in OF_RECIPE or name == "num_vectors"
    }
    assert trial.is_of({**before, "settings": today})
    assert not trial.is_of({**before, "settings": {**today, "num_vectors": 40}})
    off = dataclasses.replace(trial, extra={"recipe": "false"})
    assert off.is_of(record(off, 0.1, 0.1))


def test_the_recipe_is_refused_where_the_bank_is_another_tasks():
    options = campaign.parse(GLUE, ["shared_bank", "--sizes", "minilm"])
    with pytest.raises(ValueError, match=r"--recipe selects one vector, .*: --topk 2"):
        GLUE.plan(options, {"recipe": "true"})
    assert GLUE.plan(options, {"recipe": "true", "topk": "2"})


def test_records_of_different_data_are_not_one_cell():
    trials = [Trial("roberta_base/cola/vblora_qv", seed=seed) for seed in range(2)]
    found = [record(t, 0.6, 0.6) | {"data": {"fingerprint": str(t.seed), "train_rows": 10 + t.seed}} for t in trials]
    with pytest.raises(ValueError, match="made on different data"):
        table.cells(trials, found)


def test_the_log_of_each_run_is_its_own():
    for name in experiments.ABLATIONS:
        options = campaign.parse(GLUE, [name, "--sizes", "minilm"])
        logs = [GLUE.job(trial, options, {}).log for trial in GLUE.plan(options, {})]
        assert len(set(logs)) == len(logs)


def test_the_same_value_twice_is_one_run():
    twice = [
        "table1",
        "--seeds",
        "0",
        "0",
        "--tasks",
        "cola",
        "cola",
        "--methods",
        "full",
        "full",
        "--sizes",
        "base",
        "base",
    ]
    assert len(GLUE.plan(campaign.parse(GLUE, twice), {})) == 1


def test_what_is_collected_can_be_collected_again(tmp_path):
    run = tmp_path / "runs" / "by_a_script"
    write_json(run / "record.json", cola_records()[0])
    (run / "selections.safetensors").write_bytes(b"log")
    command = ["table1", "--no_runs", "--runs", str(tmp_path / "none"), "--seeds", "0", "--tasks", "cola"]
    reproduce.main([*command, "--records", str(tmp_path / "runs"), "--collect", str(tmp_path / "kept")])
    reproduce.main([*command, "--records", str(tmp_path / "kept"), "--collect", str(tmp_path / "again")])
    for folder in ("kept", "again"):
        assert read_json(tmp_path / folder / "roberta_base_cola_vblora_qv_seed0.json") == cola_records()[0]
        log = tmp_path / folder / "selections" / "roberta_base_cola_vblora_qv_seed0.safetensors"
        assert log.read_bytes() == b"log"


def test_a_run_that_fails_is_named_and_the_others_are_in_the_table(encoder, data, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "roberta-base").symlink_to(encoder)
    (tmp_path / "glue" / "MRPC").mkdir(parents=True)  # without files
    (tmp_path / "glue" / "CoLA").symlink_to(data)
    command = ["table1", "--sizes", "base", "--tasks", "cola", "mrpc", "--methods", "full", "--seeds", "0"]
    places = ["--glue_dir", str(tmp_path / "glue"), "--models_dir", str(tmp_path / "models")]
    small = ["--", "--num_train_epochs", "1", "--max_length", "32", "--use_cpu", "true"]
    with pytest.raises(
        ValueError, match=r"1 of 2 runs failed: roberta_base_mrpc_full_.*seed0; .* table is of the others"
    ):
        reproduce.main([*command, *places, "--runs", str(tmp_path / "runs"), *small])
    out, progress = capsys.readouterr()
    assert "FAILED (exit code 2" in progress and "| RoBERTa-base | full fine-tuning |" in out
