from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import score
from e2e_scores import bleu, count, nist
from score import main, read_outputs, read_references

ROOT = Path(__file__).resolve().parents[2]
GROUPS = [["Cotto is a café.", "The café Cotto"], ["A pub.\u2028Cheap."], ["£5, é"]]
TEXT = "Cotto is a café.\nThe café Cotto\n\nA pub.\u2028Cheap.\n\n£5, é\n"


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "NLG" / "score.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def pair(tmp_path):
    return write(tmp_path, "outputs.txt", "Cotto is a café.\n\nno match\n"), write(tmp_path, "references.txt", TEXT)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("tail", ["", "\n", "\n\n\n"])
def test_references_are_the_same_with_any_line_ends_byte_order_mark_and_tail(tmp_path, end, mark, tail):
    content = mark + (TEXT.rstrip("\n") + tail).replace("\n", end).encode()
    assert read_references(write(tmp_path, "references.txt", content), 3) == GROUPS


def test_references_from_csv_and_json_lines(tmp_path):
    rows = 'ref,MR\r\nCotto is a café.,"name[Cotto], x"\r\nA pub.\u2028Cheap.,b\r\nThe café Cotto,"name[Cotto], x"\r\n'
    path = write(tmp_path, "references.csv", "\ufeff" + rows + '"£5, é ",c\r\n\r\n')
    assert read_references(path, 3) == GROUPS  # rows of one mr need not be neighbours
    lines = "".join(json.dumps({"references": group, "mr": "x"}, ensure_ascii=False) + "\n" for group in GROUPS)
    assert read_references(write(tmp_path, "references.jsonl", lines + "\n"), 3) == GROUPS


def test_a_csv_reference_loses_the_mark_it_begins_with_as_in_the_official_script(tmp_path):
    path = write(tmp_path, "references.csv", "mr,ref\na,'The Phoenix' is a pub. It's\n")
    assert read_references(path, 1) == [["The Phoenix' is a pub. It's"]]


def test_the_test_set_of_e2e(real_data):
    references = read_references(real_data("e2e") / "testset_w_refs.csv", 630)
    assert (len(references), sum(map(len, references))) == (630, 4693)


def test_without_blank_lines_a_file_is_one_reference_each_or_one_group(tmp_path):
    path = write(tmp_path, "references.txt", "a\nb\n")
    assert read_references(path, 2) == [["a"], ["b"]]
    assert read_references(path, 1) == [["a", "b"]]


@pytest.mark.parametrize(
    ("content", "outputs"),
    [
        ("a\n\nb", ["a", "", "b"]),
        ("a\r\n \r\nb\r\n", ["a", "", "b"]),
        ("\ufeffa\n\n", ["a", ""]),
        ("a\u2028b\u0085c\n", ["a\u2028b\u0085c"]),
    ],
)
def test_outputs_keep_empty_lines(tmp_path, content, outputs):
    assert read_outputs(write(tmp_path, "outputs.txt", content)) == outputs


def test_prints_the_official_lines_warns_of_empty_outputs_and_writes_json(pair, tmp_path, capsys, no_java):
    outputs, references = pair
    result = main([str(outputs), str(references), "--json", str(tmp_path / "new" / "scores.json")])
    counts = count(["Cotto is a café.", "", "no match"], GROUPS)
    shown = capsys.readouterr()
    assert shown.out == (
        f"SCORES:\n==============\nBLEU: {bleu(counts):.4f}\nNIST: {nist(counts):.4f}\n"
        "METEOR: not computed\nROUGE_L: not computed\nCIDEr: not computed\n\n"
    )
    assert "1 of 3 outputs are empty" in shown.err and "they need Java" in shown.err
    assert json.loads((tmp_path / "new" / "scores.json").read_text()) == result
    assert result == {
        "scores": {"BLEU": bleu(counts), "NIST": nist(counts), "METEOR": None, "ROUGE_L": None, "CIDEr": None},
        "outputs": 3,
        "empty_outputs": 1,
        "references": 4,
    }


def test_all_five_scores_of_the_official_example(real_data, java, capsys):
    # BLEU and NIST are the official values; the others are what the same COCO evaluation gives, one METEOR in all tests
    # since it takes ten seconds and more to start.
    folder = real_data("e2e_metrics_example")
    main([str(folder / "baseline-output.txt"), str(folder / "devel-conc.txt")])
    assert capsys.readouterr().out == EXAMPLE


EXAMPLE = """SCORES:
==============
BLEU: 0.7203
NIST: 7.7889
METEOR: 0.4801
ROUGE_L: 0.7910
CIDEr: 2.3039

"""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.txt", TEXT + "\nanother\n", "outputs.txt has 3 outputs (1 of them empty) and {} has 4 groups"),
        ("r.txt", "\n" + TEXT, "{}, line 1: a blank line with no references before it"),
        ("r.txt", TEXT.replace("\n\n", "\n\n\n"), "{}, line 4: a blank line with no references before it"),
        ("r.txt", "", "{}: no references"),
        ("r.txt", "café".encode("latin-1"), "{}, line 1: not UTF-8 text"),
        ("r.csv", "mr,text\na,b\n", "{}: needs the columns mr and ref; found mr, text"),
        ("r.csv", "mr,ref\na,b,c\n", "{}, line 2: 3 columns instead of 2"),
        ("r.csv", "mr,ref\na, \n", "{}, line 2: an empty reference"),
        ("r.csv", 'mr,ref\na,"b', "{}, line 2: unexpected end of data"),
        ("r.csv", "", "{}: needs the columns mr and ref; found none"),
        ("r.csv", "mr,ref\n", "{}: no references"),
        ("r.jsonl", '{"references": ["a"]}\n{"references": []}\n', "{}, line 2: an empty group"),
        ("r.jsonl", '{"references": "a"}\n', "{}, line 1: not of the form"),
        ("r.jsonl", "[1]\n", "{}, line 1: not an object"),
        ("r.csv", "MR,ref,mr\na,b,c\n", "{}: the column 'mr' is there twice"),
        ("r.jsonl", "{\n", "{}, line 1: no JSON: Expecting"),
    ],
)
def test_wrong_references_are_named(pair, tmp_path, name, content, says):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        main([str(pair[0]), str(path)])
    assert says.format(path) in str(error.value)


def test_a_file_that_is_not_there_a_folder_and_no_outputs(pair, tmp_path):
    for path, says in (
        (tmp_path / "none.txt", "no such file"),
        (tmp_path, "a folder"),
        (write(tmp_path, "e", ""), "no outputs"),
    ):
        with pytest.raises(ValueError, match=says):
            main([str(path), str(pair[1])])
    with pytest.raises(ValueError, match=r"--json .*folder"):
        main([str(pair[0]), str(pair[1]), "--json", str(tmp_path)])


def test_on_the_command_line_an_error_is_one_line_and_exit_code_2(pair, tmp_path):
    done = run(pair[0], tmp_path / "none.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"score: error: {tmp_path / 'none.txt'}: no such file\n"


def test_importing_is_light():
    code = "import sys, score; print({'torch', 'nltk', 'sacrebleu', 'numpy'} & set(sys.modules))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "NLG")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert done.stdout == "set()\n", done.stderr
    assert score.__doc__
