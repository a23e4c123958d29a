from __future__ import annotations

import csv
import json
import time

import pytest

import glue_data
from glue_data import load_task, tokenize

RTE = [
    ("A man sings.", "Someone sings.", 0),
    ('He said "no', "He\u2028said yes.", 1),
    ("It, too, rains.", "Sun.", 1),
]
NAMES = ("entailment", "not_entailment")


def write_tsv(path, header, rows, encoding="utf-8"):
    lines = ["\t".join(map(str, row)) + "\n" for row in ([header] if header else []) + rows]
    path.write_text("".join(lines), encoding=encoding)


def write_rte(folder, form, train=RTE, dev=RTE[:2]):
    for stem, rows in (("train", train), ("dev", dev)):
        if form == "tsv":
            write_tsv(
                folder / f"{stem}.tsv",
                ["index", "sentence1", "sentence2", "label"],
                [(number, one, two, NAMES[label]) for number, (one, two, label) in enumerate(rows)],
            )
        elif form == "csv":
            with (folder / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(
                    [("label", "sentence2", "sentence1"), *((label, two, one) for one, two, label in rows)]
                )
        else:
            records = [{"sentence1": one, "sentence2": two, "label": label} for one, two, label in rows]
            stem = "validation" if stem == "dev" else stem
            text = (
                json.dumps(records)
                if form == "json"
                else "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            )
            (folder / f"{stem}.{form}").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("form", ["tsv", "csv", "jsonl", "json"])
def test_every_format_gives_the_same_rows_and_fingerprint(tmp_path, form):
    for name in ("reference", "read"):
        (tmp_path / name).mkdir()
    write_rte(tmp_path / "reference", "jsonl")
    write_rte(tmp_path / "read", form)
    data = load_task("rte", tmp_path / "read")
    assert data["train"][:] == {
        "sentence1": [row[0] for row in RTE],
        "sentence2": [row[1] for row in RTE],
        "label": [row[2] for row in RTE],
    }
    assert len(data["validation"]) == 2
    assert data.fingerprint == load_task("rte", tmp_path / "reference").fingerprint


@pytest.mark.parametrize("change", [("Other.", "Someone sings.", 0), ("A man sings.", "Someone sings.", 1)])
def test_fingerprint_follows_the_contents(tmp_path, change):
    write_rte(tmp_path, "tsv")
    before = load_task("rte", tmp_path).fingerprint
    write_rte(tmp_path, "tsv", train=[change, *RTE[1:]])
    assert load_task("rte", tmp_path).fingerprint != before


def test_max_train_is_a_seeded_part_in_order(tmp_path):
    rows = [(f"sentence {number}", "second", number % 2) for number in range(100)]
    write_rte(tmp_path, "tsv", train=rows)
    parts = [load_task("rte", tmp_path, max_train=10, seed=seed) for seed in (1, 1, 2)]
    numbers = [[int(text.split()[1]) for text in part.train["sentence1"]] for part in parts]
    assert numbers[0] == numbers[1] == sorted(set(numbers[0])) and len(numbers[0]) == 10
    assert numbers[2] != numbers[0] and parts[2].fingerprint != parts[0].fingerprint == parts[1].fingerprint
    assert len(load_task("rte", tmp_path, max_train=1000).train) == 100
    with pytest.raises(ValueError, match="at least 1"):
        load_task("rte", tmp_path, max_train=0)


def test_glue_forms_of_other_tasks(tmp_path):
    mrpc = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    for stem in ("train", "dev"):
        write_tsv(tmp_path / f"{stem}.tsv", mrpc, [(1, 5, 6, 'say "a', "b")], encoding="utf-8-sig")
    assert load_task("mrpc", tmp_path).train[0] == {"sentence1": 'say "a', "sentence2": "b", "label": 1}

    write_tsv(
        tmp_path / "train.tsv",
        ["index", "sentence1", "sentence2", "label1", "gold_label"],
        [(0, "a", "b", "neutral", "contradiction")],
    )
    write_tsv(
        tmp_path / "dev_matched.tsv",
        ["index", "sentence1", "sentence2", "gold_label"],
        [(0, "a", "b", "neutral")],
    )
    mnli = load_task("mnli", tmp_path)
    assert (mnli.train["label"][0], mnli.validation["label"][0]) == (2, 1)


def test_stsb_scores_are_floats_from_0_to_5(tmp_path):
    header = ["index", "sentence1", "sentence2", "score"]
    write_tsv(tmp_path / "train.tsv", header, [(0, "a", "b", "3.8"), (1, "c", "d", "5")])
    (tmp_path / "dev.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 3.799999952316284}\n')
    data = load_task("stsb", tmp_path)
    assert data.train["label"][:] == [3.8, 5.0] and data.validation["label"][0] == 3.8
    write_tsv(tmp_path / "train.tsv", header, [(0, "a", "b", "5.1")])
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: unknown label '5\.1'.*0 to 5"):
        load_task("stsb", tmp_path)


COLA = [("gj04", 1, "", 'He said "so.'), ("gj04", 0, "*", "Said he so so.")]


def test_cola_raw_forms(tmp_path):
    prints = []
    for names in (
        ("train", "dev_in_domain", "dev_out_of_domain"),
        ("in_domain_train", "in_domain_dev", "out_of_domain_dev"),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name, rows in zip(names, (COLA, COLA[:1], COLA[1:]), strict=True):
            write_tsv(folder / f"{name}.tsv", None, rows)
        data = load_task("cola", folder)
        assert data.validation[:] == {"sentence1": [COLA[0][3], COLA[1][3]], "label": [1, 0]}
        prints.append(data.fingerprint)
    write_tsv(tmp_path / "train" / "dev.tsv", None, COLA)
    assert {*prints, load_task("cola", tmp_path / "train").fingerprint} == {prints[0]}


def test_half_of_colas_development_set_is_refused(tmp_path):
    write_tsv(tmp_path / "train.tsv", None, COLA)
    write_tsv(tmp_path / "dev_in_domain.tsv", None, COLA)
    with pytest.raises(ValueError, match=r"dev_out_of_domain\.tsv is not"):
        load_task("cola", tmp_path)


def test_glue_folder_inside_the_given_one(tmp_path):
    (tmp_path / "RTE").mkdir()
    write_rte(tmp_path / "RTE", "tsv")
    assert len(load_task("rte", tmp_path).train) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "index\tsentence1\tlabel\n0\ta\tentailment\n",
            "needs the columns sentence1, sentence2, label.*found index",
        ),
        (
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tentailment\n",
            "line 3: 3 columns instead of 4",
        ),
        ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "line 2: unknown label 'maybe'.*entailment"),
        ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t2\n", "line 2: unknown label '2'"),
        ("index\tsentence1\tsentence2\tlabel\n0\ta\t\tentailment\n", "line 2: a sentence is empty"),
        ("index\tsentence1\tsentence2\tlabel\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, words):
    write_rte(tmp_path, "tsv")
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=rf"train\.tsv.*{words}"):
        load_task("rte", tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sentence1": \n', "line 2: no JSON: Expecting value"),
        ('["a"]', "row 1: not an object"),
        ('{"sentence1": "a", "label": 1}\n', "line 1: rte needs the columns"),
        (
            '{"sentence1": "a", "sentence2": null, "label": 1}\n',
            "line 1: a sentence is empty or not text: None",
        ),
        ('{"sentence1": "a", "sentence2": "b", "label": true}\n', "line 1: unknown label True"),
    ],
)
def test_a_bad_json_row_is_named(tmp_path, text, words):
    write_rte(tmp_path, "jsonl")
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"train\.jsonl, {words}"):
        load_task("rte", tmp_path)


def test_not_utf8_is_named(tmp_path):
    write_rte(tmp_path, "tsv")
    (tmp_path / "train.tsv").write_bytes(b"sentence1\tsentence2\tlabel\ncaf\xe9\tb\t1\n")
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: not UTF-8"):
        load_task("rte", tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_task("rte", tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no training file .train.* and no development file .dev or validation"):
        load_task("rte", tmp_path)
    write_rte(tmp_path, "tsv")
    (tmp_path / "train.tsv").unlink()
    with pytest.raises(ValueError, match="no training file") as raised:
        load_task("rte", tmp_path)
    assert "development" not in str(raised.value)
    data = load_task("rte", tmp_path, need_train=False)
    assert data.train is None and len(data["validation"]) == 2
    with pytest.raises(KeyError):
        data["train"]


def test_an_absent_hub_is_told_quickly_and_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for module, name in (
        (glue_data.datasets.config, "HF_DATASETS_CACHE"),
        (glue_data.datasets.config, "HF_MODULES_CACHE"),
        (huggingface_hub.constants, "HF_HUB_CACHE"),
    ):
        monkeypatch.setattr(module, name, str(tmp_path / name))
    before = (glue_data.datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)
    start = time.monotonic()
    with pytest.raises(ValueError, match="--data_dir DIR") as raised:
        load_task("cola")
    assert time.monotonic() - start < 10
    assert "\n" not in str(raised.value)
    assert before == (glue_data.datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE)


def test_rows_from_the_hub_are_the_rows_of_the_files(tmp_path, monkeypatch):
    write_rte(tmp_path, "tsv")
    hub = {
        split: [{"sentence1": one, "sentence2": two, "label": label, "idx": 0} for one, two, label in rows]
        for split, rows in (("train", RTE), ("validation", RTE[:2]))
    }
    asked = []
    monkeypatch.setattr("vblora.hub.hub_in_reach", lambda: True)
    monkeypatch.setattr(glue_data.datasets, "load_dataset", lambda *names: asked.append(names) or hub)
    assert load_task("rte").fingerprint == load_task("rte", tmp_path).fingerprint
    assert asked == [("nyu-mll/glue", "rte")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    vocabulary = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "sings", "someone", "."]
    vocabulary.write_text("\n".join(words) + "\n")
    return transformers.BertTokenizer(str(vocabulary))


def test_tokenize_truncates_and_does_not_pad(tmp_path, tokenizer):
    write_rte(tmp_path, "tsv")
    dataset = load_task("rte", tmp_path).train
    encoded = tokenize(dataset, tokenizer, max_length=11)
    assert set(encoded.column_names) <= {*tokenizer.model_input_names, "labels"}
    assert {"input_ids", "attention_mask", "labels"} <= set(encoded.column_names)
    assert encoded["labels"][:] == [0, 1, 1]
    assert (
        encoded["input_ids"][0] == tokenizer("A man sings.", "Someone sings.", truncation=True, max_length=11).input_ids
    )
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert max(lengths) == 11 and min(lengths) < 11
    assert all(0 not in ids for ids in encoded["input_ids"])


def test_tokenize_single_sentences(tmp_path, tokenizer):
    write_tsv(tmp_path / "train.tsv", None, COLA)
    write_tsv(tmp_path / "dev.tsv", None, COLA)
    encoded = tokenize(load_task("cola", tmp_path).train, tokenizer, max_length=4)
    assert [len(ids) for ids in encoded["input_ids"]] == [4, 4] and encoded["labels"][:] == [1, 0]


@pytest.mark.parametrize(
    ("task", "name", "train", "dev"),
    [
        ("cola", "cola", (8551, 6023), (1043, 719)),
        ("mrpc", "glue_MRPC", (3668, 2474), (408, 279)),
        ("sst2", "glue_SST2", (67349, 37569), (872, 444)),
    ],
)
def test_counts_of_real_data(real_data, task, name, train, dev):
    data = load_task(task, real_data(name))
    assert (len(data.train), sum(data.train["label"])) == train
    assert (len(data.validation), sum(data.validation["label"])) == dev


def test_real_qnli_has_no_train(real_data):
    folder = real_data("glue_QNLI")
    with pytest.raises(ValueError, match="no training file"):
        load_task("qnli", folder)
    labels = load_task("qnli", folder, need_train=False).validation["label"]
    assert (len(labels), sum(labels)) == (5463, 2761)
