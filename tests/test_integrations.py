"""Other people's trainers with an adapter: what a checkpoint holds, how a run goes on, and what is refused."""

from __future__ import annotations

import math
import re
import types
from pathlib import Path

import pytest
import torch
import transformers
from core_helpers import adapt, build, make_batch, run
from language_helpers import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import vblora
from vblora.integrations import AdapterTraining, BaseReference, reference_of, selection_statistics

RATES = {"lr_vector_bank": 1e-2, "lr_logits": 1e-1}
COMMON = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": []}
COMMON |= {"use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "steps"}
TEXTS = [f"the {a} counts {b}" for a in ("cat", "dog") for b in ("one two three", "two three four")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


def attached(model):
    settings = {"num_vectors": 24, "vector_length": 8, "init_logits_std": 0.01}
    config = vblora.VBLoRAConfig(r=2, target_modules="all-linear", exclude_modules=["lm_head"], **settings)
    return vblora.attach(model, config, seed=1)


def trl_or_skip():
    return pytest.importorskip("trl", reason="TRL is not installed: pip install trl")


def plain(base, out, **more):
    class Trainer(AdapterTraining, transformers.Trainer): ...

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"][:8] for text in TEXTS)]
    attached(model)
    arguments = transformers.TrainingArguments(str(out), **{**COMMON, **more})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, rates=RATES)


def seq2seq(base, out):
    class Trainer(AdapterTraining, transformers.Seq2SeqTrainer): ...

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    attached(model)
    rows = [{"input_ids": [n, 5, 6], "labels": [n, 7]} for n in range(3, 11)]
    return Trainer(model, transformers.Seq2SeqTrainingArguments(str(out), **COMMON), train_dataset=rows, rates=RATES)


def sft(base, out):
    trl = trl_or_skip()
    from datasets import Dataset

    class Trainer(AdapterTraining, trl.SFTTrainer): ...

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    attached(model)
    arguments = trl.SFTConfig(str(out), max_length=32, bf16=False, **COMMON)
    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    return Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer, rates=RATES)


def dpo(base, out):
    trl = trl_or_skip()
    from datasets import Dataset

    class Trainer(AdapterTraining, trl.DPOTrainer): ...

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    reference = reference_of(model)
    attached(model)
    assert all(p.data_ptr() == dict(model.named_parameters())[n].data_ptr() for n, p in reference.named_parameters())
    arguments = trl.DPOConfig(str(out), max_length=32, bf16=False, **COMMON)
    rows = [{"prompt": text[:8], "chosen": text[8:], "rejected": text[8:][::-1]} for text in TEXTS]
    settings = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "rates": RATES}
    return Trainer(model, reference, arguments, **settings)


def grpo(base, out, beta=0.0):
    trl = trl_or_skip()
    from datasets import Dataset

    class Trainer(AdapterTraining, BaseReference, trl.GRPOTrainer): ...

    def letters(completions, **_):  # a reward that differs between completions
        return [float(sum(map(str.isalpha, text))) + len(set(text)) / 10 for text in completions]

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(base)
    attached(model)
    settings = {"num_generations": 2, "max_completion_length": 6, "bf16": False, "beta": beta, **COMMON}
    arguments = trl.GRPOConfig(str(out), **settings)
    rows = Dataset.from_list([{"prompt": text[:8]} for text in TEXTS])
    settings = {"train_dataset": rows, "processing_class": tokenizer, "rates": RATES}
    return Trainer(model, letters, arguments, **settings)


KINDS = {"Trainer": plain, "Seq2SeqTrainer": seq2seq, "SFTTrainer": sft, "DPOTrainer": dpo, "GRPOTrainer": grpo}


def equal(one, other):
    ours, theirs = one.tensors("full"), other.tensors("full")
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_the_other(kind, base, tmp_path):
    whole = KINDS[kind](base, tmp_path)
    before = {name: tensor.clone() for name, tensor in whole.adapter.tensors("full").items()}
    whole.train()
    assert not torch.equal(whole.adapter.tensors("full")["logits"], before["logits"])
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert all(
        entry["learning_rate_vector_bank"] / entry["learning_rate_logits"] == pytest.approx(0.1) for entry in logs
    )
    assert all(0 < entry["bank_in_use"] <= 1 and 0 <= entry["selection_entropy"] <= 1 for entry in logs)
    assert logs[-1]["selection_changed"] == pytest.approx(logs[-1]["selection_changes_per_step"])  # of one step
    if kind == "DPOTrainer":
        assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # the adapter starts near the reference
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and not list(checkpoint.glob("model*"))
    again = KINDS[kind](base, tmp_path)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.global_step == 4 and equal(again.adapter, whole.adapter)


def test_the_best_checkpoint_is_loaded_at_the_end(base, tmp_path):
    """Here the highest loss is called the best, so that it is not the last."""
    more = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    trainer = plain(base, tmp_path, metric_for_best_model="eval_loss", **more)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = plain(base, tmp_path / "other")
    vblora.adapter.restore(best.adapter, tmp_path / "checkpoint-2")
    assert equal(trainer.adapter, best.adapter)


def test_what_cannot_train_is_refused(base, tmp_path):
    class Trainer(AdapterTraining, transformers.Trainer): ...

    model = AutoModelForCausalLM.from_pretrained(base)
    arguments = transformers.TrainingArguments(str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match="the model has 0 adapters, and this trainer takes one"):
        Trainer(model, arguments, rates=RATES)
    attached(model)
    with pytest.raises(ValueError, match="lr_vector_bank is missing"):
        Trainer(model, arguments)
    with pytest.raises(ValueError, match="--optim adafactor does not know VB-LoRA's logits"):
        Trainer(model, transformers.TrainingArguments(str(tmp_path), optim="adafactor", **COMMON), rates=RATES)
    with pytest.raises(ValueError, match="make the reference before"):
        reference_of(model)


def test_the_reference_stays_the_base_model():
    model = build("llama")
    batch = make_batch("llama")
    before = run(model, batch)
    reference = reference_of(model)
    adapter = adapt(model, kind="llama", init_vector_bank_bound=0.5)
    assert not torch.equal(run(model, batch), before) and torch.equal(run(reference, batch), before)
    assert adapter in list(model.modules()) and adapter not in list(reference.modules())


def test_grpo_compares_with_the_base_model_and_loads_no_other(base, tmp_path, monkeypatch):
    trl = trl_or_skip()

    def another(*_, **__):
        raise AssertionError("a second model is loaded")

    monkeypatch.setattr(trl.trainer.grpo_trainer, "create_model_from_path", another)
    trainer = grpo(base, tmp_path, beta=0.1)
    ids = torch.arange(3, 15).view(2, 6)
    found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, torch.ones_like(ids), 4)
    own, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 4)
    logits = AutoModelForCausalLM.from_pretrained(base)(ids).logits[:, 1:-1].log_softmax(-1)
    expected = logits.gather(-1, ids[:, 2:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (own - expected).abs().max() > 1e-5 and trainer.adapter.enabled
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert len(logs) == 4 and all(entry["kl"] > 0 for entry in logs) and trainer.args.beta == 0.1


def test_what_the_log_says_of_a_selection():
    model = build("stack")
    adapter = adapt(model, num_vectors=10, topk=2, vector_length=8)
    with torch.no_grad():
        adapter.topk_indices.copy_(torch.tensor([0, 1]).expand_as(adapter.topk_indices))
        adapter.topk_logits.zero_()
    before = adapter.topk_indices.clone()
    before[0] = torch.tensor([1, 0])  # the same two
    before[1] = torch.tensor([1, 2])
    found = selection_statistics(adapter, before)
    assert found["bank_in_use"] == 0.2 and found["selection_entropy"] == pytest.approx(1)
    assert found["selection_changed"] == pytest.approx(1 / len(before))


def test_the_changes_of_a_step_are_counted_since_the_last_entry():
    """Of 4 sub-vectors 2 change in the first step, 1 of them back in the second: 3 changes in 2 steps, 1 in effect."""
    states = [[[0, 1]] * 4, [[0, 2], [2, 1], [1, 0], [0, 1]], [[1, 0], [2, 1], [0, 1], [0, 1]]]

    def state(number):
        selection = torch.tensor(states[number])
        adapter.step_selection = lambda: selection
        adapter.selection = lambda: (selection, torch.full((4, 2), 0.5))

    adapter = types.SimpleNamespace(config=types.SimpleNamespace(num_vectors=8))
    changes = vblora.integrations.SelectionChanges(adapter)
    for step in (0, 1):
        state(step)
        changes.look(step)
        changes.look(step)  # of the second part of a batch
    state(2)
    found = changes.statistics(2)
    assert found["selection_changes_per_step"] == 3 / 4 / 2 and found["selection_changed"] == 1 / 4
    assert found["bank_in_use"] == 3 / 8
    assert changes.statistics(3)["selection_changes_per_step"] == 0


# --- Trackers -----------------------------------------------------------------------------------------------------

SHOWN = ["learning_rate_vector_bank", "bank_in_use", "selection_entropy", "selection_changes_per_step"]
TOKEN = "hf_" + "s3cr3t" * 6


def tracked(name, base, out, monkeypatch):
    """The log of a run that reported to one of transformers' trackers; no file of it holds the token."""
    monkeypatch.chdir(out)
    trainer = plain(base, out / "run", report_to=[name], run_name="tracked", hub_token=TOKEN)
    trainer.train()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    entries = [entry for entry in trainer.state.log_history if SHOWN[-1] in entry]
    assert len(entries) == 4
    return entries


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_has_what_the_log_has(base, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    entries = tracked("tensorboard", base, tmp_path, monkeypatch)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    for name in SHOWN:
        seen = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert [seen[entry["step"]] for entry in entries] == pytest.approx([entry[name] for entry in entries])


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_has_what_the_log_has(base, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="W&B is not installed: pip install wandb")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    entries = tracked("wandb", base, tmp_path, monkeypatch)
    last = {name: wandb.run.summary[f"train/{name}"] for name in SHOWN}
    wandb.finish()
    assert last == pytest.approx({name: entries[-1][name] for name in SHOWN})
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert all(f"train/{name}".encode() in file.read_bytes() for name in SHOWN)


def test_a_token_that_wandb_would_keep_is_refused(tmp_path, monkeypatch):
    """It writes the command line into its file, with the token, also offline."""
    from vblora_experiments import publishing

    arguments = transformers.TrainingArguments(str(tmp_path), report_to=["wandb"], hub_token=TOKEN, use_cpu=True)
    publishing.check(arguments)  # the token came another way
    monkeypatch.setattr("sys.argv", ["run_glue.py", f"--hub_token={TOKEN}"])
    with pytest.raises(ValueError, match="W&B keeps the command line") as refused:
        publishing.check(arguments)
    assert TOKEN not in str(refused.value)


@pytest.mark.filterwarnings("ignore")
def test_trackio_has_what_the_log_has(base, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    entries = tracked("trackio", base, tmp_path, monkeypatch)
    seen = sqlite_storage.SQLiteStorage.get_logs("huggingface", "tracked")
    for name in SHOWN:
        values = [row[f"train/{name}"] for row in seen if f"train/{name}" in row]
        assert values == pytest.approx([entry[name] for entry in entries])


# --- Lightning ----------------------------------------------------------------------------------------------------


def fitted(out, epochs, resume=None):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build("bert")
            self.adapter = adapt(self.model, kind="bert", modules_to_save=["classifier"], init_logits_std=0.01)

        def training_step(self, batch, number):
            return self.model(**batch).logits.square().mean()

        def configure_optimizers(self):
            return vblora.AdamW(vblora.param_groups(self.model, lr=1e-2, **RATES))

    module = Module()
    rows = [make_batch("bert", seed=seed) for seed in range(3)]
    kept = ModelCheckpoint(out, filename="{epoch}", save_top_k=-1)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [kept, vblora.integrations.lightning_callback()]
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=callbacks, log_every_n_steps=1, **settings)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None), ckpt_path=resume)
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightnings_checkpoints_hold_what_is_trained(tmp_path):
    whole = fitted(tmp_path, 2)
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    base = {name for name in build("bert").state_dict() if not name.startswith("classifier")}
    assert not {name.removeprefix("model.") for name in state} & base and "model.classifier.weight" in state
    again = fitted(tmp_path / "again", 2, str(tmp_path / "epoch=0.ckpt"))
    assert equal(again.adapter, whole.adapter)
    assert torch.equal(again.model.classifier.weight, whole.model.classifier.weight)


# --- The page -----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[1] / "docs" / "integrations.md"
BLOCKS = dict(re.findall(r"<!-- run: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_runs(base, tmp_path, monkeypatch, capsys):
    trl = trl_or_skip()
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    assert set(BLOCKS) == {"trainer", "sft", "dpo", "grpo", "lightning", "accelerate"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text)["input_ids"][:8] for text in TEXTS)]
    pairs = [{"prompt": text[:8], "chosen": text[8:], "rejected": text[8:][::-1]} for text in TEXTS]
    names = {"tokenizer": tokenizer, "rows": rows, "texts": Dataset.from_list([{"text": text} for text in TEXTS])}
    names |= {"pairs": Dataset.from_list(pairs), "vblora": vblora, "trl": trl}
    names |= {"batches": [{name: torch.tensor([ids]) for name, ids in row.items()} for row in rows]}
    names |= {"settings": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1}}
    names |= {"prompts": Dataset.from_list([{"prompt": text[:8]} for text in TEXTS])}
    names |= {"reward": lambda completions, **_: [float(len(set(text))) for text in completions]}
    of_trl = {"max_length": 32, "bf16": False, **COMMON}
    of_grpo = {"num_generations": 2, "max_completion_length": 4, "bf16": False, **COMMON}
    arguments = {
        "trainer": lambda: transformers.TrainingArguments(str(tmp_path / "trainer"), **COMMON),
        "sft": lambda: trl.SFTConfig(str(tmp_path / "sft"), **of_trl),
        "dpo": lambda: trl.DPOConfig(str(tmp_path / "dpo"), **of_trl),
        "grpo": lambda: trl.GRPOConfig(str(tmp_path / "grpo"), beta=0.1, **of_grpo),
    }
    for name, code in BLOCKS.items():
        if name == "lightning":
            pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
        names["model"] = AutoModelForCausalLM.from_pretrained(base)
        if name in arguments:
            names["arguments"] = arguments[name]()
        if name in ("sft", "grpo", "accelerate"):
            names["adapter"] = vblora.attach(names["model"], names["chosen"].config)
        exec(code, names)
        if name in ("sft", "dpo", "grpo"):
            names["trainer"].train()
    model = AutoModelForCausalLM.from_pretrained(base)
    assert torch.isfinite(vblora.load(model, tmp_path / "adapter").vector_bank).all()
    assert (tmp_path / "trainer" / "checkpoint-4" / "adapter_model.safetensors").exists()
