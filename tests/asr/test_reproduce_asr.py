"""The speech table as a whole: its rows and scripts, the plan, a tiny one run by the real command, the table."""

from __future__ import annotations

import csv
import io
import os
import shlex
from pathlib import Path

import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES as OF_WHISPER

import asr_rows
import asr_secondary
import reproduce_asr
import run_asr
import speech_curves
import train_speech
from asr_rows import LANGUAGES, METHODS, MODELS, row
from reproduce_asr import Speech, Trial
from transcribe import Decoding
from vblora.io import read_json, write_json
from vblora_experiments import campaign, runs, schedule

FOLDER = Path(asr_rows.__file__).parent
TABLE = Speech()


def planned(*arguments):
    return TABLE.plan(campaign.parse(TABLE, ["asr", *arguments]), {})


def record(trial, wer, data="d", cut=0):
    rate = {"percent": wer, "low": wer - 5, "high": wer + 5}
    rates = {name: {"wer": rate, "cer": rate} for name in run_asr.NORMALISERS}
    flags = {**row(trial.row), **trial.overrides}
    return {
        "experiment": "asr",
        "row": trial.row,
        "overrides": dict(trial.overrides),
        "seed": trial.seed,
        "model": "whisper",
        "method": flags["method"],
        "language": trial.changes["language"],
        "settings": {**flags, "data_fingerprint": data},
        "dev": {"rates": rates, "clips": 30, "cut": 0},
        "test": {"rates": rates, "clips": 61, "cut": cut},
        "scores": {"WER": wer, "CER": wer},
        "stored_parameters": {"parameters": 15_974, "bytes": 63_896},
        "train_seconds": 600.0,
    }


def printed(trials, found, *arguments):
    return TABLE.table(trials, found, campaign.parse(TABLE, ["asr", *arguments]), {})


def test_every_row_is_taken_by_the_run():
    for model in MODELS:
        for method in METHODS:
            arguments = ["--row", f"{model}/{method}", "--data_dir", "x", "--language", "it", "--use_cpu", "true"]
            arguments += ["--bf16", "false"]
            settings = run_asr.parse(arguments)
            speech, chosen, training = train_speech.parts(settings)
            decoding = settings.of(Decoding)
            assert chosen.method == row(f"{model}/{method}")["method"] and speech.language == "it"
            assert training.max_steps > 0 or training.num_train_epochs == 3
            assert decoding.max_new_tokens == row(f"{model}/{method}")["max_new_tokens"]


@pytest.mark.parametrize("file", sorted((FOLDER.parent / "results" / "asr").glob("*.json")), ids=lambda f: f.stem)
def test_a_kept_records_run_is_the_same_run_today(file):
    """The plan of the same row, seed and flags; where the model lies, and its fingerprint, are not known here."""
    kept = read_json(file)
    flags = [word for name, value in kept["overrides"].items() for word in (f"--{name}", value)]
    settings = run_asr.parse(["--row", kept["row"], "--seed", str(kept["seed"]), "--data_dir", "x", *flags])
    plan = runs.make_plan(*train_speech.parts(settings), kept["settings"]["data_fingerprint"])
    assert runs.differences(kept["settings"], plan) == ["model_fingerprint"]
    assert kept["settings"].keys() - plan.keys() == {"model_fingerprint"}
    assert settings.of(Decoding) == Decoding(**kept["decoding"]) and settings.overrides == kept["overrides"]


def test_a_run_shows_what_it_resolves_and_where_each_value_comes_from(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("row: base/recipe\nlanguage: ru\nmax_new_tokens: 90\nbf16: true\n")
    places = ["--config", str(tmp_path / "run.yaml"), "--data_dir", "nowhere", "--output_dir", str(tmp_path / "out")]
    assert run_asr.main([*places, "--window", "10", "--plan"]) == {}
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    source = f"config {tmp_path / 'run.yaml'}"
    expected = {
        "max_new_tokens": ["90", source],
        "bf16": ["true", source],
        "window": ["10", "flag"],
        "targets": ["decoder", "row base/recipe"],
        "beam": ["1", "default"],
        "long_clips": ["leave_out", "row base/recipe"],
        "save_strategy": ["epoch", "default of run_asr.py"],
    }
    assert {name: shown[name].split(maxsplit=1) for name in expected} == expected
    assert not (tmp_path / "out").exists()
    run_asr.main(["--row", "base/zero_shot", "--language", "it", "--data_dir", "nowhere", "--plan"])
    train_speech.main(["--row", "tiny_en/lora", "--language", "it", "--data_dir", "nowhere", "--plan"])
    assert "max_new_tokens" not in capsys.readouterr().out.partition("train_speech.py")[2]
    (tmp_path / "run.yaml").write_text("languages: it\n")
    with pytest.raises(ValueError, match="unknown key 'languages'; near it: language"):
        run_asr.main(places)


def test_every_script_names_its_row():
    """Each script hands its row and all flags to run.sh, which hands them to run_asr.py."""
    scripts = sorted((FOLDER / "scripts").iterdir())
    assert [script.name for script in scripts] == sorted(f"{r}_{m}.sh" for m in MODELS for r in METHODS)
    for script in scripts:
        words = shlex.split(script.read_text().splitlines()[-1])
        model, method = words[2].split("/")
        assert script.name == f"{method}_{model}.sh" and words[3:] == ["$@"] and os.access(script, os.X_OK)


def test_unseen_languages_are_unseen_and_have_a_token_chosen():
    for model in ("large_v2_fleurs", "large_v2_common_voice"):
        for code, language in LANGUAGES[model].items():
            assert code not in OF_WHISPER and language.token in OF_WHISPER
    assert all(code in OF_WHISPER and not language.token for code, language in LANGUAGES["base"].items())


def test_the_plan_has_zero_shot_always_once_and_at_the_whole_window():
    names = [trial.name for trial in planned("--methods", "lora", "--languages", "it", "--seeds", "0", "1")]
    assert names == [
        "tiny_en_zero_shot_it_window30_seed0",
        "tiny_en_zero_shot_it_seed0",
        "tiny_en_lora_it_seed0",
        "tiny_en_lora_it_seed1",
    ]
    russian = planned("--methods", "lora", "--languages", "ru", "--seeds", "0")[-1]
    assert russian.changes == {"language": "ru", "max_new_tokens": "160"}  # Cyrillic takes many of tiny.en's tokens
    large = planned("--sizes", "large_v2_fleurs", "--methods", "recipe", "--seeds", "0")
    assert len(large) == 2 * len(asr_rows.FLEURS_UNSEEN)
    assert large[0].changes == {"language": "ast", "language_token": "es"} and large[0].folder == "ast_es"
    with pytest.raises(ValueError, match="unknown language 'xx'; known: it, ru"):
        planned("--languages", "xx")


def test_a_record_of_another_limit_of_tokens_is_not_the_rows():
    trial = planned("--methods", "lora", "--languages", "it", "--seeds", "0")[-1]
    kept = record(trial, 50.0)
    kept["decoding"] = {"beam": 1, "max_new_tokens": kept["settings"].pop("max_new_tokens")}
    assert trial.is_of(kept)
    kept["decoding"]["max_new_tokens"] = 40
    assert not trial.is_of(kept) and trial.differences(kept) == ["max_new_tokens"]


def test_a_row_for_each_set_of_layers():
    flags = ["--languages", "it", "--seeds", "0", "--methods", "lora", "full", "--targets"]
    trials = planned(*flags, "decoder", "encoder", "both", "cross")
    assert [(trial.name, trial.changes) for trial in trials[1:]] == [
        ("tiny_en_zero_shot_it_seed0", {"language": "it"}),
        ("tiny_en_lora_it_seed0", {"language": "it"}),  # the row as it is: its records are found
        ("tiny_en_lora_it_encoder_seed0", {"language": "it", "targets": "encoder"}),
        ("tiny_en_lora_it_both_seed0", {"language": "it", "targets": "both"}),
        ("tiny_en_lora_it_cross_seed0", {"language": "it", "targets": "cross"}),
        ("tiny_en_full_it_seed0", {"language": "it"}),
    ]
    found = [record(trial, 50.0 + number) for number, trial in enumerate(trials)]
    titles = [line.split(" | ")[2] for line in printed(trials, found).splitlines()[2:]]
    assert titles[2:6] == ["LoRA", "LoRA, encoder", "LoRA, both sides", "LoRA, cross-attention"]
    rows = list(csv.DictReader(io.StringIO(printed(trials, found, "--format", "csv"))))
    assert [r["targets"] for r in rows[2:]] == ["decoder", "encoder", "both", "cross", "both"]
    assert TABLE.estimate(trials[3], found) == (10.0, "from this row's records")
    assert TABLE.estimate(trials[3], found[:3]) == (None, "")
    flags = ["--sizes", "large_v2_fleurs", "--languages", "ast", "--seeds", "0", "--methods", "lora"]
    (large,) = planned(*flags, "--targets", "both")[1:]
    assert large.name == "large_v2_fleurs_lora_ast_seed0"


def test_the_table_is_of_means_intervals_and_what_was_cut():
    trials = planned("--methods", "recipe_small", "--languages", "it")
    values = [220.0, 140.0, 50.0, 52.0, 54.0]
    found = [record(trial, wer, cut=2) for trial, wer in zip(trials, values, strict=True)]
    lines = printed(trials, found).splitlines()
    assert lines[0].startswith("| model | language | method | # params |  | WER | 95% | CER |")
    assert lines[2].startswith("| tiny.en | it | zero-shot, 30 s | 0.016M | 1 seed | 220.0 | 215.0 to 225.0 |")
    assert lines[3].startswith("| tiny.en | it | zero-shot | 0.016M | 1 seed | 140.0 |")
    assert lines[4] == (
        "| tiny.en | it | VB-LoRA, recipe, a twentieth | 0.016M | 3 seeds | 52.0 ± 2.0 | 47.0 to 57.0 | 52.0 ± 2.0 "
        "| 52.0 ± 2.0 | 52.0 ± 2.0 | 6 of 183 |"
    )
    rows = list(csv.DictReader(io.StringIO(printed(trials, found, "--format", "csv"))))
    assert [(r["method"], r["window"], float(r["WER"])) for r in rows] == [
        ("zero_shot", "30", 220.0),
        ("zero_shot", "8", 140.0),
        ("recipe_small", "8", 52.0),
    ]
    assert r"52.0 $\pm$ 2.0" in printed(trials, found, "--format", "latex")
    assert printed(trials, []) is None
    other = record(trials[-1], 54.0, data="other")
    with pytest.raises(ValueError, match="made on different data"):
        printed(trials, [*found[:-1], other])
    found[-1]["test"]["data"] = "one"
    assert printed(trials, found)  # older records do not say what they were tested on
    found[-2]["test"]["data"] = "other"
    with pytest.raises(ValueError, match="made on different data"):
        printed(trials, found)


def test_curves_are_of_each_row_language_and_flags(tmp_path, capsys):
    def one(name, method, seed, losses, **flags):
        changes = {"language": "it", **flags}
        found = record(Trial(f"tiny_en/{method}", "it", changes, seed), 50.0)
        curve = [{"step": 50 * (at + 1), "loss": loss} for at, loss in enumerate(losses)]
        write_json(tmp_path / f"{name}.json", {**found, "curve": curve})

    one("a", "lora", 0, [3.0, 2.0])
    one("b", "lora", 1, [2.0, 1.0, 0.5], max_new_tokens="160")  # its language may need more: no line of its own
    one("c", "lora", 0, [4.0, 3.0], learning_rate="1e-3")
    one("d", "zero_shot", 0, [])
    one("e", "lora", 0, [2.0, 1.0], targets="both")
    found = [read_json(path) for path in sorted(tmp_path.glob("*.json"))]
    panels = speech_curves.grouped(found, None, "it")
    assert {title: {line: len(group) for line, group in lines.items()} for title, lines in panels.items()} == {
        "tiny.en, it": {"LoRA": 2, "LoRA, learning_rate 1e-3": 1},
        "tiny.en, it, other layers": {"LoRA, targets both": 1},
    }
    assert speech_curves.line_through(panels["tiny.en, it"]["LoRA"]) == [(50, 2.5), (100, 1.5)]
    speech_curves.main([str(tmp_path), str(tmp_path / "curves.svg"), "--model", "tiny_en"])
    assert "3 lines, 2 panels" in capsys.readouterr().out
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="hold no curve"):
        speech_curves.main([str(tmp_path), str(tmp_path / "curves.svg"), "--language", "ru"])
    with pytest.raises(ValueError, match=r"must end with \.png, \.svg or \.pdf"):
        speech_curves.main([str(tmp_path), str(tmp_path / "curves.txt")])


def test_what_others_print_is_a_note_and_no_row():
    trials = planned("--sizes", "large_v2_fleurs", "--methods", "vblora", "--seeds", "0", "--languages", "ast")
    text = printed(trials, [record(trial, 60.0) for trial in trials], "--sizes", "large_v2_fleurs")
    assert text.splitlines()[-1] == asr_secondary.NOTE and "0.5075" in text and len(text.splitlines()) == 6
    small = planned("--languages", "it", "--methods", "lora")
    assert "0.5075" not in printed(small, [record(trial, 60.0) for trial in small])


@pytest.mark.parametrize(("flag", "value"), [("rank", "2"), ("learning_rate", "1e-3"), ("spec_augment", "true")])
def test_settings_of_training_go_to_the_rows_that_train(flag, value, capsys):
    """zero_shot is always a row, refuses a method's settings, and says the same whatever the trainer's are."""
    options = campaign.parse(TABLE, ["asr", "--languages", "it", "--methods", "recipe_small", "--seeds", "0", "--plan"])
    extra = {flag: value, "window": "6", "use_cpu": "true"}
    jobs = [TABLE.job(trial, options, extra) for trial in TABLE.plan(options, extra)]
    assert [job.name for job in jobs] == [
        "tiny_en_zero_shot_it_window30_seed0",
        "tiny_en_zero_shot_it_window_6_seed0",
        f"tiny_en_recipe_small_it_{flag}_{value}_window_6_seed0",
    ]
    assert [f"--{flag}" in job.command for job in jobs] == [False, False, True]
    assert all("--use_cpu" in job.command for job in jobs)
    for job in jobs:
        TABLE.check_flags(job.command[2:])


def test_a_flag_that_is_given_goes_before_the_languages_own():
    options = campaign.parse(TABLE, ["asr", "--languages", "ru", "--methods", "lora", "--seeds", "0", "--plan"])
    extra = {"max_new_tokens": "50", "max_train_samples": "9"}
    trials = TABLE.plan(options, extra)
    assert all(trial.overrides == {"language": "ru", **trial.changes, **trial.extra} for trial in trials)
    assert [trial.overrides["max_new_tokens"] for trial in trials] == ["50"] * 3
    assert ["max_train_samples" in trial.overrides for trial in trials] == [False, False, True]
    for job in (TABLE.job(trial, options, extra) for trial in trials):
        assert job.command.count("--max_new_tokens") == 1 and "50" in job.command


def test_a_plan_without_data_is_shown_and_runs_need_it(capsys):
    reproduce_asr.main(["asr", "--sizes", "large_v2_common_voice", "--languages", "eo", "--seeds", "0", "--plan"])
    assert f"{len(METHODS)} runs, of which {len(METHODS)} are to be done" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--data_dir is needed"):
        reproduce_asr.main(["asr"])


def test_the_help_says_how_a_table_is_made(capsys):
    with pytest.raises(SystemExit):
        reproduce_asr.main(["asr", "--help"])
    assert "what has a record is not run again" in " ".join(capsys.readouterr().out.split())


def test_missing_tables_and_models_are_named_before_anything_is_run(tones, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"has no it/test\.tsv"):
        reproduce_asr.main(["asr", "--languages", "it", "--data_dir", str(tmp_path / "data")])
    (tmp_path / "data" / "it").symlink_to(tones)
    places = ["--data_dir", str(tmp_path / "data"), "--models_dir", str(tmp_path / "data")]
    with pytest.raises(ValueError, match=r"has no folder whisper-tiny\.en"):
        reproduce_asr.main(["asr", "--languages", "it", *places])
    with pytest.raises(ValueError, match="unrecognized arguments: --rnak 3"):  # a plan needs no folders
        reproduce_asr.main(["asr", "--languages", "it", "--plan", "--", "--rnak", "3"])
    with pytest.raises(ValueError, match='--language after "--" would undo the plan'):
        reproduce_asr.main(["asr", "--", "--language", "it"])


def test_a_table_of_one_run_from_plan_to_record(tones, whispers, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "data" / "it").symlink_to(tones)
    (tmp_path / "models" / "whisper-tiny.en").symlink_to(whispers["english"])

    def here(jobs, *_places_and_bar):  # the commands, without processes of their own
        for job in jobs:
            assert job.command[1] == str(FOLDER / "run_asr.py")
            run_asr.main(job.command[2:])
        return []

    monkeypatch.setattr(schedule, "run_all", here)
    command = ["asr", "--languages", "it", "--methods", "zero_shot", "--runs", str(tmp_path / "runs")]
    command += ["--data_dir", str(tmp_path / "data"), "--models_dir", str(tmp_path / "models")]
    more = {"window": 1, "use_cpu": "true", "cache_dir": tmp_path / "cache", "max_new_tokens": 3}
    monkeypatch.setattr(reproduce_asr, "WHOLE_WINDOW", 1)  # a tiny model hears no 30 seconds
    flags = [word for name, value in more.items() for word in (f"--{name}", str(value))]
    reproduce_asr.main([*command, "--collect", str(tmp_path / "kept"), "--", *flags])
    assert "| tiny.en | it | zero-shot | 0.000M | 1 seed |" in capsys.readouterr().out
    (file,) = (tmp_path / "kept").glob("*.json")
    kept = read_json(file)
    assert Trial("tiny_en/zero_shot", "it", {"language": "it"}, 0, {"window": "1", "max_new_tokens": "3"}).is_of(kept)
    assert not any(text in str(kept) for text in ("do re", str(tmp_path)))
    reproduce_asr.main([*command, "--", *flags])  # finished: not run again
    assert "1 runs, of which 0 are to be done" in capsys.readouterr().err
