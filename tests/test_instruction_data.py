"""Instructions as prompts, tokens, labels and packs."""

from __future__ import annotations

import json

import pytest
import torch
from language_helpers import byte_tokenizer, tiny_llama
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from vblora_experiments import causal
from vblora_experiments.instruction_data import DATA_FORMATS, Limits, Row, encode, fingerprint, load_rows, with_labels

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue"},
    {"instruction": "Translate {this}.", "input": "ja", "output": "yes"},
]


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def test_the_two_prompts_of_alpaca_and_the_one_of_metamath(tmp_path):
    rows = load_rows(write(tmp_path / "rows.json", ALPACA), "alpaca")
    assert rows == [
        Row(
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nName a colour.\n\n### Response: ",
            "Blue",
        ),
        Row(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nTranslate {this}.\n\n### "
            "Input:\nja\n\n### Response: ",
            "yes",
        ),
    ]
    maths = load_rows(write(tmp_path / "rows.jsonl", [{"query": "1 + 1?", "response": "2"}]), "metamath")
    assert maths == [
        Row(
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\n1 + 1?\n\n### Response:",
            "2",
        )
    ]


def test_gsm8ks_answers_are_brought_to_metamaths_form(tmp_path):
    answer = "48/2 = <<48/2=24>>24 in May.\nAll: $<<48+24=72>>72.\n#### 1,072"
    (row,) = load_rows(write(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": answer}]), "gsm8k")
    assert row.prompt.endswith("### Instruction:\nHow many?\n\n### Response:")
    assert row.response == "48/2 = 24 in May.\nAll: $72.\n#### 1,072\nThe answer is: 1,072"


@pytest.mark.parametrize(
    "split",
    ["train", "train[:3]", "train[4:]", "train[2:5]", "train[-2:]", "train[10%:40%]", "train[:33%]", "train[:]"],
)
def test_slices_are_datasets_own(split, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"query": f"{number}", "response": "r"} for number in range(11)]
    source = write(tmp_path / "rows.jsonl", rows)
    theirs = datasets.load_dataset("json", data_files=source, split=split, cache_dir=str(tmp_path / "cache"))
    ours = load_rows(source, "metamath", split)
    assert [DATA_FORMATS["metamath"].row(row) for row in theirs] == ours


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.jsonl", '{"query": "q", "response": "r"}\n{"query": "q"}\n', "line 2: no text in 'response'"),
        ("rows.jsonl", '{"query": "q", "response": "r"}\n\nno\n', "line 3: no JSON"),
        ("rows.jsonl", '{"query": " ", "response": "r"}\n', "line 1: no text in 'query'"),
        ("rows.jsonl", '{"query": 3, "response": "r"}\n', "line 1: no text in 'query'"),
        ("rows.jsonl", "[]\n", "line 1: not an object"),
        ("rows.json", "{}", "not a list of rows"),
        ("rows.json", "[]", "no rows in train"),
        ("rows.json", "[", "no JSON"),
        ("rows.json", '[{"query": "q", "response": null}]', "row 1: no text in 'response'"),
    ],
)
def test_a_wrong_row_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / name), "metamath")


def test_an_answer_of_gsm8k_without_its_number_is_named(tmp_path):
    rows = [{"question": "How many?", "answer": "2\n#### 2"}, {"question": "How many?", "answer": "2"}]
    with pytest.raises(ValueError, match=r'rows.jsonl, line 2: the answer does not end with "#### "'):
        load_rows(write(tmp_path / "rows.jsonl", rows), "gsm8k")


def test_other_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown data format 'vicuna'"):
        load_rows("x.json", "vicuna")
    with pytest.raises(ValueError, match=r"x\.json: no such file"):
        load_rows("x.json", "alpaca")
    source = write(tmp_path / "rows.json", ALPACA)
    with pytest.raises(ValueError, match="no split such as"):
        load_rows(source, "alpaca", "train[1]")
    with pytest.raises(ValueError, match="no rows in train"):
        load_rows(source, "alpaca", "train[5:]")


def shown(tokenizer, encoded):
    """The text of all tokens, and of those with a label."""
    labelled = [label for label in encoded.labels if label != causal.IGNORED]
    assert all(label in (causal.IGNORED, token) for token, label in zip(*encoded, strict=True))
    return tokenizer.decode(encoded.input_ids), tokenizer.decode(labelled)


ROW = Row("### Response: ", "Blue sky")


def test_apart_no_token_reaches_across_the_end_of_the_prompt():
    tokenizer = byte_tokenizer()
    (one,) = encode([ROW], tokenizer, together=False, limits=Limits())
    assert shown(tokenizer, one) == ("<s>### Response: Blue sky</s>", "Blue sky</s>")
    prompt = tokenizer("### Response: ", add_special_tokens=False)["input_ids"]
    response = tokenizer("Blue sky", add_special_tokens=False)["input_ids"]
    assert one.input_ids == [0, *prompt, *response, 1]
    assert one.labels == [-100] * (1 + len(prompt)) + [*response, 1]


def merging_tokenizer():
    """One that has ": B" as one token, which a text tokenized whole gets."""
    letters = ["<s>", "</s>", *"Rsponse: Bluky", ": ", ": B"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(letters))}
    inner = Tokenizer(models.BPE(vocabulary, [(":", " "), (": ", "B")]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_a_token_that_reaches_across_has_no_label_together_and_is_not_made_apart():
    tokenizer, row = merging_tokenizer(), Row("Response: ", "Blue sky")
    assert tokenizer.tokenize(row.prompt + row.response)[8] == ": B"
    (together,) = encode([row], tokenizer, together=True, limits=Limits())
    of = dict(zip(together.input_ids, together.labels, strict=True))
    assert of[tokenizer.convert_tokens_to_ids(": B")] == -100  # begins in the prompt
    labelled = [label for label in together.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(labelled) == [*"lue", " ", *"sky", "</s>"]
    (apart,) = encode([row], tokenizer, together=False, limits=Limits())
    labelled = [label for label in apart.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(labelled) == ["B", *"lue", " ", *"sky", "</s>"]
    assert tokenizer.convert_ids_to_tokens(apart.input_ids)[9:12] == [": ", "B", "l"]


def test_without_a_merge_together_is_what_metamaths_code_masks():
    """The labels begin after as many tokens as the prompt has alone."""
    tokenizer, row = byte_tokenizer(), Row("### Response:", "Blue sky")
    (one,) = encode([row], tokenizer, together=True, limits=Limits())
    alone = len(tokenizer(row.prompt, add_special_tokens=False)["input_ids"])
    assert [label == -100 for label in one.labels] == [True] * (1 + alone) + [False] * (len(one.labels) - 1 - alone)
    assert shown(tokenizer, one) == ("<s>### Response:Blue sky</s>", "Blue sky</s>")


def test_limits_cut_at_the_end():
    tokenizer = byte_tokenizer()
    whole = encode([ROW], tokenizer, False, Limits())[0]
    (cut,) = encode([ROW], tokenizer, False, Limits(source=3, target=2))
    first_label = next(at for at, label in enumerate(whole.labels) if label != -100)
    assert cut.input_ids == whole.input_ids[:3] + whole.input_ids[first_label : first_label + 2]
    (total,) = encode([ROW], tokenizer, True, Limits(total=4))
    assert len(total.input_ids) == len(total.labels) == 4
    assert with_labels([total]) == [] and with_labels([cut]) == [cut]


def test_the_fingerprint_is_of_the_texts():
    assert fingerprint([ROW]) == fingerprint([Row(*ROW)]) != fingerprint([Row("### Response:", "Blue sky")])


def rows_of(lengths, vocabulary=50):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [causal.Encoded(ids, [-100, *ids[1:]]) for ids in made]


LENGTHS = [5, 3, 9, 2, 7, 4, 6, 1, 8]


def test_packs_hold_every_row_once_and_little_else():
    encoded = rows_of(LENGTHS)
    packs = causal.JoinedRows(encoded, 10)
    assert all(len(ids) <= 10 for ids in packs["input_ids"])
    found = []
    for pack in packs:
        starts = [at for at, position in enumerate(pack["position_ids"]) if position == 0]
        found += [pack["input_ids"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
        assert all(pack["labels"][at] == -100 for at in starts)
    assert sorted(found) == sorted(one.input_ids for one in encoded)
    assert len(packs) == 5  # 45 tokens in bins of 10
    assert len(causal.JoinedRows(encoded, 4)) == 8  # the rows longer than that stand alone


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(kind, attention):
    """Each row's outputs in packs, padded too, are those it has alone; and so is the sum of the losses."""
    if kind == "llama":
        model = tiny_llama(50)
    else:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64))
    model.set_attn_implementation(attention)
    model.config.use_cache = False  # as the trainer sets it: with a cache transformers takes a pack for one row
    model.eval()
    encoded = rows_of([7, 4, 5, 3, 6])
    packs = causal.JoinedRows(encoded, 11)
    batch = causal.PaddedJoined(2)([packs[number] for number in range(len(packs))])
    assert set(batch) == {"input_ids", "labels", "position_ids"} and "attention_mask" not in batch
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**inputs).logits
        alone = {tuple(one.input_ids): model(input_ids=torch.tensor([one.input_ids])).logits[0] for one in encoded}
        loss = model(**batch, num_items_in_batch=1).loss
    for number, pack in enumerate(packs):
        starts = [at for at, position in enumerate(pack["position_ids"]) if position == 0]
        for a, b in zip(starts, [*starts[1:], len(pack["input_ids"])], strict=True):
            expected = alone[tuple(pack["input_ids"][a:b])]
            torch.testing.assert_close(packed[number, a:b], expected, rtol=1e-4, atol=1e-5)
    by_row = 0.0
    for one in encoded:
        logs = alone[tuple(one.input_ids)].log_softmax(-1)
        by_row -= sum(float(logs[at - 1, one.input_ids[at]]) for at in range(1, len(one.input_ids)))
    assert float(loss) == pytest.approx(by_row, rel=1e-5)
