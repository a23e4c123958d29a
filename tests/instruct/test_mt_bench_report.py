"""The table of scores, against figures worked out by hand."""

from __future__ import annotations

import csv
import io

import pytest
from mt_bench_helpers import write_rows

from mt_bench import UNRATED
from mt_bench_report import HEADER, main


def judged(number, turn, score, model="m", judge="gpt-4"):
    """As FastChat writes it."""
    texts = {"user_prompt": "u", "judgment": "j"}
    return {
        "question_id": number,
        "model": model,
        "judge": [judge, "p"],
        **texts,
        "score": score,
        "turn": turn,
        "tstamp": 1.0,
    }


SCORES = {1: {81: 8, 104: 2, 112: 5, 141: 7.5}, 2: {81: 6, 104: 10, 112: UNRATED, 141: 4}}
ROWS = [judged(number, turn, score) for turn, scores in SCORES.items() for number, score in scores.items()]


def table(text):
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == list(HEADER)
    return {(row[0], row[1], row[2]): dict(zip(HEADER, row, strict=True)) for row in rows[1:]}


@pytest.fixture
def report(tmp_path, bench_dir):
    def make(rows, format="csv"):
        path = write_rows(tmp_path / "gpt-4_single.jsonl", rows)
        return main([str(path), "--bench_dir", str(bench_dir), "--format", format])

    return make


def test_the_means(report):
    found = table(report(ROWS))
    first, second, both = (found["m", "gpt-4", turn] for turn in ("1", "2", "both"))
    assert float(first["score"]) == (8 + 2 + 5 + 7.5) / 4 and float(first["sound"]) == pytest.approx(
        (8 + 5 + 7.5) / 3, abs=1e-5
    )
    assert (first["judged"], first["unrated"]) == ("4", "0")
    assert float(second["score"]) == pytest.approx((6 + 10 + 4) / 3, abs=1e-5) and float(second["sound"]) == 5
    assert (second["judged"], second["unrated"]) == ("4", "1")
    # FastChat's average is over all ratings, not over the two turns' means.
    assert float(both["score"]) == pytest.approx((22.5 + 20) / 7, abs=1e-5) and both["judged"] == "8"
    assert (first["writing"], first["reasoning"], first["math"], first["stem"]) == ("8", "2", "5", "7.5")
    assert (second["math"], second["coding"], both["math"], both["writing"]) == ("", "", "5", "7")


def test_models_and_judges_are_apart_and_the_best_first(report):
    rows = [*ROWS, judged(81, 1, 9, "better"), judged(81, 1, 1, "m", "other"), judged(81, 2, 9, "second turn only")]
    found = table(report(rows))
    assert [key for key in found if key[2] == "1"] == [
        ("better", "gpt-4", "1"),
        ("m", "gpt-4", "1"),
        ("m", "other", "1"),
    ]
    assert ("second turn only", "gpt-4", "both") not in found and ("better", "gpt-4", "both") not in found
    assert found["m", "other", "1"]["score"] == "1"


def test_a_reader_is_told_what_is_missing(report, capsys):
    text = report([*ROWS[1:], judged(81, 1, 11, "n")], "markdown")
    assert "m by gpt-4, turn 1: 3 of 4 questions are judged." in text
    assert "m by gpt-4, question 112, turn 2: no rating." in text
    assert "n by gpt-4, question 81, turn 1: rated 11, outside of 1 to 10." in text
    assert "known to be wrong" in text and "turn 2: 4 of 4" not in text
    report(ROWS)
    assert "question 112, turn 2: no rating." in capsys.readouterr().err


def test_of_judgments_made_again_the_last_counts(report, capsys):
    found = table(report([*ROWS, judged(81, 1, 4)]))
    assert found["m", "gpt-4", "1"]["writing"] == "4" and found["m", "gpt-4", "1"]["judged"] == "4"
    assert "1 judgments were made again" in capsys.readouterr().err


def test_markdown_and_latex(report):
    lines = report(ROWS, "markdown").split("\n")
    assert (
        lines[2].startswith("| m | gpt-4 | 1 | 5.62 | 6.83 | 4 | 0 | 8.00 |")
        and len(lines[2].split("|")) == len(HEADER) + 2
    )
    assert r"m & gpt-4 & both & 6.07 & 6.10" in report(ROWS, "latex")


def test_nothing_rated(report):
    found = table(report([judged(81, 1, -1)]))
    assert found["m", "gpt-4", "1"]["score"] == "" and found["m", "gpt-4", "1"]["unrated"] == "1"


def test_wrong_input_is_named(report, tmp_path):
    with pytest.raises(ValueError, match="no judgments in there"):
        report([])
    with pytest.raises(ValueError, match="judgments of question 7,"):
        report([judged(7, 1, 1)])
    with pytest.raises(ValueError, match="line 1: score"):
        report([judged(81, 1, None)])
    with pytest.raises(ValueError, match="does not exist"):
        main([str(tmp_path / "none.jsonl"), "--bench_dir", str(tmp_path / "bench")])


def test_the_real_questions_have_the_categories(real_data, tmp_path):
    rows = [judged(number, 1, 1 + (number - 81) // 10) for number in range(81, 161)]
    text = main(
        [str(write_rows(tmp_path / "j.jsonl", rows)), "--bench_dir", str(real_data("mt_bench")), "--format", "csv"]
    )
    row = table(text)["m", "gpt-4", "1"]
    order = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
    assert [row[name] for name in order] == list("12345678") and float(row["score"]) == 4.5
    # Without 104, 105, 109 (rated 3), 111, 113, 114, 120 (4) and 122, 124, 125, 126, 128, 130 (5).
    assert float(row["sound"]) == pytest.approx((360 - 3 * 3 - 4 * 4 - 6 * 5) / 67, abs=1e-5)
