"""One global batch gives one gradient and one loss, however it is divided; and a run that diverges ends as such."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch
from core_helpers import build
from transformers import TrainerCallback, TrainingArguments

import vblora
from vblora.switch import apply_method
from vblora.trainer import AdapterTrainer, KeepBest
from vblora_experiments import runs
from vblora_experiments.causal import Encoded, EncodedRows, Padded
from vblora_experiments.secrets import is_secret, masked, without_secrets

SETTINGS = {"r": 2, "num_vectors": 12, "vector_length": 16, "target_modules": "all-linear"}
RATES = {"lr_vector_bank": 1e-2, "lr_logits": 1e-2}


class Gradients(TrainerCallback):
    """What each step's gradients are."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


class Rows(torch.utils.data.Dataset):
    """Ten rows for a classifier of three classes."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(5)
        self.rows = torch.randint(3, 50, (count, 7), generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


def causal_rows():
    generator = torch.Generator().manual_seed(5)
    rows = []
    for length in (4, 9, 5, 7, 12, 3, 8, 6, 10, 5):
        ids = torch.randint(3, 50, (length,), generator=generator).tolist()
        rows.append(Encoded(ids, [-100, *ids[1:]]))
    return EncodedRows(rows)


def trained(kind, method, out, size, accumulate=1, smoothing=0.0):
    """A trainer after one step over all ten rows, and that step's gradients. In float64, where 1e-9 is much."""
    model = build(kind).double()
    torch.manual_seed(1)
    if method == "lora":
        adapted, rates = apply_method(model, "lora", {"r": 2, "target_modules": "all-linear"}), {}
        adapted.model.double()
    else:
        adapted, rates = apply_method(model, "vblora", SETTINGS), RATES
        adapted.adapter.double()
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        label_smoothing_factor=smoothing,
        max_grad_norm=0.0,
    )
    rows = Rows(10) if kind == "bert" else causal_rows()
    watched = Gradients()
    more = {} if kind == "bert" else {"data_collator": Padded(0)}
    trainer = AdapterTrainer(
        adapted, rates, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[watched], **more
    )
    trainer.train()
    assert len(watched.steps[0]) >= 2
    return trainer, watched.steps[0]


def losses(trainer):
    return {"train": trainer.state.log_history[0]["loss"], "evaluation": trainer.evaluate()["eval_loss"]}


@pytest.mark.parametrize(
    ("kind", "method", "smoothing"),
    [("bert", "vblora", 0.0), ("bert", "lora", 0.0), ("bert", "vblora", 0.1), ("llama", "vblora", 0.0)],
)
def test_a_batch_in_parts_gives_the_gradient_and_the_loss_of_the_whole(kind, method, smoothing, tmp_path):
    whole, gradients = trained(kind, method, tmp_path, 10, smoothing=smoothing)
    for size, accumulate in ((5, 2), (4, 3)):  # the last of three parts has two rows
        parts, summed = trained(kind, method, tmp_path, size, accumulate, smoothing)
        torch.testing.assert_close(summed, gradients, rtol=1e-9, atol=1e-12)
        assert losses(parts)["train"] == pytest.approx(
            losses(whole)["train"], rel=1e-6
        )  # the trainer adds losses in float32


KINDS = ("bert", "llama")


def process(rank, port, out):
    """One of two processes: all kinds, in one pair of processes, whose start takes most of the time."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    for kind in KINDS:
        trainer, gradients = trained(kind, "vblora", out, 5)
        assert trainer.accelerator.num_processes == 2
        found = losses(trainer)
        if rank == 0:
            torch.save({"gradients": gradients, "losses": found}, out / f"{kind}.pt")
    torch.distributed.barrier()
    os._exit(0)  # not by way of the interpreter's end, in which gloo's threads have been seen to wait for ever


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_give_the_gradient_and_the_losses_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, tmp_path), nprocs=2)
    for kind in KINDS:
        one, gradients = trained(kind, "vblora", tmp_path, 10)
        two = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        torch.testing.assert_close(two["gradients"], gradients, rtol=1e-9, atol=1e-12)
        expected = losses(one)
        assert two["losses"]["train"] == pytest.approx(
            expected["train"], rel=1e-6
        )  # the trainer adds losses in float32
        if kind == "bert":  # a causal model's evaluation loss is a mean over batches, of unlike numbers of tokens
            assert two["losses"]["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6)


def test_a_run_that_diverges_ends_with_its_step_and_rates_and_leaves_what_was_saved(tmp_path):
    model = build("bert")
    adapter = vblora.attach(model, vblora.VBLoRAConfig(**SETTINGS))
    adapter.save(tmp_path / "best", form="full")
    before = (tmp_path / "best" / "adapter_model.safetensors").read_bytes()
    adapted = apply_method(build("bert"), "vblora", SETTINGS)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = AdapterTrainer(adapted, {"lr_vector_bank": 1e30, "lr_logits": 1e-2}, arguments, train_dataset=Rows(10))
    trainer.add_callback(KeepBest(adapted.adapter, "accuracy", tmp_path / "best"))
    with pytest.raises(ValueError, match=r"loss is .* at step 2: .*vector_bank .*Lower them"):
        trainer.train()
    assert (tmp_path / "best" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("form", ["topk", "full"])
def test_an_adapter_that_has_become_nan_does_not_replace_a_good_one(form, tmp_path):
    adapter = vblora.attach(build("bert"), vblora.VBLoRAConfig(**SETTINGS))
    adapter.save(tmp_path, form=form)
    with torch.no_grad():
        adapter.vector_bank[0, 0] = float("nan")
    with pytest.raises(ValueError, match="vector_bank holds NaN"):
        adapter.save(tmp_path, form=form)
    assert vblora.load(build("bert"), tmp_path).vector_bank.isfinite().all()


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub_token", "api_key", "OPENAI_API_KEY", "password", "token"])
def test_what_is_a_secret(name):
    assert is_secret(name)
    assert without_secrets({"a": {name: "x", "rank": 4}, name: "x"}) == {"a": {"rank": 4}}
    assert without_secrets({"a": [{name: "x"}, 2]}) == {"a": [{}, 2]}


@pytest.mark.parametrize("name", ["max_new_tokens", "pad_token_id", "average_tokens_across_devices", "rank"])
def test_what_is_none(name):
    assert not is_secret(name)


def test_a_secret_stands_in_no_plan_no_name_and_no_message(tmp_path):
    arguments = TrainingArguments(str(tmp_path), hub_token="hf_abcdefg", report_to="none", use_cpu=True)
    assert "hf_abcdefg" not in json.dumps(runs.training_settings(arguments))
    flags = ["--hub_token=hf_abcdefg", "--rank", "4"]
    assert runs.overrides(flags) == {"rank": "4"}
    assert masked("no flag --hub_token=hf_abcdefg", flags) == "no flag --hub_token=***"
    adapted = apply_method(build("bert"), "vblora", SETTINGS)
    AdapterTrainer(adapted, RATES, arguments).save_model(str(tmp_path / "kept"))
    files = [path for path in (tmp_path / "kept").iterdir() if path.is_file()]
    assert files and not any(b"hf_abcdefg" in path.read_bytes() for path in files)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("ken", "the token is taken: --api_key=ken, --api_key ken", "the token is taken: --api_key=***, --api_key ***"),
        ("data", "data_dir, database and 'data' at --api_key=data", "data_dir, database and '***' at --api_key=***"),
        ("sk-abcdef", "https://host/?k=sk-abcdefg", "https://host/?k=***g"),
        ("", "nothing --api_key=", "nothing --api_key="),
    ],
)
def test_short_secrets_leave_other_words_as_they_are(key, text, expected, monkeypatch):
    assert masked(text, [f"--api_key={key}"]) == expected == masked(text, ["--api_key", key])
    monkeypatch.setenv("A_JUDGES_API_KEY", key)
    monkeypatch.setenv("MAX_TOKENS", "12345678")
    if len(key) >= 4:
        assert key not in masked(f"Incorrect API key provided: {key}.", [])
    assert masked("the token is 12345678", []) == "the token is 12345678"


def small_trainer(tmp_path, rates=RATES, **more):
    settings = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, **more}
    adapted = apply_method(build("bert"), "vblora", SETTINGS)
    return AdapterTrainer(adapted, rates, TrainingArguments(str(tmp_path), **settings), train_dataset=Rows(10))


@pytest.mark.parametrize("clipped", [1.0, 0.0])
def test_an_infinite_gradient_ends_the_run_at_its_step(clipped, tmp_path):
    trainer = small_trainer(tmp_path, max_steps=5, max_grad_norm=clipped)
    bank, passes = trainer.adapter.vector_bank, []

    def spoil(gradient):
        passes.append(1)
        return gradient * float("inf") if len(passes) == 3 else gradient

    bank.register_hook(spoil)
    with pytest.raises(ValueError, match=r"gradient's norm is (inf|nan) at step 3: .*vector_bank .* Lower"):
        trainer.train()
    assert bank.isfinite().all() and trainer.state.global_step == 2


def test_the_log_has_the_rate_of_each_group(tmp_path):
    trainer = small_trainer(tmp_path, max_steps=4, logging_steps=1, learning_rate=1e-3, lr_scheduler_type="linear")
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    begun = {f"learning_rate_{group['name']}": group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert begun.keys() == {"learning_rate_vector_bank", "learning_rate_logits"} and len(logged) == 4
    shares = [{entry[name] / rate for name, rate in begun.items()} for entry in logged]
    assert all(len(share) == 1 for share in shares)  # the schedule's
    assert len(set.union(*shares)) == 4
