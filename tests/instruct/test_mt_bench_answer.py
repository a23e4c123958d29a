"""Answering with a tiny random Llama, alone and with adapters."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from language_helpers import byte_tokenizer, tiny_llama
from mt_bench_helpers import QUESTIONS, answer_row, write_rows

import finetune
import mt_bench_answer
import vblora
from mt_bench import read_answers
from mt_bench_answer import Says, generate, main, prompt
from vblora_experiments import instruction_data

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model with a tokenizer that has no chat template, and with one that has."""
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer))
    made = {}
    for kind, template in (("plain", None), ("chat", CHAT)):
        made[kind] = tmp_path_factory.mktemp("models") / kind
        tokenizer.chat_template = template
        model.save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
    return made


@pytest.fixture
def model(folders):
    return mt_bench_answer.models.load_model(str(folders["plain"]))


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def command(bench_dir, tmp_path):
    """A function from a model and further flags to the arguments."""

    def make(model, *more, output="out", name="m"):
        places = ["--bench_dir", str(bench_dir), "--output", str(tmp_path / output)]
        return [str(model), "--model_id", name, *places, "--max_new_tokens", "6", *map(str, more)]

    return make


def turns(path):
    return {answer.question_id: answer.turns for answer in read_answers(path)}


@pytest.fixture
def asked(monkeypatch):
    """What `generate` is called with, as (text of the prompt, temperature, tokens, stop); it says "reply N"."""
    calls = []

    def record(model, tokenizer, encoded, temperature, max_new_tokens, stop):
        calls.append((tokenizer.decode(encoded), temperature, max_new_tokens, stop))
        return f"reply {len(calls)}"

    monkeypatch.setattr(mt_bench_answer, "generate", record)
    return calls


# --------------------------------------------------------------------------------------------- dialogues


def test_the_second_prompt_holds_the_first_turn_and_its_answer_in_alpacas_form(folders, command, asked):
    path = main(command(folders["plain"]))
    opening = f"<s>{INTRODUCTION}\n\n"
    one = f"{opening}### Instruction:\nWrite {{a}} line.\n\n### Response: "
    assert asked[0] == (one, 0.7, 6, "### Instruction:")
    second = "### Instruction:\nNow in \u2028 capitals.\n\n### Response: "
    assert asked[1] == (f"{one}reply 1\n\n{second}", 0.7, 6, "### Instruction:")
    assert asked[2][0] == f"{opening}### Instruction:\nThree sisters?\n\n### Response: "
    assert [call[1] for call in asked] == [0.7, 0.7, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1]
    assert turns(path) == {
        q["question_id"]: [f"reply {2 * n + 1}", f"reply {2 * n + 2}"] for n, q in enumerate(QUESTIONS)
    }


def test_the_tokenizers_own_template_is_used_where_there_is_one(folders, command, asked):
    main(command(folders["chat"], "--questions", 112))
    assert asked == [
        ("<|user|>1 + 1?</s><|assistant|>", 0.0, 6, None),
        ("<|user|>1 + 1?</s><|assistant|>reply 1</s><|user|>And 2 + 2?</s><|assistant|>", 0.0, 6, None),
    ]
    main(command(folders["chat"], "--questions", 112, "--template", "alpaca", name="other"))
    assert asked[2][0].startswith(f"<s>{INTRODUCTION}")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        main(command(folders["plain"], "--template", "chat"))


def test_alpacas_first_prompt_is_the_trainings_token_for_token(tokenizer):
    row = instruction_data.DATA_FORMATS["alpaca"].row({"instruction": "1 + {1}?", "output": "2"})
    trained = instruction_data.encode([row], tokenizer, False, instruction_data.Limits())[0]
    source = [i for i, label in zip(trained.input_ids, trained.labels, strict=True) if label == -100]
    assert prompt(tokenizer, "alpaca", ["1 + {1}?"], []) == source


# -------------------------------------------------------------------------------------------- generation


def test_temperature_0_takes_the_likeliest_token_each_time(model, tokenizer):
    encoded = tokenizer("### Response: ")["input_ids"]
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)  # as Llama 2 has it
    ids = list(encoded)
    with torch.no_grad():
        while len(ids) < len(encoded) + 8 and (len(ids) == len(encoded) or ids[-1] != tokenizer.eos_token_id):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[len(encoded) :], skip_special_tokens=True).strip()
    assert generate(model, tokenizer, encoded, 0.0, 8, None) == expected != ""


def test_sampling_goes_by_the_temperature_and_the_seed(model, tokenizer):
    encoded = tokenizer("Name a colour.")["input_ids"]

    def text(temperature, seed):
        torch.manual_seed(seed)
        return generate(model, tokenizer, encoded, temperature, 12, None)

    assert text(0.7, 0) == text(0.7, 0) != text(0.7, 1)
    assert text(1e-4, 0) == text(1e-4, 1) == generate(model, tokenizer, encoded, 0.0, 12, None)


def test_a_text_ends_where_the_next_instruction_would_begin(model, tokenizer, monkeypatch):
    encoded = tokenizer("a")["input_ids"]
    torch.manual_seed(3)
    whole = generate(model, tokenizer, encoded, 0.7, 40, None)
    stop = next(whole[at : at + 3] for at in range(8, 30) if whole[at : at + 3].isascii() and whole[at])
    lengths, original = [], model.generate

    def counting(**options):
        output = original(**options)
        lengths.append(output.shape[1] - len(encoded))
        return output

    monkeypatch.setattr(model, "generate", counting)
    torch.manual_seed(3)
    assert generate(model, tokenizer, encoded, 0.7, 40, stop) == whole.partition(stop)[0].strip()
    assert lengths[0] < 40


def test_only_the_generated_tokens_are_looked_at_for_the_end(tokenizer):
    mark = "### Instruction:"
    front = tokenizer(mark, add_special_tokens=False)["input_ids"]
    ends = Says(mark, tokenizer, len(front))
    assert not ends(torch.tensor([front]), None).item()
    assert ends(torch.tensor([front + tokenizer(f"yes\n\n{mark}", add_special_tokens=False)["input_ids"]]), None).item()
    bytes_alone = [tokenizer.convert_tokens_to_ids(c) for c in "###ĠInstruction:"]
    assert ends(torch.tensor([front + bytes_alone]), None).item()


def test_the_models_end_tokens_count_beside_the_tokenizers(model, tokenizer):
    encoded = tokenizer("Name a colour.")["input_ids"]
    text = generate(model, tokenizer, encoded, 0.0, 6, None)
    first = int(model(torch.tensor([encoded])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first, 1]
    assert generate(model, tokenizer, encoded, 0.0, 6, None) == tokenizer.decode([first]).strip() != text


def test_no_more_is_generated_than_the_model_has_room_for(folders, command, asked, bench_dir, monkeypatch):
    small = tiny_llama(len(byte_tokenizer()))
    small.config.max_position_embeddings = 100
    monkeypatch.setattr(mt_bench_answer.Tuned, "load", lambda tuned: small)
    main(command(folders["chat"], "--questions", 112, "--max_new_tokens", "90"))
    size = [len(byte_tokenizer()(text, add_special_tokens=False)["input_ids"]) for text, *_ in asked]
    assert [most for _, _, most, _ in asked] == [min(90, 100 - n) for n in size] and size[1] > 10
    small.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match=r"question 112, turn \d: .* leave no room in the model's 20"):
        main(command(folders["chat"], "--questions", 112, name="n"))


# ---------------------------------------------------------------------------------------------- progress


def test_interrupted_it_goes_on_to_the_same_answers(folders, command, tmp_path, monkeypatch):
    whole = turns(main(command(folders["plain"], output="whole")))
    original, calls = mt_bench_answer.answer, []

    def failing(model, tokenizer, question, *rest):
        calls.append(question.question_id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(model, tokenizer, question, *rest)

    monkeypatch.setattr(mt_bench_answer, "answer", failing)
    with pytest.raises(KeyboardInterrupt):
        main(command(folders["plain"]))
    folder = tmp_path / "out" / "model_answer"
    assert not list(folder.glob("*.jsonl"))  # what is half done is no model's answers to FastChat
    with (folder / "m.jsonl.partial").open("a") as file:
        file.write('{"question_id": 11')  # as after a power cut
    path = main(command(folders["plain"]))
    assert calls == [81, 104, 112, 112, 141] and turns(path) == whole
    assert sorted(file.name for file in folder.iterdir()) == ["m.jsonl", "m.settings.json"]
    before = path.read_bytes()
    main(command(folders["plain"]))
    assert path.read_bytes() == before and len(calls) == 5


def test_a_part_can_be_taken_and_the_rest_later(folders, command):
    whole = turns(main(command(folders["plain"], output="whole")))
    assert list(turns(main(command(folders["plain"], "--questions", 141, 104)))) == [104, 141]
    assert list(turns(main(command(folders["plain"], "--max_questions", 1)))) == [81, 104, 141]
    path = main(command(folders["plain"]))
    assert turns(path) == whole
    row = json.loads(path.read_text().split("\n")[0])
    assert list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"] and row["model_id"] == "m"


def test_a_changed_setting_is_named(folders, command, asked, tmp_path):
    main(command(folders["plain"]))
    with pytest.raises(ValueError, match=r"seed: 0 before, 1 now\): give another --model_id"):
        main(command(folders["plain"], "--seed", 1))
    with pytest.raises(ValueError, match="max_new_tokens: 6 before, 7 now"):
        main(command(folders["plain"], "--max_new_tokens", 7))
    with pytest.raises(ValueError, match=r"template: alpaca before, chat now"):
        main(command(folders["chat"]))
    write_rows(tmp_path / "out" / "model_answer" / "theirs.jsonl", [answer_row(81, "theirs", ["a", "b"])])
    with pytest.raises(ValueError, match=r"theirs\.jsonl was not written by this command"):
        main(command(folders["plain"], name="theirs"))
    assert len(asked) == 8


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--questions", "7"], "no question 7"),
        (["--max_questions", "0"], "--max_questions must be at least 1"),
        (["--dtype", "float33"], "float33"),
        (["--adapter", "nowhere"], r"--adapter nowhere: there is no adapter_config\.json"),
        (["--model_name_or_path", "x"], "is given with the folder of a run"),
        (["--model_id", "../m"], "cannot name a file"),
    ],
)
def test_wrong_flags_are_named(flags, message, folders, command, tmp_path):
    with pytest.raises(ValueError, match=message):
        main(command(folders["plain"], *flags))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- adapters


def save_vblora(folder, model):
    config = vblora.VBLoRAConfig(r=2, num_vectors=8, vector_length=16, topk=2, target_modules=["q_proj", "v_proj"])
    adapter = vblora.attach(model, config, seed=0)
    with torch.no_grad():
        adapter.vector_bank.normal_(std=2.0)
    adapter.save(folder)


def save_lora(folder, model):
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=1.0)
    made.save_pretrained(folder)


@pytest.mark.parametrize("save", [save_vblora, save_lora])
def test_an_adapter_answers(save, folders, model, command, tmp_path, tokenizer):
    save(tmp_path / "adapter", model)  # `model` has the adapter on now
    base = turns(main(command(folders["plain"], name="base")))
    path = main(command(folders["plain"], "--adapter", tmp_path / "adapter", name="adapted"))
    direct = generate(model.eval(), tokenizer, prompt(tokenizer, "alpaca", ["1 + 1?"], []), 0.0, 6, "### Instruction:")
    assert turns(path)[112][0] == direct and turns(path) != base
    with pytest.raises(ValueError, match="adapter_fingerprint"):
        main(command(folders["plain"], name="adapted"))


@pytest.mark.parametrize("method", ["vblora", "full"])
def test_a_run_of_finetune_answers_in_the_form_it_was_trained_on(method, folders, command, tmp_path, asked):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(4)]))
    flags = ["--model_name_or_path", str(folders["chat"]), "--data", str(data), "--method", method]
    sizes = ["--rank", "2", "--num_vectors", "8", "--vector_length", "16"] if method == "vblora" else []
    steps = ["--max_steps", "1", "--use_cpu", "true", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")]
    finetune.main([*flags, *sizes, *steps])
    path = main(command(tmp_path / "run", "--model_name_or_path", folders["chat"], "--questions", 112))
    assert asked[0][0].startswith(f"<s>{INTRODUCTION}") and turns(path) == {112: ["reply 1", "reply 2"]}
    with pytest.raises(ValueError, match="leave --adapter out"):
        main(command(tmp_path / "run", "--adapter", tmp_path))
    with pytest.raises(ValueError, match="name its folder with --model_name_or_path"):
        main(command(tmp_path / "run"))
    other = shutil.copytree(folders["chat"], tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="is not the model that the run was made on"):
        main(command(tmp_path / "run", "--model_name_or_path", other))
    (tmp_path / "run" / "training.json").unlink()
    with pytest.raises(ValueError, match="holds no finished run"):
        main(command(tmp_path / "run", "--model_name_or_path", folders["chat"]))
