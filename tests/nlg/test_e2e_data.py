"""E2E's files and the generated ones: what is read, and what is refused."""

from __future__ import annotations

import csv
import io

import pytest

import e2e_data
import generate_e2e
from e2e_data import Example, group, linear_e2e, load_split

HEADER = "mr,ref\n"


def test_a_representation_becomes_loras_form():
    mr = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
    assert linear_e2e(mr) == (
        "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5 | near : Café Adriatic"
    )
    assert linear_e2e("name[A], familyFriendly[no],  food[Fast food]") == (
        "name : A | family friendly : no | food : Fast food"
    )
    assert linear_e2e("name[Smith, Jones & Sons], area[riverside]") == "name : Smith, Jones & Sons | area : riverside"


@pytest.mark.parametrize("wrong", ["", "The Vaults", "name[A] food[B]", "name[A], food", "name[A], [B]", "name[A"])
def test_what_is_no_representation_is_refused(wrong):
    with pytest.raises(ValueError, match="no list of name"):
        linear_e2e(wrong)


@pytest.mark.parametrize(
    ("split", "rows", "sources"), [("train", 42_061, 4_862), ("validation", 4_672, 547), ("test", 4_693, 630)]
)
def test_the_challenges_own_files(split, rows, sources, real_data):
    examples = load_split("e2e", split, real_data("e2e"))
    groups = group(examples)
    assert len(examples) == rows and len(groups) == sources
    assert sum(len(g.references) for g in groups) == rows
    assert not any("\n" in e.reference or "[" in e.source for e in examples)
    if split == "test":
        assert groups[0].source == "name : Blue Spice | Type : coffee shop | area : city centre"
        assert groups[0].references[0] == "A coffee shop in the city centre area called Blue Spice."


def test_windows_line_ends_a_mark_at_the_start_and_line_breaks_in_a_field(tmp_path):
    text = '\ufeffmr,ref\r\n"name[A], area[riverside]","One\nline  more."\r\n'
    (tmp_path / "trainset.csv").write_bytes(text.encode())
    assert load_split("e2e", "train", tmp_path) == [Example("name : A | area : riverside", "One line more.")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER, "no rows"),
        ("a,b\n1,2\n", "the columns mr and ref are needed; found a, b"),
        ("", "the columns mr and ref are needed; found nothing"),
        (HEADER + "name[A],One.\nThe Vaults,Two.\n", r"line 3: no list of name\[value\]"),
        (HEADER + "name[A],One.\nname[B],\n", "line 3: the reference is empty"),
        ("mr,ref,ref\nname[A],One.,Two.\n", "the column 'ref' is there twice"),
        (HEADER + "name[A]\n", "line 2: . columns instead of 2"),
        (HEADER + "name[A],One.,two\n", "line 2: . columns instead of 2"),
        (HEADER + 'name[A],"One', r"line \d: unexpected end of data"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(content, message, tmp_path):
    (tmp_path / "devset.csv").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_split("e2e", "validation", tmp_path)
    assert "devset.csv" in str(caught.value)


def test_other_wrong_input_is_named(tmp_path):
    (tmp_path / "trainset.csv").write_bytes(b"mr,ref\nname[A],caf\xe9\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_split("e2e", "train", tmp_path)
    with pytest.raises(ValueError, match=r"no testset_w_refs.csv or test.csv for the test split of e2e"):
        load_split("e2e", "test", tmp_path)
    with pytest.raises(ValueError, match="nonesuch: no such folder"):
        load_split("e2e", "test", "nonesuch")
    with pytest.raises(ValueError, match="unknown data set 'dart'; known: e2e"):
        load_split("dart", "test", tmp_path)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        load_split("e2e", "dev", tmp_path)


def test_groups_keep_the_first_order_and_every_reference():
    examples = [Example("a", "1"), Example("b", "2"), Example("a", "3"), Example("a", "1")]
    assert [(g.source, g.references) for g in group(examples)] == [("a", ("1", "3", "1")), ("b", ("2",))]


def test_a_further_set_is_one_entry_and_one_function(tmp_path, monkeypatch):
    def read(path):
        for line in path.read_text().splitlines():
            yield Example(*line.split("\t"))

    monkeypatch.setitem(
        e2e_data.SETS, "mine", e2e_data.TextSet("me/mine", "main", ("a", "b"), {"test": ("t.tsv",)}, read, str)
    )
    (tmp_path / "t.tsv").write_text("x\ty\n")
    assert load_split("mine", "test", tmp_path) == [Example("x", "y")]


def test_generated_restaurants_are_read_back_and_the_parts_share_none(tmp_path):
    generate_e2e.write(tmp_path, 60, 20, 20, seed=3)
    parts = {split: load_split("e2e", split, tmp_path) for split in e2e_data.SPLITS}
    assert [len(parts[split]) for split in e2e_data.SPLITS] == [60, 60, 60]
    sources = [{e.source for e in examples} for examples in parts.values()]
    assert [len(s) for s in sources] == [60, 20, 20] and not set.intersection(*map(set, sources[:2]))
    assert not sources[0] & sources[2] and not sources[1] & sources[2]
    first = (tmp_path / "trainset.csv").read_bytes()
    generate_e2e.write(tmp_path, 60, 20, 20, seed=3)
    assert (tmp_path / "trainset.csv").read_bytes() == first
    generate_e2e.write(tmp_path, 60, 20, 20, seed=4)
    assert (tmp_path / "trainset.csv").read_bytes() != first


def test_a_generated_reference_says_every_value(tmp_path):
    generate_e2e.write(tmp_path, 300, 1, 1, seed=0)
    said = {"cheap": "low", "yes": "family friendly", "no": "not family friendly"}
    for row in csv.DictReader(io.StringIO((tmp_path / "trainset.csv").read_text())):
        for part in linear_e2e(row["mr"]).split(" | "):
            name, value = part.split(" : ")
            wanted = value if name == "customer rating" else said.get(value, value)
            assert wanted.lower() in row["ref"].lower(), row


def test_a_part_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"devset.csv needs at least 1 representation, not 0"):
        generate_e2e.write(tmp_path / "new", 5, 0, 5, seed=0)
    assert not (tmp_path / "new").exists()
