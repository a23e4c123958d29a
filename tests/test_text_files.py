"""Tables and JSON that others wrote: long fields are read, what is there twice or nested too deeply is one line."""

from __future__ import annotations

import pytest

from vblora_experiments import text_files

LONG = "a" * 200_000  # above the limit that Python's csv has by itself


@pytest.mark.parametrize(("name", "mark"), [("t.csv", ","), ("t.tsv", "\t")])
def test_a_long_field_is_read_whole(name, mark, tmp_path):
    (tmp_path / name).write_text(f"\ufeffmr{mark}ref\n\nx{mark}{LONG}\n", encoding="utf-8")
    assert list(text_files.read_table(tmp_path / name)) == [(1, ["mr", "ref"]), (3, ["x", LONG])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a,b\n1,2,3\n", "t.csv, line 2: 3 columns instead of 2"),
        ("t.csv", 'a,b\n1,"2\n', "t.csv, line 2: "),
        ("t.csv", b"a,b\n\xff,1\n", "t.csv, line 2: not UTF-8 text .*: save it as UTF-8"),
        ("t.tsv", "a\tb\n1\n", "t.tsv, line 2: 1 columns instead of 2"),
        ("missing.csv", None, "missing.csv: no such file"),
    ],
)
def test_a_wrong_table_is_named_with_its_line(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(text_files.read_table(tmp_path / name))


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"t.csv: the column 'label' is there twice"):
        text_files.check_header(tmp_path / "t.csv", ["label", "sentence", "label"])
    text_files.check_header(tmp_path / "t.csv", ["label", "", ""])


@pytest.mark.parametrize("as_lines", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "no JSON: it is nested too deeply"),
        ('{"a": ' * 100_000, "no JSON: it is nested too deeply"),
        ("9" * 5000, "no JSON: "),
        ('{"label": 1, "label": 2}', "the key 'label' is there twice"),
        ("3", "not an object|not a list"),
    ],
)
def test_wrong_json_is_named_with_its_place(as_lines, content, message, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{"label": 1}\n' + content if as_lines else content)
    with pytest.raises(ValueError, match=f"rows.json{', line 2' if as_lines else ''}: .*({message})"):
        text_files.read_json_rows(file, as_lines)
