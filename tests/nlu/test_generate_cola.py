from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import generate_cola
import glue_data
from glue_tasks import compute_metrics

NAMES = ["train.tsv", "dev_in_domain.tsv", "dev_out_of_domain.tsv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generated")
    generate_cola.write(path)
    return path


@pytest.fixture(scope="module")
def rows(folder):
    return {name: [line.split("\t") for line in (folder / name).read_text().splitlines()] for name in NAMES}


def test_is_cola_raw_form(rows):
    assert {name: len(rows[name]) for name in NAMES} == {
        "train.tsv": 2000,
        "dev_in_domain.tsv": 300,
        "dev_out_of_domain.tsv": 200,
    }
    for split in rows.values():
        assert Counter(row[1] for row in split) == {"0": len(split) // 2, "1": len(split) // 2}
        for source, label, mark, sentence in split:
            assert source in generate_cola.PHENOMENA
            assert mark == {"1": "", "0": "*"}[label]
            assert re.fullmatch(r"[A-Z][a-zA-Z ]+[.?]", sentence) and "  " not in sentence


def test_the_loader_reads_it(folder):
    data = glue_data.load_task("cola", folder)
    assert len(data.train) == 2000 and len(data.validation) == 500
    assert sum(data.validation["label"]) == 250


def test_no_sentence_occurs_twice(rows):
    sentences = [row[3] for split in rows.values() for row in split]
    assert len(set(sentences)) == len(sentences)


def test_every_phenomenon_is_in_every_part(rows):
    for split in rows.values():
        counts = Counter(row[0] for row in split)
        assert set(counts) == set(generate_cola.PHENOMENA)
        assert max(counts.values()) - min(counts.values()) <= 2


def open_class_words(lexicon):
    words = set()
    for value in vars(lexicon).values():
        for entry in value:
            for form in entry if isinstance(entry, tuple) else [entry]:
                words |= set(re.findall("[a-z]+", form.lower()))
    # Genders, and the grammatical words inside prepositions, times and openings.
    grammar = "n m f that is it in on to of the next front last i we two ago my they"
    return words - set(grammar.split())


def test_out_of_domain_words_are_not_in_train(rows):
    train_words = {word.lower() for row in rows["train.tsv"] for word in re.findall("[A-Za-z]+", row[3])}
    assert not train_words & open_class_words(generate_cola.OUT_OF_DOMAIN)
    assert len(train_words & open_class_words(generate_cola.IN_DOMAIN)) > 150


def test_regular_forms_are_spelled_right():
    verb, noun = generate_cola._verb, generate_cola._noun
    assert verb("carry") == ("carry", "carries", "carried", "carried", "carrying")
    assert verb("use") == ("use", "uses", "used", "used", "using")
    assert verb("admit:admitted") == ("admit", "admits", "admitted", "admitted", "admitting")
    assert verb("give:gave:given") == ("give", "gives", "gave", "given", "giving")
    assert verb("watch").third == "watches" and verb("enjoy").third == "enjoys"
    assert (
        noun("actress").plural == "actresses"
        and noun("toy").plural == "toys"
        and noun("child:children")[:2] == ("child", "children")
    )


def test_halves_of_a_pair_differ_in_two_words_at_most_or_only_in_order():
    words = generate_cola.Words(generate_cola.IN_DOMAIN, random.Random(1))
    for name, phenomenon in generate_cola.PHENOMENA.items():
        for _ in range(100):
            good, bad = (Counter(sentence.lower().strip(".?").split()) for sentence in phenomenon(words))
            added = sum((bad - good).values())
            allowed = 3 if name in ("argument", "filler_gap") else 2  # an object: "the old lamp"
            assert added <= allowed and sum((good - bad).values()) <= allowed, (good, bad)


def independent_judgement(source, sentence):
    """What a rule written apart from the generator says; None where it has no rule."""
    text = sentence.lower().rstrip(".?")
    if source == "complement":
        verb = re.search(
            r"\b(decided|hoped|promised|agreed|refused|enjoyed|avoided|finished|suggested|denied) (\w+)", text
        )
        infinitive = verb[1] in ("decided", "hoped", "promised", "agreed", "refused")
        return infinitive == (verb[2] == "to")
    if source == "comparative":
        return bool(re.search(r"\b\w+er than\b", text) or re.search(r"\bas (?!\w+er )\w+ as\b", text))
    if source == "case":
        clause = re.sub(r"^(i think|everyone knows|it is clear|someone said|my boss said) that ", "", text)
        words = re.sub(r" (yesterday|last week|in the morning)$", "", clause).split()
        return words[0] not in ("him", "her", "them") and words[-1] not in ("he", "she", "they")
    if source == "verb_form":
        auxiliary, form = re.search(r"\b(has|had|is(?! clear)|was|will|can|did not) (\w+)", text).groups()
        wanted = {"has": "en", "had": "en", "is": "ing", "was": "ing"}.get(auxiliary, "base")
        participles = ("ed", "taken", "bought", "found")
        return wanted == ("ing" if form.endswith("ing") else "en" if form.endswith(participles) else "base")
    return None


def test_labels_agree_with_rules_written_apart(rows):
    judged = Counter()
    for source, label, _, sentence in rows["train.tsv"] + rows["dev_in_domain.tsv"]:
        judgement = independent_judgement(source, sentence)
        if judgement is not None:
            judged[source] += 1
            assert judgement == (label == "1"), sentence
    assert len(judged) == 4 and min(judged.values()) > 100


def bag_of_words_matthews(rows, ngrams):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear_model = pytest.importorskip("sklearn.linear_model")
    vectorizer = text.CountVectorizer(ngram_range=ngrams, token_pattern=r"\w+|[?.]")
    labels = defaultdict(list)
    sentences = defaultdict(list)
    for name, split in rows.items():
        for row in split:
            labels[name[:3]].append(int(row[1]))
            sentences[name[:3]].append(row[3])
    model = linear_model.LogisticRegression(max_iter=1000).fit(
        vectorizer.fit_transform(sentences["tra"]), labels["tra"]
    )
    predictions = model.predict(vectorizer.transform(sentences["dev"]))
    return compute_metrics("cola", predictions, labels["dev"])["matthews_correlation"]


def test_words_alone_do_not_tell(rows):
    assert bag_of_words_matthews(rows, (1, 1)) < 0.2


def test_pairs_of_words_tell_less_than_half(rows):
    assert bag_of_words_matthews(rows, (1, 2)) < 0.45


def digest(folder):
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in NAMES)).hexdigest()


def test_same_seed_same_bytes_in_another_process(tmp_path, folder):
    script = Path(generate_cola.__file__)
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "again")],
        check=True,
        capture_output=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert digest(tmp_path / "again") == digest(folder)
    generate_cola.write(tmp_path / "other", seed=1)
    assert digest(tmp_path / "other") != digest(folder)


def test_only_the_promised_method_of_random_is_used(monkeypatch):
    real = random.Random

    class OnlyRandom:
        def __init__(self, seed):
            self.random = real(seed).random

    expected = generate_cola.generate(50, 20, 3)
    monkeypatch.setattr(generate_cola.random, "Random", OnlyRandom)
    generated = generate_cola.generate(50, 20, 3)
    assert generated == expected


def test_sizes_and_no_leftovers(tmp_path):
    (tmp_path / ".train.tsv.abcdef12.tmp").touch()  # of a process that was killed
    assert generate_cola.main([str(tmp_path), "--train", "40", "--dev", "20", "--seed", "5"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert [len((tmp_path / name).read_text().splitlines()) for name in NAMES] == [40, 12, 8]


def test_too_small_exits_2_with_one_line(tmp_path, capsys):
    assert generate_cola.main([str(tmp_path), "--train", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_some_phenomena_can_be_chosen_and_unknown_ones_are_named():
    rows = generate_cola.generate(40, 20, 0, phenomena=("case", "order"))
    assert {row.source for part in rows.values() for row in part} == {"case", "order"}
    with pytest.raises(ValueError, match="unknown phenomenon 'nonesuch'; known: agreement"):
        generate_cola.generate(40, 20, 0, phenomena=("case", "nonesuch"))
    with pytest.raises(ValueError, match="known: agreement"):
        generate_cola.generate(40, 20, 0, phenomena=())
