"""What a run is told: flags over a file over a row over defaults, each with its source; wrong files are refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from transformers import TrainingArguments

from vblora_experiments import command_line, runs
from vblora_experiments.arguments import MethodArguments
from vblora_experiments.command_line import Script, Settings, StartArguments


@dataclass
class Task:
    model_name_or_path: str = field(metadata={"help": "a model"})
    engine: Literal["fast", "slow"] = field(default="slow", metadata={"help": "an engine"})
    most: int | None = field(default=None, metadata={"help": "rows"})
    folder: Path | None = field(default=None, metadata={"help": "a folder"})
    fused: bool = field(default=True, metadata={"help": "a switch that is on"})


ROW = {"model_name_or_path": "hub/model", "num_train_epochs": 5, "warmup_steps": 0.06, "method": "vblora", "topk": 2}


def row(name: str) -> dict[str, object]:
    if name != "m/vblora":
        raise ValueError(f"no row {name}")
    return ROW


def place(known: argparse.Namespace) -> Path:
    return Path("runs") / f"{known.method}_{known.seed}"


SCRIPT = Script("try.py", (Task, MethodArguments, TrainingArguments), {"save_strategy": "epoch"}, row, place)


def read(*arguments: str) -> Settings:
    return SCRIPT.read([*arguments, "--use_cpu", "true"])


def table(settings: Settings) -> dict[str, list[str]]:
    return {name: rest for name, *rest in (line.split(maxsplit=2) for line in settings.describe().splitlines()[1:])}


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_flags_go_before_the_file_before_the_row_before_defaults(suffix, tmp_path):
    file = tmp_path / f"run{suffix}"
    values = {"row": "m/vblora", "topk": 3, "learning_rate": 0.01, "rank": 8, "bf16": True, "fused": False, "seed": 5}
    file.write_text(json.dumps(values))  # which is YAML too
    settings = read("--config", str(file), "--rank=16", "--num-train-epochs", "2")
    task, method, training = settings.of(Task), settings.of(MethodArguments), settings.of(TrainingArguments)
    assert (method.rank, method.topk, training.learning_rate, training.bf16, task.fused) == (16, 3, 0.01, True, False)
    assert (training.num_train_epochs, training.warmup_steps, training.save_strategy) == (2.0, 0.06, "epoch")
    assert settings.output_dir == Path("runs/vblora_5") and settings.of(StartArguments).row == "m/vblora"
    shown = table(settings)
    assert shown["rank"] == ["16", "flag"] and shown["topk"] == ["3", f"config {file}"]
    assert shown["warmup_steps"] == ["0.06", "row m/vblora"] and shown["save_strategy"] == [
        "epoch",
        "default of try.py",
    ]
    assert shown["engine"] == ["slow", "default"] and shown["init_logits_std"] == ["0.1", "default of vblora"]
    assert shown["learning_rate_logits"] == ["0.01", "default, the paper's"]
    more = {"topk": "3", "learning_rate": "0.01", "bf16": "true", "fused": "false"}
    assert settings.overrides == {**more, "rank": "16", "num_train_epochs": "2"}


def test_the_recipe_goes_before_the_numbers_of_a_row_that_has_others(monkeypatch):
    """They would leave a recipe of nothing: its divided start with the paper's bound, bank and rates."""
    for name, value in {"rank": 4, "num_vectors": 90, "init_logits_std": 0.01, "learning_rate_logits": 0.01}.items():
        monkeypatch.setitem(ROW, name, value)
    row = ("--row", "m/vblora")
    paper = read(*row).of(MethodArguments)
    assert (paper.rank, paper.topk, paper.num_vectors, paper.learning_rate_logits) == (4, 2, 90, 0.01)
    settings = read(*row, "--recipe", "--recipe_bytes", "50000", "--topk", "3")
    chosen = settings.of(MethodArguments)
    assert chosen == MethodArguments(recipe=True, recipe_bytes=50000, topk=3)
    assert chosen.settings([], None)["recipe"] == {"max_bytes": 50000}
    assert settings.of(TrainingArguments).num_train_epochs == 5 and table(settings)["topk"] == ["3", "flag"]
    monkeypatch.setitem(ROW, "recipe", True)  # its own: the row's numbers are part of it
    assert read(*row).of(MethodArguments).rank == read(*row, "--recipe").of(MethodArguments).rank == 4


def test_the_recipe_brings_its_warm_up_where_nothing_else_chose_one():
    model = ("--model_name_or_path", "m", "--recipe", "true")
    assert table(read(*model))["warmup_steps"] == ["0.06", "recipe"]
    assert read(*model, "--warmup_steps", "3").of(TrainingArguments).warmup_steps == 3
    assert read(*model[:2]).of(TrainingArguments).warmup_steps == 0


def test_the_same_by_a_file_and_by_flags_is_the_same_run(tmp_path):
    file = tmp_path / "run.yml"
    file.write_text(
        "model_name_or_path: m\nlearning_rate: 1e-3\nmethod_settings:\n  rank_pattern: {a: 3}\nmethod: lora\n"
    )
    flags = ["--model_name_or_path", "m", "--learning_rate", "1e-3", "--method", "lora"]
    one, other = read("--config", str(file)), read(*flags, "--method_settings", '{"rank_pattern": {"a": 3}}')
    plans = [
        runs.make_plan(*(s.of(k) for k in (Task, MethodArguments, TrainingArguments)), "data") for s in (one, other)
    ]
    assert plans[0] == plans[1]


def test_what_a_caller_tells_is_what_flags_tell(tmp_path):
    values = {"row": "m/vblora", "topk": 3, "bf16": True, "folder": tmp_path, "learning_rate": 0.5, "rank": None}
    flags = ["--row", "m/vblora", "--topk", "3", "--bf16", "true", "--folder", str(tmp_path), "--learning_rate", "0.5"]
    one, other = SCRIPT.of({**values, "use_cpu": True}), read(*flags)
    assert one.parts == other.parts and one.overrides == other.overrides
    shown = table(one)
    assert shown["topk"] == ["3", "caller"] and shown["warmup_steps"] == ["0.06", "row m/vblora"]
    for wrong, message in (
        ({"topkk": 3}, "caller: try.py has no flag --topkk"),
        ({"topk": 2.5}, "caller: topk is a whole number, not 2.5"),
        ({"row": "none/such"}, "no row none/such"),
        ({"rank": 4}, "required: --model_name_or_path"),
    ):
        with pytest.raises(ValueError, match=message):
            SCRIPT.of(wrong)


@pytest.mark.parametrize("there", [False, True])
def test_bf16_is_autocast_on_the_processor_where_there_is_nothing_else(there, monkeypatch):
    monkeypatch.setattr(command_line, "_has_accelerator", lambda: there)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # which looks at the real machine
    settings = SCRIPT.read(["--row", "m/vblora", "--bf16", "true"])
    assert settings.of(TrainingArguments).use_cpu is not there and settings.overrides == {"bf16": "true"}
    told = SCRIPT.read(["--row", "m/vblora", "--bf16", "true", "--use_cpu", "false"])
    assert told.of(TrainingArguments).use_cpu is False


def test_the_columns_stand_under_each_other_and_no_secret_is_shown(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"hub_token": "hf_abcdefg"}')
    settings = read("--row", "m/vblora", "--config", str(tmp_path / "run.json"), "--plan")
    assert settings.show()  # all there is to do
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len({line.index(" row m/vblora") for line in lines if line.endswith(" row m/vblora")}) == 1
    assert any(line.split()[:2] == ["hub_token", "***"] for line in lines) and "hf_abc" not in str(lines)
    assert "hub_token" not in settings.overrides
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; near it: learning_rate"),
        ("nothing_like_it_zz: 1", "unknown key 'nothing_like_it_zz'$"),
        ("config: other.yaml", "unknown key 'config'"),
        ("topk: fast", "topk is a whole number, not 'fast'"),
        ("topk: 2.5", "topk is a whole number, not 2.5"),
        ("topk: true", "topk is a whole number, not True"),
        ("seed: null", "seed is a whole number, not None"),
        ("bf16: 1", "bf16 is true or false, not 1"),
        ("learning_rate: [1]", "learning_rate is a number, not"),
        ("model_name_or_path: 3", "model_name_or_path is a text, not 3"),
        ("engine: quick", "engine is one of fast, slow, not 'quick'"),
        ("hub_token: [abcdefg]", r"hub_token is a text, not \*\*\*"),
        ("row: none/such", "no row none/such"),
        ("topk: 1\ntopk: 2", "the key 'topk' is there twice"),
        ("1: 2", "the key 1 is no text"),
        ("- topk", "holds no map"),
        ("", "holds no map"),
        ("topk: [", "no YAML"),
        ("a: !!python/object/apply:os.system [ls]", "no YAML"),
        ("topk: \x00", "no YAML"),
        ("[" * 100000, "nested too deeply|no YAML"),
    ],
)
def test_a_wrong_file_is_one_error_that_names_it(content, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read("--model_name_or_path", "m", "--config", str(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{", "run.json: "),
        ("run.json", b'{"topk": 1, "topk": 2}', "'topk' is there twice"),
        ("run.json", b"[" * 100000, "nested too deeply"),
        ("run.yaml", b"\xff\xfe\xff", "run.yaml: .*utf-8"),
        ("run.toml", b"", r"must end with .yaml, .yml, .json"),
        ("missing.yaml", None, "missing.yaml cannot be read: No such file"),
    ],
)
def test_what_is_no_file_of_settings_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read("--model_name_or_path", "m", "--config", str(tmp_path / name))


def test_no_two_scripts_of_the_task_folders_have_one_name():
    root = Path(__file__).resolve().parents[1]
    folders = ("NLU", "NLG", "instruction_tuning", "math_instruction_tuning", "ASR")
    names = [path.name for folder in folders for path in (root / folder).glob("*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
