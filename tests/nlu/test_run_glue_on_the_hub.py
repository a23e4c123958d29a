"""The GLUE script and the hub: what --push_to_hub uploads, and a run whose model and data come by their names."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, serving
from transformers import BertForSequenceClassification, RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast

import run_glue
import vblora
from vblora.io import read_json, read_tensors

NLU = Path(run_glue.__file__).parent
SIZES = ["--num_vectors", "10", "--vector_length", "16", "--topk", "2"]
NAME = "someone/cola"


@pytest.fixture
def run(encoder, data, tmp_path):
    """A run of one epoch with these flags."""

    def started(*more):
        places = ["--model_name_or_path", str(encoder), "--data_dir", str(data), "--output_dir", str(tmp_path / "run")]
        small = ["--task", "cola", "--num_train_epochs", "1", "--disable_tqdm", "true", "--use_cpu", "true"]
        return run_glue.main([*places, *small, *more])

    return started


def uploads(hub):
    return [asked for asked in hub.requests if asked.startswith("POST") and "/commit/" in asked]


@pytest.mark.parametrize("method", ["vblora", "lora", "lora_xs"])
def test_the_adapter_that_counts_is_pushed_once_with_its_card_and_record(hub, run, encoder, tmp_path, method):
    push = ["--push_to_hub", "--hub_model_id", "cola", "--hub_token", TOKEN, "--hub_private_repo", "true"]
    record = run("--method", method, *(SIZES if method == "vblora" else ["--rank", "2"]), *push)
    assert len(uploads(hub)) == 1 and list(hub.repositories) == [("models", NAME)]
    files = hub.files(NAME)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "record.json"]
    assert sorted(files) == [".gitattributes", *names] and hub.repositories["models", NAME].private
    assert json.loads(files["record.json"]) == record == read_json(tmp_path / "run" / "record.json")
    sent = b"".join(hub.bodies) + b"".join(files.values())
    assert TOKEN.encode() not in sent and str(tmp_path).encode() not in sent and str(encoder).encode() not in sent
    (tmp_path / "theirs").mkdir()
    for name, content in files.items():
        (tmp_path / "theirs" / name).write_bytes(content)
    theirs, _ = read_tensors(tmp_path / "theirs" / "adapter_model.safetensors")
    best, _ = read_tensors(tmp_path / "run" / "best" / "adapter_model.safetensors")
    assert theirs.keys() == best.keys() and all((theirs[key] == best[key]).all() for key in best)
    if method != "lora":
        vblora.load(BertForSequenceClassification.from_pretrained(encoder), NAME)


def test_a_run_that_is_finished_is_pushed_by_the_same_command(hub, run, tmp_path, capsys, monkeypatch):
    record = run(*SIZES)
    assert not hub.requests
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match="the hub asks for a token, and there is none"):
        run(*SIZES, "--push_to_hub")
    push = ["--push_to_hub", "--hub_token", TOKEN]
    assert run(*SIZES, *push, "--hub_revision", "second") == record  # and it is the same run
    assert "is on the hub: " in capsys.readouterr().out
    assert "adapter_config.json" in hub.files("someone/run", "second")
    with pytest.raises(ValueError, match=r"is finished and not on the hub; the same command tries again\. other/cola"):
        run(*SIZES, *push, "--hub_model_id", "other/cola")


def test_what_cannot_be_pushed_is_refused_before_the_training(hub, run, tmp_path):
    for flags, match in (
        (["--hub_strategy", "checkpoint"], "--hub_strategy does nothing"),
        (["--hub_model_id", "a/b/c"], "'a/b/c' is no name of a repository"),
        (["--hub_token", "hf_wrong"], "the token: the hub answered"),
    ):
        with pytest.raises(ValueError, match=match):
            run(*SIZES, "--push_to_hub", *flags)
    assert not (tmp_path / "run").exists() and not hub.repositories


# --- With nothing local -----------------------------------------------------------------------------------------------

GLUE_CARD = """---
configs:
- config_name: cola
  data_files:
  - split: test
    path: cola/test-*
  - split: train
    path: cola/train-*
  - split: validation
    path: cola/validation-*
---
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny_roberta(folder):
    """What FacebookAI/roberta-base has, with a vocabulary of bytes and random weights."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    tokenizer = RobertaTokenizerFast(vocab={word: number for number, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=130,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return files_of(folder)


def glue_files():
    """nyu-mll/glue's layout, with a few sentences of CoLA's kind."""
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the hub's GLUE is Parquet files, which need pyarrow")
    import pyarrow

    files = {"README.md": GLUE_CARD.encode()}
    for split, rows in (("train", 16), ("validation", 8), ("test", 4)):
        columns = {
            "sentence": [f"The {['cat', 'dog'][n % 2]} sleep{'s' * (n % 4 < 2)}." for n in range(rows)],
            "label": [-1 if split == "test" else int(n % 4 < 2) for n in range(rows)],
            "idx": list(range(rows)),
        }
        made = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), made)
        files[f"cola/{split}-00000-of-00001.parquet"] = made.getvalue()
    return files


def test_the_script_of_table_1_runs_with_nothing_local(tmp_path):
    """./scripts_vblora_all/roberta_base_cola.sh: model and data by their names on the hub, and the adapter back."""
    with serving() as hub:
        hub.add("FacebookAI/roberta-base", tiny_roberta(tmp_path / "roberta"))
        hub.moved["roberta-base"] = "FacebookAI/roberta-base"  # the name in the paper's scripts
        hub.add("nyu-mll/glue", glue_files(), kind="datasets")
        places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        small = ["--num_train_epochs", "2", "--use_cpu", "true", "--disable_tqdm", "true"]
        done = subprocess.run(
            ["./scripts_vblora_all/roberta_base_cola.sh", *small, "--output_dir", tmp_path / "run", "--push_to_hub"],
            capture_output=True,
            text=True,
            cwd=NLU,
            env={
                **os.environ,
                **places,
                "HF_HUB_OFFLINE": "0",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        record = read_json(tmp_path / "run" / "record.json")
        assert record["model"] == "roberta-base" and record["row"] == "roberta_base/cola/vblora_all"
        assert record["data"]["train_rows"] == 16 and record["data"]["validation_rows"] == 8
        config = json.loads(hub.files("someone/run")["adapter_config.json"])
        assert config["base_model_name_or_path"] == "roberta-base" and config["task_type"] == "SEQ_CLS"
        assert (config["num_vectors"], config["vector_length"], config["r"]) == (90, 256, 4)
