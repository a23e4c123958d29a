"""The figures: what they show, from logs and records made up here, and what is said where runs are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection

import figures
import table
from experiments import Trial, ablation
from figures import Point, Source
from vblora.io import write_json, write_tensors
from vblora_experiments.selection_log import read_log

LAYERS = [f"encoder.layer.{block}.attention.self.{module}" for block in range(6) for module in ("query", "value")]
ROWS = 5  # sub-vectors in a factor: 6 blocks x 2 modules x 2 factors x 5 = 120 of them
ROW = Trial("minilm/cola/vblora_qv")
ABLATED = [
    *ablation("table5", ["minilm"], ["cola"], ["top1", "top3", "noisy_top2"], [0]),
    *ablation("table6", ["minilm"], ["cola"], ["b384_h30"], [0]),
]


def write_log(path: Path, h: int = 24, topk: int = 2, epochs: int = 3, b: int = 8, seed: int = 0) -> None:
    """A log of a training in which every sub-vector selects at random, epoch after epoch."""
    random = np.random.default_rng(seed)
    n = len(LAYERS) * 2 * ROWS
    indices = random.random((epochs + 1, n, h)).argsort(axis=2)[:, :, :topk]
    footprints = random.random((epochs, n, h)) < 0.1
    for epoch in range(epochs):  # what an epoch begins and ends with was selected in it
        for snapshot in indices[epoch : epoch + 2]:
            np.put_along_axis(footprints[epoch], snapshot, True, axis=1)
    weights = random.dirichlet(np.ones(topk), (epochs + 1, n))
    tensors = {
        "indices": torch.from_numpy(indices).to(torch.uint8),
        "weights": torch.from_numpy(weights).to(torch.float16),
        "footprints": torch.from_numpy(np.packbits(footprints, axis=2)),
        "changes": torch.arange(epochs),
        "epochs": torch.arange(epochs + 1, dtype=torch.float32),
        "bank": torch.from_numpy(random.standard_normal((h, b))).to(torch.float16),
    }
    factors = [[layer, factor, ROWS] for layer in LAYERS for factor in "AB"]
    write_tensors(path, tensors, {"num_vectors": str(h), "factors": json.dumps(factors)})


def record_of(trial: Trial, score: float = 0.3, parameters: int = 1000) -> dict:
    scores = {"epoch": 3.0, "matthews_correlation": score}
    return {
        "experiment": "glue",
        "row": trial.row,
        "task": trial.task,
        "method": "vblora",
        "overrides": dict(trial.overrides),
        "seed": trial.seed,
        "settings": {**trial.row_flags(), **trial.overrides},
        "scores": {"metric": "matthews_correlation", "last": scores, "best": scores},
        "stored_parameters": {"parameters": parameters, "bytes": 4 * parameters},
    }


def collected(folder: Path, trials: list[Trial], **log: int) -> Path:
    """A folder of records, with logs beside them."""
    for trial in trials:
        write_json(folder / f"{trial.name}.json", record_of(trial))
        size = {"topk": int(trial.overrides.get("topk", 2)), "h": 30 if trial.variant == "b384_h30" else 24, **log}
        write_log(folder / "selections" / f"{trial.name}.safetensors", **size)
    return folder


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    """The records and logs that all figures need; three seeds of two methods."""
    folder = collected(tmp_path_factory.mktemp("records"), [ROW, *ABLATED])
    for method, parameters in (("lora_qv", 70_000), ("vblora_qv", 12_000)):
        for seed, score in enumerate((0.30, 0.34, 0.35)):
            trial = Trial(f"minilm/cola/{method}", seed=seed)
            write_json(folder / f"{trial.name}.json", record_of(trial, score, parameters))
    return folder


@pytest.fixture
def log(all_runs):
    return read_log(all_runs / "selections" / f"{ROW.name}.safetensors")


def test_all_figures_are_written_as_png(all_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "DPI", 60)  # half of it: faster to draw
    figures.main(["--records", str(all_runs), "--output", str(tmp_path)])
    names = [f"figure{number}.png" for number in (1, 3, 4, 5, 6, 7, 8, 9)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pixels = matplotlib.image.imread(tmp_path / name)
        assert pixels.shape[1] <= 720 and pixels.shape[0] <= 500
        assert (pixels[:, :, :3].min(axis=2) < 1).mean() > 0.01  # not empty


def test_runs_are_read_from_their_own_folders_too(tmp_path):
    folder = tmp_path / "runs" / ROW.name
    write_json(folder / "record.json", record_of(ROW))
    write_log(folder / "selections.safetensors")
    figures.main(["--records", str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--figures", "8"])
    assert (tmp_path / "out" / "figure8.png").exists()


# What is shown.


def test_footprint_is_the_union_over_epochs():
    steps = np.zeros((2, 3, 4), dtype=bool)
    steps[0, 0, 1] = steps[1, 0, 1] = steps[1, 2, 3] = True
    assert np.argwhere(figures.footprint(steps)).tolist() == [[0, 1], [2, 3]]


def test_overlap_tells_the_initial_from_the_final_selection():
    initial = figures.selected(np.array([[0, 1], [2, 3]]), 4)
    final = figures.selected(np.array([[1, 2], [3, 2]]), 4)
    assert figures.overlap(initial, final).tolist() == [[1, 3, 2, 0], [0, 0, 3, 3]]


def test_weight_sums_of_the_thirds_add_up_to_the_subvectors(log):
    sums = figures.sums_by(log, figures.thirds(log), figures.THIRDS)
    assert [s.shape for s in sums] == [(24,)] * 3
    assert [s.sum() for s in sums] == pytest.approx([40, 40, 40], rel=1e-3)  # 2 of 6 blocks each
    whole = figures.weight_sums(log.indices[-1], log.weights[-1], 24)
    assert np.sum(sums, axis=0) == pytest.approx(whole)
    by_hand = sum(w for j, w in zip(log.indices[-1].flat, log.weights[-1].flat, strict=True) if j == 5)
    assert whole[5] == pytest.approx(by_hand)


def test_rows_go_to_the_third_of_their_block(log):
    assert figures.thirds(log)[: 40 + 1] == ["first third"] * 40 + ["middle third"]
    assert figures.thirds(log._replace(factors=[("layer.0.q", "A", 1), ("layer.1.q", "A", 1)])) == [
        "first third",
        "middle third",
    ]
    with pytest.raises(ValueError, match="no block number in the layer's name pooler"):
        figures.thirds(log._replace(factors=[("pooler", "A", 120)]))


def test_usage_counts_the_subvectors_of_each_vector():
    counts = figures.usage(np.array([[0, 1], [1, 4], [1, 0]]), 6)
    assert counts.tolist() == [2, 3, 0, 0, 1, 0]
    [axes] = figures.draw_usage(counts, 3, "Use").axes
    assert [bar.get_height() for bar in axes.patches] == [3, 1, 1, 1]  # used by 0, 1, 2 and 3 sub-vectors
    assert "3 of 6 vectors are used" in axes.get_title()


def test_wide_counts_are_put_in_bins_that_hold_all_vectors():
    counts = np.arange(300)
    [axes] = figures.draw_usage(counts, 400, "Use").axes
    assert sum(bar.get_height() for bar in axes.patches) == 300 and len(axes.patches) <= 41


def test_mixtures_lie_between_their_vectors():
    points = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 8.0]])
    assert figures.mixtures(points, np.array([[0, 1]]), np.array([[0.75, 0.25]])).tolist() == [[1, 0]]
    assert figures.mixtures(points, np.array([[2]]), np.array([[1.0]])).tolist() == [[0, 8]]
    assert figures.mixtures(points, np.array([[0, 1, 2]]), np.array([[0.5, 0.25, 0.25]])).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("epochs", "sizes"), [(1, [1]), (3, [1] * 3), (40, [8] * 5), (20, [4] * 5), (80, [16] * 5), (11, [3, 3, 3, 2])]
)
def test_epochs_are_grouped_evenly_and_completely(epochs, sizes):
    groups = figures.epoch_groups(epochs)
    assert [len(group) for group in groups] == sizes
    assert np.concatenate(groups).tolist() == list(range(epochs))


@pytest.mark.parametrize(("count", "most", "shown"), [(5, 96, [0, 1, 2, 3, 4]), (10, 4, [0, 3, 6, 9]), (1, 1, [0])])
def test_shown_rows_are_evenly_spaced(count, most, shown):
    assert figures.evenly_spaced(count, most).tolist() == shown


def test_figure1_has_the_median_of_seeds_and_the_papers_points(all_runs):
    figure = figures.figure1(Source.of([all_runs], "cola", None))
    ours, papers = figure.axes
    assert {text.get_text() for text in ours.texts} == {"LoRA qv", "VB-LoRA qv"}
    points = [line.get_xydata()[0].tolist() for line in ours.lines if line.get_marker() in ("o", "D")]
    assert points == [pytest.approx([70_000, 34]), pytest.approx([12_000, 34])]
    assert len(papers.texts) == 7 and "as printed in the paper" in papers.get_title()
    assert (33_000, 69.3) in {tuple(map(float, line.get_xydata()[0])) for line in papers.lines}
    assert ours.get_xscale() == "log"


def test_labels_stay_apart_where_points_are_close():
    points = [Point(f"method number {i}", 1000.0 + 10 * i, 50 + 0.1 * i, 2.0, i == 0) for i in range(6)]
    figure = figures.draw_scores({"close": points}, "score")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_figure3_marks_footprints_and_final_selections(all_runs, log):
    figure = figures.figure3(Source.of([all_runs], "cola", None))
    titles = [axes.get_title().split(":")[0] for axes in figure.axes]
    assert titles == ["top-1", "top-2", "top-3", "noisy top-2"]
    shown = figures.evenly_spaced(120, 96)
    drawn = np.asarray(figure.axes[1].images[0].get_array()).T
    assert drawn.shape == (96, 24)
    assert np.array_equal(drawn > 0, log.footprints.any(axis=0)[shown])
    assert np.array_equal(drawn == 2, figures.selected(log.indices[-1], 24)[shown])
    assert f"{log.footprints.any(axis=0).mean():.1%}" in figure.axes[1].get_title()


def test_figure5_has_a_panel_for_each_of_three_epochs(all_runs, log):
    figure = figures.figure5(Source.of([all_runs], "cola", None))
    assert [axes.get_title().split(":")[0] for axes in figure.axes] == ["epoch 1", "epoch 2", "epoch 3"]
    drawn = np.asarray(figure.axes[2].images[0].get_array()).T
    assert np.array_equal(drawn == 1, log.footprints[2][figures.evenly_spaced(120, 96)])


def test_figure7_sums_by_module_and_by_factor(all_runs):
    figure = figures.figure7(Source.of([all_runs], "cola", None))
    sums = {axes.get_title().split(":")[0]: sum(bar.get_height() for bar in axes.patches) for axes in figure.axes}
    assert sums == pytest.approx({"query": 60, "value": 60, "factor A": 60, "factor B": 60}, rel=1e-3)


def test_figure9_draws_every_vector_and_every_subvector(all_runs):
    [axes] = figures.figure9(Source.of([all_runs], "cola", None)).axes
    sizes = [len(c.get_offsets()) for c in axes.collections if isinstance(c, PathCollection)]
    assert sizes[0] == 120 and sum(sizes[1:]) == 24


# What is said where something is missing.


def test_a_missing_run_is_named_with_its_command_and_the_other_figures_are_written(tmp_path):
    folder = collected(tmp_path / "records", [ROW])
    with pytest.raises(ValueError) as error:
        figures.main(["--records", str(folder), "--output", str(tmp_path / "out"), "--figures", "3", "4", "6", "8"])
    message = str(error.value)
    assert "figure 3: no record of minilm_cola_vblora_qv_top1_seed0, no record of minilm_cola_vblora_qv_top3" in message
    assert (
        "./scripts/reproduce.sh table5 --sizes minilm --tasks cola --variants top1 top3 noisy_top2 --seeds 0 "
        f"--collect {folder}" in message
    )
    assert "figure 4: no record of minilm_cola_vblora_qv_b384_h30_seed0; ./scripts/reproduce.sh table6" in message
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figure6.png", "figure8.png"]


def test_figures_that_miss_the_same_run_are_named_together(tmp_path):
    lora = Trial("minilm/cola/lora_qv")
    write_json(tmp_path / lora.name / "record.json", record_of(lora))
    with pytest.raises(ValueError) as error:
        figures.main(["--records", str(tmp_path), "--output", str(tmp_path / "out"), "--figures", "5", "6", "9"])
    assert str(error.value) == (
        "figure 5, 6, 9: no record of minilm_cola_vblora_qv_seed0; ./scripts/reproduce.sh table1 --sizes minilm "
        f"--tasks cola --methods vblora_qv --seeds 0 --runs {tmp_path} makes it"
    )


def test_a_record_without_its_log_is_named(tmp_path):
    write_json(tmp_path / f"{ROW.name}.json", record_of(ROW))
    with pytest.raises(ValueError, match=r"minilm_cola_vblora_qv_seed0 has a record but no .*seed0\.safetensors"):
        figures.main(["--records", str(tmp_path), "--output", str(tmp_path / "out"), "--figures", "6"])


def test_a_damaged_log_is_an_error_of_its_figures_alone(tmp_path):
    folder = collected(tmp_path / "records", [ROW])
    (folder / "selections" / f"{ROW.name}.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"figure 8: .* is no whole safetensors file"):
        figures.main(["--records", str(folder), "--output", str(tmp_path / "out"), "--figures", "8", "1"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["figure1.png"]


def test_records_of_an_ablation_alone_make_no_figure1(tmp_path):
    folder = collected(tmp_path / "records", ABLATED[:1])
    with pytest.raises(ValueError, match=r"no record of Table 1; \./scripts/reproduce.sh table1 --sizes minilm"):
        figures.main(["--records", str(folder), "--output", str(tmp_path / "out"), "--figures", "1"])
    assert not (tmp_path / "out").exists()


def test_several_models_are_refused_unless_one_is_chosen(all_runs, tmp_path):
    folder = tmp_path / "records"
    shutil.copytree(all_runs, folder)
    base = Trial("roberta_base/cola/lora_qv")
    write_json(folder / f"{base.name}.json", record_of(base))
    common = ["--records", str(folder), "--output", str(tmp_path / "out"), "--figures", "8"]
    with pytest.raises(ValueError, match="several models: minilm, roberta_base; choose one with --model"):
        figures.main(common)
    figures.main([*common, "--model", "minilm"])
    with pytest.raises(ValueError, match=r"no record of roberta_base_cola_vblora_qv_seed0; .* --sizes base"):
        figures.main([*common, "--model", "roberta_base"])


def test_no_records_at_all(tmp_path):
    for folder, reason in ((tmp_path, "no run record of rte"), (tmp_path / "none", "no folder")):
        with pytest.raises(ValueError, match=rf"{reason}.*reproduce.sh table1 --sizes minilm --tasks rte --collect"):
            figures.main(["--records", str(folder), "--task", "rte", "--output", str(tmp_path / "out")])


def test_the_lowest_seed_that_has_all_logs_is_taken(tmp_path):
    later = Trial(ROW.row, seed=2)
    folder = collected(tmp_path, [later])
    write_json(folder / f"{ROW.name}.json", record_of(ROW))
    [run] = Source.of([folder], "cola", None).runs("table1", ["vblora_qv"])
    assert run.trial == later and "seed 2" in run.title
    assert table.MODEL_TITLES["minilm"] in run.title
