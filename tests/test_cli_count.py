"""`vblora count`, and how the `vblora` command reports a mistake."""

from __future__ import annotations

import json
import re

import pytest

from vblora.cli import main
from vblora_experiments.count_command import WIDTH
from vblora_experiments.paper_counts import METHOD_NAMES, MODELS, ROWS, compare


def run(capsys, *argv: str) -> str:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_text_has_every_row_and_fits(capsys):
    lines = run(capsys, "count").splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert len([line for line in lines if re.search(r"\d(\.\d+)?M ", line)]) == len(ROWS)
    for model in MODELS:
        assert any(line.startswith("Table ") and line.endswith(f": {model}") for line in lines)


def test_a_text_row_holds_its_figures_and_verdict(capsys):
    lines = run(capsys, "count", "--table", "4", "--model", "gemma-7b", "--method", "vb-lora").splitlines()
    figures = "VB-LoRA all r 4 h 2048 b 256 0.67M 597,536 621,952 670,784 2.49 MB float, both"
    assert " ".join(lines[-1].split()) == figures


def test_columns_are_aligned(capsys):
    lines = run(capsys, "count", "--table", "1").splitlines()
    (column,) = {line.index("reproduced by") for line in lines if line.startswith("method")}
    verdicts = [compare(row).verdict for row in ROWS if row.table == 1]
    assert [line[column:] for line in lines if re.search(r"\d(\.\d+)?M ", line)] == verdicts


def test_a_note_is_printed_below_its_row(capsys):
    out = run(capsys, "count", "--model", "Llama2-13B", "--method", "VB-LoRA")
    for row in ROWS:
        if row.model == "Llama2-13B" and row.note:
            assert f"  note: {row.note}" in out


def test_json_is_the_comparison(capsys):
    printed = json.loads(run(capsys, "count", "--json"))
    assert len(printed) == len(ROWS)
    for entry, row in zip(printed, ROWS, strict=True):
        comparison = compare(row)
        assert {name: entry[name] for name in row._fields} == row._asdict()
        assert entry["counts"] == comparison.counts._asdict()
        assert entry["reproduced_by"] == {rule: list(ways) for rule, ways in comparison.reproduced_by.items()}
        assert entry["verdict"] == comparison.verdict


@pytest.mark.parametrize("table", [1, 2, 3, 4])
def test_table_filter(capsys, table):
    printed = json.loads(run(capsys, "count", "--json", "--table", str(table)))
    assert len(printed) == len([row for row in ROWS if row.table == table])
    assert {entry["table"] for entry in printed} == {table}


@pytest.mark.parametrize("spelling", ["Tied-LoRA", "tied_lora", "TIEDLORA"])
def test_method_in_any_spelling(capsys, spelling):
    printed = json.loads(run(capsys, "count", "--json", "--method", spelling))
    assert {entry["method"] for entry in printed} == {"tied_lora"}


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["count", "--model", "bert"], ["'bert'", *MODELS]),
        (["count", "--method", "lokr"], ["'lokr'", *METHOD_NAMES.values()]),
        (["count", "--method", "dora"], ["the paper has no row for method DoRA"]),
        (["count", "--table", "1", "--model", "whisper-base"], ["no row for table 1, model whisper-base"]),
        (["count", "--model", "whisper-huge"], ["'whisper-huge'", "whisper-large-v2"]),
        (["count", "--model", "whisper", "--targets", "all"], ["'all'", "decoder, encoder, both, cross"]),
        (["count", "--targets", "both"], ["--targets is for Whisper alone"]),
        (["count", "--model", "Gemma-7B", "--rank", "4"], ["--rank is for Whisper alone"]),
        (["count", "--model", "whisper-base", "--method", "lora", "--topk", "2"], ["topk does nothing with lora"]),
        (["count", "--model", "whisper-base", "--rank", "0"], ["r must be a positive whole number, not 0"]),
        (["count", "--table", "7"], ["'7'", "1, 2, 3, 4"]),
        (["count", "--table", "one"], ["'one'", "1, 2, 3, 4"]),
        (["count", "--table", "1", "--model", "Gemma-7B"], ["table 1, model Gemma-7B"]),
        (["count", "--method", "lora-xs", "--table", "2"], ["table 2, method LoRA-XS"]),
        (["count", "extra"], ["extra"]),
        (["frobnicate"], ["frobnicate", "count", "inspect"]),
        ([], ["count", "inspect"]),
        (["inspect"], ["DIR"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv, named):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vblora: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    for name in named:
        assert name in err


def test_help_exits_with_0(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["count", "--help"])
    assert exit_.value.code == 0
    assert "--table" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["count"], ["count", "--table", "1"], ["count", "--help"]])
def test_the_library_alone_says_where_the_command_comes_from(capsys, monkeypatch, argv):
    class Missing:
        name = "count"

        def load(self):
            raise ModuleNotFoundError("vblora_experiments")

    monkeypatch.setattr("vblora.cli.metadata.entry_points", lambda group: [Missing()])
    assert main(argv) == 2
    assert "vblora count comes with the repository" in capsys.readouterr().err
