"""Training, transcribing and scoring on tones with tiny Whispers of random weights."""

from __future__ import annotations

import itertools
import json
import shutil

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from speech_helpers import ENGLISH_ONLY, save_whisper, sound
from transformers import TrainerCallback, WhisperForConditionalGeneration
from transformers.models.whisper.english_normalizer import BasicTextNormalizer
from transformers.models.whisper.modeling_whisper import shift_tokens_right

import run_asr
import score_speech
import train_speech
import transcribe
import word_errors
from normalisers import normaliser, raw
from speech_data import Clip, read_outputs
from speech_rows import IGNORED, decoder_inputs, text_tokens
from vblora.io import read_json, read_tensors, write_json
from whisper_models import load_tokenizer, load_whisper, prompt_of

METHODS = {
    "vblora": ["--num_vectors", "12", "--vector_length", "16", "--topk", "2", "--rank", "2"],
    "lora": ["--rank", "2", "--lora_alpha", "2"],
    "lora_xs": ["--rank", "2"],
    "full": ["--targets", "both"],
}


# --- Tokens -------------------------------------------------------------------------------------------------------


def load(folder):
    return load_whisper(str(folder), window=1), load_tokenizer(str(folder))


def test_prompts_name_language_and_task_where_the_model_has_them(whispers):
    model, tokenizer = load(whispers["multilingual"])
    for language, token in (("it", None), ("italian", None), ("xx", "it")):
        prompt = prompt_of(model, tokenizer, language, token)
        assert tokenizer.decode(prompt.ids) == "<|startoftranscript|><|it|><|transcribe|><|notimestamps|>"
        assert (prompt.language, prompt.token) == (language, "<|it|>")
    model, tokenizer = load(whispers["english"])
    prompt = prompt_of(model, tokenizer, "it")
    assert tokenizer.decode(prompt.ids) == "<|startoftranscript|><|notimestamps|>" and prompt.token == ""
    with pytest.raises(ValueError, match="this model is English-only"):
        prompt_of(model, tokenizer, "xx", "it")


def test_prompts_that_cannot_be_are_refused(whispers, tmp_path):
    model, tokenizer = load(whispers["multilingual"])
    with pytest.raises(ValueError, match=r"--language asturian: .* nearest with --language_token, of en, "):
        prompt_of(model, tokenizer, "asturian")
    with pytest.raises(ValueError, match="--language_token qq: Whisper has no token"):
        prompt_of(model, tokenizer, "it", "qq")
    with pytest.raises(ValueError, match=r"has no <\|fr\|>"):  # a real language that this vocabulary lacks
        prompt_of(model, tokenizer, "fr")
    folder = save_whisper(tmp_path / "no_task", [*ENGLISH_ONLY, "<|it|>"])
    with pytest.raises(ValueError, match=r"has no <\|transcribe\|>: it cannot be asked for a transcript"):
        prompt_of(*load(folder), "it")


def test_the_decoder_is_to_say_the_text_and_its_end_and_nothing_else(whispers):
    model, tokenizer = load(whispers["multilingual"])
    prompt = prompt_of(model, tokenizer, "it")
    clips = [Clip(None, text, text, f"line {n}") for n, text in enumerate(["do re mi", "do"])]
    texts = text_tokens(clips, tokenizer, prompt, 32)
    batch = decoder_inputs(list(texts.values()), prompt.ids, tokenizer.pad_token_id)
    read, said = batch["decoder_input_ids"], batch["labels"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for text, row, labels in zip(("do re mi", "do"), read, said, strict=True):
        counted = labels != IGNORED
        # The end has a label, though it is the padding's token; what is padded has none.
        assert tokenizer.decode(labels[counted]) == f" {text}<|endoftext|>"
        assert counted[: len(prompt.ids) - 1].sum() == 0 and counted[len(prompt.ids) - 1]
        assert row[: len(prompt.ids)].tolist() == list(prompt.ids)
    # What is read is what is said, one place later, as the model itself would shift it.
    shifted = shift_tokens_right(said, tokenizer.pad_token_id, prompt.ids[0])
    assert torch.equal(shifted[0][len(prompt.ids) :], read[0][len(prompt.ids) :])
    with pytest.raises(ValueError, match=r"line 0: the transcript has 7 tokens, and the decoder reads 5: .*leave_out"):
        text_tokens(clips, tokenizer, prompt, 5)
    assert text_tokens(clips, tokenizer, prompt, 5, "leave_out") == {1: texts[1]}
    with pytest.raises(ValueError, match="line 0: the transcript has 7 tokens, and the decoder reads 2"):
        text_tokens(clips, tokenizer, prompt, 2, "leave_out")


def test_a_transcript_that_is_too_long_is_left_out_and_counted(flags, tones, tmp_path, capsys):
    data = shutil.copytree(tones, tmp_path / "data")
    table = data / "train.tsv"
    table.write_text(table.read_text().replace("\tre do\n", f"\tre {'do mi ' * 30}\n"))
    command = flags("english", "--method", "lora", *METHODS["lora"], "--data_dir", str(data), "--num_train_epochs", "1")
    with pytest.raises(ValueError, match=r"train\.tsv, line 3: the transcript has .* decoder reads 32: remove"):
        train_speech.main(command)
    result = train_speech.main([*command, "--long_clips", "leave_out"])
    assert result["train_rows"] == 7 and result["left_out"] == 1 and result["train_minutes"] == round(7 * 0.4 / 60, 2)
    assert "1 transcripts are longer than the 32 tokens of the decoder and are left out" in capsys.readouterr().out


def test_a_shorter_window_keeps_the_first_positions(whispers, tmp_path):
    whole, short = load_whisper(str(whispers["english"]), window=2), load_whisper(str(whispers["english"]), window=1)
    positions = [model.get_encoder().embed_positions.weight for model in (whole, short)]
    assert torch.equal(positions[1], positions[0][:50]) and not positions[1].requires_grad
    with torch.no_grad():
        assert short.get_encoder()(torch.randn(1, 80, 100)).last_hidden_state.shape == (1, 50, 16)
    short.save_pretrained(tmp_path / "short")
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "short")
    assert torch.equal(again.get_encoder().embed_positions.weight, positions[1])
    with pytest.raises(ValueError, match="--window must be from 1 to 2 seconds for this model, not 3"):
        load_whisper(str(whispers["english"]), window=3)


@pytest.mark.parametrize(("targets", "layers"), [("decoder", 20), ("encoder", 12), ("both", 32), ("cross", 8)])
def test_targets_are_the_layers_of_their_side(targets, layers, flags, tmp_path, monkeypatch):
    """Two layers a side: 10 linear layers in one of the decoder's, 6 in the encoder's, 4 of the cross-attention."""
    command, kept = ["--method", "lora", *METHODS["lora"], "--targets", targets, "--max_steps", "1"], []
    original = train_speech.encoded_of
    monkeypatch.setattr(train_speech, "encoded_of", lambda *given: kept.append(1) or original(*given))
    result = train_speech.main(flags("english", *command))
    tensors, _ = read_tensors(tmp_path / "run" / "last" / "adapter_model.safetensors")
    adapted = {name.rpartition(".lora_")[0] for name in tensors}
    assert len(adapted) == layers and result["stored_parameters"]["parameters"] == sum(
        t.numel() for t in tensors.values()
    )
    sides = {side for side in ("encoder", "decoder") for name in adapted if f".{side}." in name}
    assert sides == {"both": {"encoder", "decoder"}, "cross": {"decoder"}}.get(targets, {targets})
    assert len(kept) == (0 if "encoder" in sides else 2)  # of the training and of the development part


ENCODER = r"(.*\.)?encoder\.layers\.\d+\.fc1"


@pytest.mark.parametrize("method", ["file", "lora", "vblora", "tied_lora", "vera"])
def test_an_encoder_that_other_settings_adapt_is_trained(method, flags, tmp_path):
    """Though --targets says decoder: its outputs are not taken from before the training."""
    (tmp_path / "lora.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ENCODER})
    )
    command = ["--method", str(tmp_path / "lora.json")]
    if method != "file":
        settings = METHODS.get(method, ["--rank", "2"])
        command = ["--method", method, *settings, "--method_settings", json.dumps({"target_modules": ENCODER})]
    losses = train_speech.main(flags("english", *command))["validation_losses"]
    assert losses[1] != losses[0]
    tensors, _ = read_tensors(tmp_path / "run" / "last" / "adapter_model.safetensors")
    assert all("encoder" in name or "layers" not in name for name in tensors)


# --- Runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_train_transcribe_and_score(method, flags, tones, whispers, cache, tmp_path):
    kind = "english" if method == "lora" else "multilingual"
    command = flags(kind, "--method", method, *METHODS[method], "--max_new_tokens", "6")
    record = run_asr.main(command)
    losses = record["validation_losses"]
    assert len(losses) == 2 and losses[1] < losses[0] and record["train_rows"] == 8
    assert [point["step"] for point in record["curve"]] == [2, 4]
    said = read_outputs(tmp_path / "run" / "test.tsv")
    assert list(said) == ["test_0.wav", "test_1.wav", "test_2.wav"]
    scored = score_speech.main([str(tmp_path / "run" / "test.tsv"), str(tones / "test.tsv")])
    assert scored["rates"] == record["test"]["rates"] and record["test"]["clips"] == 3
    assert run_asr.main(command) == record  # finished: not run again
    if method != "full":
        (tmp_path / "run" / "test.tsv").unlink()
        merged = ["--merge", "--max_new_tokens", "6", "--cache_dir", str(cache), "--data_dir", str(tones)]
        transcribe.main([str(tmp_path / "run"), *merged, "--model_name_or_path", str(whispers[kind])])
        assert read_outputs(tmp_path / "run" / "test.tsv") == said


def test_mixed_precision_is_another_run_with_nearly_the_same_losses(flags, tmp_path):
    """In bfloat16 the processor autocasts; weights and adapter stay in float32, and what it decides is in the plan."""
    command = ["--method", "lora", *METHODS["lora"], "--targets", "both"]
    plain = train_speech.main(flags("english", *command, out=tmp_path / "plain"))
    mixed = train_speech.main(flags("english", *command, "--bf16", "true", out=tmp_path / "mixed"))
    assert mixed["settings"]["bf16"] is True and "bf16" not in plain["settings"]
    assert mixed["validation_losses"] != plain["validation_losses"]
    assert mixed["validation_losses"] == pytest.approx(plain["validation_losses"], rel=0.02)
    tensors, _ = read_tensors(tmp_path / "mixed" / "last" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_zero_shot_is_the_model_as_it_is(flags, tmp_path):
    record = run_asr.main(flags("english", "--method", "zero_shot", "--max_new_tokens", "4"))
    assert record["stored_parameters"] == {"parameters": 0, "bytes": 0} and record["steps"] == 0
    assert not (tmp_path / "run" / "last").exists() and record["prompt"]["token"] == ""


@pytest.mark.parametrize(
    ("useless", "message"),
    [
        (["--rank", "2"], "--rank does nothing with --method zero_shot: leave it out"),
        (["--learning_rate_adapter", "2"], "--method zero_shot trains nothing and has no settings"),
        (
            ["--learning_rate", "5"],
            "--learning_rate does nothing with --method zero_shot, which trains nothing: leave it",
        ),
        (["--spec_augment", "true"], "--spec_augment does nothing"),
        (["--targets", "encoder"], "--targets does nothing"),
        (["--max_train_samples", "2"], "--max_train_samples does nothing"),
        (["--config", "run.yaml"], "--num_train_epochs does nothing"),
    ],
)
def test_zero_shot_refuses_what_does_nothing(useless, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("num_train_epochs: 2\n")
    command = ["--row", "large_v2_fleurs/zero_shot", "--language", "it", "--data_dir", "x", "--output_dir", "y"]
    for chosen in (
        ["--bf16", "false", "--spec_augment", "false"],
        ["--seed", "1", "--use_cpu", "true", "--report_to", "none"],
    ):
        run_asr.parse([*command, *chosen])  # the row's own, and what is of the process or the place
    with pytest.raises(ValueError, match=message):
        run_asr.parse([*command, "--bf16", "false", *useless])


def test_a_changed_test_part_is_refused_where_there_is_a_record(flags, tones, tmp_path):
    data = shutil.copytree(tones, tmp_path / "data")
    command = flags("english", "--method", "zero_shot", "--max_new_tokens", "4", "--data_dir", str(data))
    record, table = run_asr.main(command), data / "test.tsv"
    assert record["test"]["data"] == read_json(tmp_path / "run" / "test.decoding.json")["data"]
    table.write_text(table.read_text().replace("do re mi", "do re fa"))
    with pytest.raises(
        ValueError, match=r"record of another test part: .*test\.tsv or its recordings have changed; put"
    ):
        run_asr.main(command)
    file = tmp_path / "run" / "record.json"
    write_json(file, {**record, "test": {name: value for name, value in record["test"].items() if name != "data"}})
    assert "data" not in run_asr.main(command)["test"]  # as records were


def test_a_wrong_test_part_is_found_before_the_training(flags, tones, tmp_path, monkeypatch):
    data = shutil.copytree(tones, tmp_path / "data")
    monkeypatch.setattr(train_speech, "fit", lambda *given: pytest.fail("trained first"))
    command = flags("english", "--method", "lora", *METHODS["lora"], "--data_dir", str(data))
    (data / "test.tsv").write_text("path\ttext\nnone.wav\tdo\n")
    with pytest.raises(ValueError, match=r"test\.tsv, line 2: no recording"):
        run_asr.main(command)
    (data / "test.tsv").unlink()
    with pytest.raises(ValueError, match=r"has no test\.tsv"):
        run_asr.main(command)
    soundfile.write(data / "long.mp3", sound("do re mi fa", 16000), 16000)
    whole = (data / "long.mp3").read_bytes()
    (data / "long.mp3").write_bytes(whole[: len(whole) // 2])  # its header is whole
    (data / "test.tsv").write_text("path\ttext\nlong.mp3\tdo\n")
    with pytest.raises(ValueError, match=r"test\.tsv, line 2: .*long\.mp3 is cut short"):
        run_asr.main(command)


def test_transcripts_are_never_replaced(flags, tones, whispers, cache, tmp_path):
    """The texts of a run have the names of the tables: in their folder they would take their place, at a WER of 0."""
    data = shutil.copytree(tones, tmp_path / "data")
    before = {file.name: file.read_bytes() for file in data.iterdir()}
    command = ["--method", "zero_shot", "--max_new_tokens", "4", "--data_dir", str(data)]
    for main in (run_asr.main, train_speech.main):
        with pytest.raises(ValueError, match=r"data is the folder of the data, whose tables the run would replace"):
            main(flags("english", *(command if main is run_asr.main else command[:2] + command[4:]), out=data))
    run_asr.main(flags("english", *command))
    shutil.copytree(tmp_path / "run", data, dirs_exist_ok=True, ignore=lambda _, names: {*before} & {*names})
    here = ["--model_name_or_path", str(whispers["english"]), "--cache_dir", str(cache), "--max_new_tokens", "4"]
    with pytest.raises(ValueError, match="is the folder of the data"):
        transcribe.main([str(data), *here, "--data_dir", str(data / ".")])
    assert {name: (data / name).read_bytes() for name in before} == before
    (tmp_path / "run" / "test.decoding.json").unlink()
    (tmp_path / "run" / "test.tsv").write_text("mine")
    with pytest.raises(ValueError, match=r"test\.tsv was not written by this command, .*: move it away first"):
        transcribe.main([str(tmp_path / "run"), *here, "--data_dir", str(tones)])
    assert (tmp_path / "run" / "test.tsv").read_text() == "mine"


def test_recordings_without_a_transcript_are_transcribed(flags, tones, whispers, cache, tmp_path, capsys):
    run_asr.main(flags("english", "--method", "zero_shot", "--max_new_tokens", "2"))
    assert "warning: 3 of 3 transcripts have more than 2 tokens (up to" in capsys.readouterr().out
    run, here = tmp_path / "run", ["--model_name_or_path", str(whispers["english"]), "--cache_dir", str(cache)]
    spoken = (run / "test.tsv").read_text()
    for table in ("path\n{}\n{}\n{}\n", "path\ttext\n{}\t\n{}\t\n{}\t\n"):
        for name in ("test.tsv", "test.decoding.json"):
            (run / name).unlink()
        (tmp_path / "test.tsv").write_text(table.format(*(tones / f"test_{number}.wav" for number in range(3))))
        transcribe.main([str(run), *here, "--data_dir", str(tmp_path), "--max_new_tokens", "2"])
        assert (run / "test.tsv").read_text().replace(f"{tones}/", "") == spoken
    with pytest.raises(ValueError, match=r"test\.tsv, line 2: the transcript '' has no word"):
        run_asr.read_table(tmp_path / "test.tsv")


def test_a_recording_called_otherwise_than_in_its_text_is_named(flags, tones, whispers, cache, tmp_path):
    data, run = shutil.copytree(tones, tmp_path / "data"), tmp_path / "run"
    command = flags("english", "--method", "zero_shot", "--max_new_tokens", "4", "--data_dir", str(data))
    record = run_asr.main(command)
    (run / "record.json").unlink()
    table = data / "test.tsv"
    table.write_text(table.read_text().replace("test_1.wav", "./test_1.wav"))
    with pytest.raises(ValueError, match=r"has no row for test_1\.wav, which .*: remove .*run/test\.tsv"):
        run_asr.main(command)
    (run / "test.tsv").unlink()
    assert run_asr.main(command)["test"] == record["test"]


def test_a_folder_of_zero_shot_is_of_one_run(flags, tones, whispers, cache, tmp_path):
    """It holds no adapter: what tells it from another window's is the run's plan."""
    command = ["--method", "zero_shot", "--max_new_tokens", "4"]
    record, run = run_asr.main(flags("english", *command)), tmp_path / "run"
    with pytest.raises(ValueError, match=r"holds a run with other settings \(window: 1 before, 2 now\)"):
        run_asr.main(flags("english", *command, "--window", "2"))
    for name in ("record.json", "training.json"):
        (run / name).unlink()
    with pytest.raises(ValueError, match=r"dev\.tsv has texts of other settings \(run: "):
        run_asr.main(flags("english", *command, "--window", "2"))
    (run / "training.json").unlink()
    note = read_json(run / "dev.decoding.json")
    write_json(run / "dev.decoding.json", {name: value for name, value in note.items() if name != "run"})
    assert run_asr.main(flags("english", *command))["test"] == record["test"]  # older notes do not name their run


def test_a_fixed_encoder_computed_once_or_in_every_step_gives_one_training(flags, tmp_path):
    command = ["--method", "vblora", *METHODS["vblora"], "--targets", "cross"]
    kept = train_speech.main(flags("english", *command, out=tmp_path / "kept"))
    anew = train_speech.main(flags("english", *command, "--cache_encoder", "false", out=tmp_path / "anew"))
    assert kept["settings"] == anew["settings"]
    assert kept["validation_losses"] == pytest.approx(anew["validation_losses"], rel=1e-5)


class Stop(Exception):
    pass


class StopAfterFirstSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise Stop


@pytest.mark.parametrize("method", ["vblora", "lora"])
def test_an_interrupted_training_ends_as_if_it_had_not_been(method, flags, tmp_path, monkeypatch):
    """Bit for bit, with masks drawn in every step; saved in the middle of an epoch."""
    command = ["--method", method, *METHODS[method], "--targets", "both", "--spec_augment", "true"]
    command += ["--save_strategy", "steps", "--save_steps", "3"]
    whole = train_speech.main(flags("multilingual", *command, out=tmp_path / "whole"))
    plain = train_speech.main(flags("multilingual", *[*command, "--spec_augment", "false"], out=tmp_path / "plain"))
    original = train_speech.SpeechTrainer

    def stopping(*arguments, **others):
        trainer = original(*arguments, **others)
        trainer.add_callback(StopAfterFirstSave())
        return trainer

    monkeypatch.setattr(train_speech, "SpeechTrainer", stopping)
    with pytest.raises(Stop):
        train_speech.main(flags("multilingual", *command, out=tmp_path / "parts"))
    monkeypatch.setattr(train_speech, "SpeechTrainer", original)
    parts = train_speech.main(flags("multilingual", *command, out=tmp_path / "parts"))
    assert parts["validation_losses"] == whole["validation_losses"] != plain["validation_losses"]
    tensors = [read_tensors(tmp_path / name / "last" / "adapter_model.safetensors")[0] for name in ("whole", "parts")]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


def test_an_interrupted_transcribing_goes_on_to_the_same_texts(flags, tones, whispers, cache, tmp_path, monkeypatch):
    train_speech.main(flags("english", "--method", "lora", *METHODS["lora"], "--max_steps", "1"))
    command = [str(tmp_path / "run"), "--data_dir", str(tones), "--beam", "2", "--max_new_tokens", "5"]
    command += ["--model_name_or_path", str(whispers["english"]), "--batch_size", "2", "--cache_dir", str(cache)]
    whole = transcribe.main(command).read_text()
    (tmp_path / "run" / "test.tsv").unlink()
    original = transcribe.Progress.add

    def failing(self, texts):
        original(self, texts)
        raise Stop

    monkeypatch.setattr(transcribe.Progress, "add", failing)
    with pytest.raises(Stop):
        transcribe.main(command)
    assert not (tmp_path / "run" / "test.tsv").exists()
    seen = []
    monkeypatch.setattr(transcribe.Progress, "add", lambda self, texts: (seen.append(texts), original(self, texts)))
    assert transcribe.main(command).read_text() == whole and len(seen) == 1
    assert read_json(tmp_path / "run" / "test.decoding.json")["cut"] == sum(len(t) > 0 for t in whole.split("\n")[1:-1])
    with pytest.raises(ValueError, match="has texts of other settings"):
        transcribe.main([*command, "--beam", "1"])


def test_a_batch_says_what_each_recording_says_alone(whispers, tones, cache):
    from features import features_of
    from speech_data import load_split, sound_prints

    model, tokenizer = load(whispers["multilingual"])
    part = load_split(tones, "test")
    heard = features_of(part.clips, sound_prints(part.clips), part.seconds, 80, 1, cache)
    prompt, model = prompt_of(model, tokenizer, "it"), model.eval()
    for beam in (1, 3):
        decoding = transcribe.Decoding(beam=beam, max_new_tokens=7)
        numbers = list(range(len(part.clips)))
        together = transcribe.texts_of(model, tokenizer, transcribe.batch_of(heard, numbers), prompt, decoding)
        alone = [
            transcribe.texts_of(model, tokenizer, transcribe.batch_of(heard, [n]), prompt, decoding) for n in numbers
        ]
        assert together == list(itertools.chain(*alone))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data_dir", "nonesuch"], "nonesuch: no such folder"),
        (["--window", "3"], "--window must be from 1 to 2 seconds"),
        (["--long_clips", "cut"], "--long_clips must be one of refuse, leave_out"),
        (["--max_train_samples", "0"], "--max_train_samples must be at least 1"),
        (["--targets", "nonesuch"], "match no layer"),
        (
            ["--targets", ".*conv1"],
            r"--targets \.\*conv1 matches model\.encoder\.conv1, a convolution, which is not adapted",
        ),
        (["--targets", "("], r"--targets \(: .*one of decoder, encoder, both, cross"),
        (["--method", "full"], "--method full trains the whole model: --targets both"),
        (["--method", "lora", "--topk", "2"], "--topk does nothing with --method lora"),
        (["--dtype", "float99"], "--dtype float99 names no floating point type"),
        (["--language", "klingon"], "--language klingon: Whisper has no token"),
    ],
)
def test_wrong_input_to_training_is_named(wrong, message, flags):
    with pytest.raises(ValueError, match=message):
        train_speech.main(flags("multilingual", *wrong))


def test_a_model_of_another_kind_is_refused(flags, tmp_path):
    from language_helpers import save_tiny_llama

    folder = str(save_tiny_llama(tmp_path / "llama"))
    with pytest.raises(ValueError, match="is a model of type llama, not a Whisper"):
        load_whisper(folder)
    with pytest.raises(ValueError, match="is a model of type llama, not a Whisper"):
        run_asr.main(flags("english", "--method", "zero_shot", "--model_name_or_path", folder))


def test_an_unreadable_recording_leaves_what_was_transcribed(flags, tones, tmp_path, whispers, cache):
    run_asr.main(flags("english", "--method", "zero_shot", "--max_new_tokens", "3"))
    before = (tmp_path / "run" / "test.tsv").read_text()
    (tmp_path / "data").mkdir()
    soundfile.write(tmp_path / "data" / "a.wav", sound("do"), 8000)
    (tmp_path / "data" / "test.tsv").write_text("path\ttext\na.wav\tdo\nb.wav\tre\n")
    command = [str(tmp_path / "run"), "--model_name_or_path", str(whispers["english"]), "--cache_dir", str(cache)]
    with pytest.raises(ValueError, match=r"test\.tsv, line 3: no recording"):
        transcribe.main([*command, "--data_dir", str(tmp_path / "data")])
    assert (tmp_path / "run" / "test.tsv").read_text() == before


# --- Rates --------------------------------------------------------------------------------------------------------


def test_word_and_character_rates_are_counted_over_all_recordings():
    references = ["a b c d", "e f"]
    hypotheses = ["a x c", "e f g h i j k"]
    rates = word_errors.rates(references, hypotheses, {"raw": raw})["raw"]
    # One substitution and one deletion; five insertions: 7 of 6 words, which is not cut at 100.
    assert {n: rates["wer"][n] for n in ("substitutions", "deletions", "insertions", "length")} == {
        "substitutions": 1,
        "deletions": 1,
        "insertions": 5,
        "length": 6,
    }
    assert rates["wer"]["percent"] == pytest.approx(700 / 6)
    # Of two recordings drawn twice, one of four draws has the better alone, one the worse alone.
    assert rates["wer"]["low"] == pytest.approx(50) and rates["wer"]["high"] == pytest.approx(250)
    assert rates["cer"]["length"] == 7 + 3 and rates["cer"]["insertions"] == 10
    with pytest.raises(ValueError, match="1 references and 0 hypotheses"):
        word_errors.rates(["a"], [], {"raw": raw})
    none = {"none": lambda text: ""}
    with pytest.raises(
        ValueError, match=r"nothing is left of the references of r\.tsv under the normaliser none: take"
    ):
        word_errors.rates(["!"], ["a"], {"raw": raw, **none}, "r.tsv")


def test_character_rates_are_jiwers_under_whispers_normaliser():
    """It leaves a blank where a text ends with punctuation, which nobody said."""
    references, hypotheses = ["Ciao a tutti.", "Sì!", "Perché no?"], ["ciao tutti", "si", "Perche no."]
    basic = BasicTextNormalizer()
    expected = jiwer.cer(*([basic(text).strip() for text in texts] for texts in (references, hypotheses)))
    rate = word_errors.rates(references, hypotheses, {"basic": normaliser("basic")})["basic"]["cer"]
    assert rate["percent"] == pytest.approx(100 * expected) and rate["length"] == len("ciao a tuttisiperche no")


def test_a_reference_of_which_nothing_is_left_counts_what_was_said():
    assert word_errors.word_counts("", "a b") == (0, 0, 2, 0)
    errors, lengths = np.array([2, 0]), np.array([0, 4])
    draws = word_errors.resampled(errors, lengths)
    assert set(np.round(draws, 6)) == {0.0, 50.0} and len(draws) < word_errors.DRAWS


def test_outputs_and_references_must_name_the_same_recordings(tmp_path, capsys):
    (tmp_path / "out.tsv").write_text("path\ttext\na.wav\tdo\n")
    (tmp_path / "ref.tsv").write_text("path\ttext\na.wav\tdo\nb.wav\tre\n")
    command = [str(tmp_path / "out.tsv"), str(tmp_path / "ref.tsv")]
    with pytest.raises(
        ValueError, match=r"out\.tsv has no row for b\.wav, which .*ref\.tsv has: score against .*--only_outputs"
    ):
        score_speech.main(command)
    with pytest.raises(ValueError, match=rf"^--json {tmp_path} is a folder: name a file in it$"):
        score_speech.main([*command, "--json", str(tmp_path)])
    assert score_speech.main([*command, "--only_outputs"])["rates"]["raw"]["wer"]["percent"] == 0
    assert "1 of 2 recordings of" in capsys.readouterr().out
    (tmp_path / "out.tsv").write_text("path\ttext\na.wav\tDo\nb.wav\t\n")
    result = score_speech.main([*command, "--json", str(tmp_path / "rates.json")])
    assert result["rates"]["raw"]["wer"]["percent"] == 100 and result["rates"]["unicode"]["wer"]["percent"] == 50
    assert read_json(tmp_path / "rates.json")["empty_outputs"] == 1


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (score_speech.main, ["a.tsv"], "the following arguments are required: REFERENCES"),
        (score_speech.main, ["a.tsv", "b.tsv", "--normalisers", "french"], "invalid choice: 'french'"),
        (transcribe.main, ["run", "--data_dir", "x", "--split", "validation"], "invalid choice: 'validation'"),
        (transcribe.main, ["run", "--data_dir", "x", "--beam", "one"], "invalid int value: 'one'"),
    ],
)
def test_wrong_flags_are_one_line(main, arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)


@pytest.mark.parametrize("text", ["", "[]", '{"text": 1, "ended": true}', '{"text": "a"}', "[" * 100_000], ids=range(5))
def test_a_damaged_text_of_a_clip_is_named_with_its_place(text):
    assert transcribe._read('{"text": "a", "ended": true}', "f, clip 0") == {"text": "a", "ended": True}
    with pytest.raises(ValueError, match="f, clip 0: no"):
        transcribe._read(text, "f, clip 0")
