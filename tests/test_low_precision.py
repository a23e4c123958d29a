"""Adapters whose parameters were cast to 16 bits after `attach`, as TRL casts those of a model in 4 bits."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from core_helpers import adapt, build, make_batch, run
from torch import nn

import vblora
from vblora.adapter import restore
from vblora.bank import compose, compose_dense, select

HALF = [torch.bfloat16, torch.float16]
RATES = {"lr": 1e-2, "lr_vector_bank": 1e-2, "lr_logits": 1e-2}


def cast_trained(model, dtype):
    """As TRL's trainers do it: the same parameters, with other data."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bank_too", [True, False])
def test_what_is_given_in_16_bits_is_composed_in_float32(dtype, bank_too):
    torch.manual_seed(0)
    bank = torch.randn(12, 8).to(dtype if bank_too else torch.float32).requires_grad_()
    logits = torch.randn(30, 12).to(dtype)
    values, indices = select(logits, 3)
    values.requires_grad_()
    table = compose(bank, indices, values)
    torch.testing.assert_close(table, compose_dense(bank.float(), logits.float(), 3))
    weight = torch.randn(30, 8)
    found = torch.autograd.grad((table * weight).sum(), [bank, values])
    wide = [tensor.detach().float().requires_grad_() for tensor in (bank, values)]
    expected = torch.autograd.grad((compose(wide[0], indices, wide[1]) * weight).sum(), wide)
    for a, b, given in zip(found, expected, (bank, values), strict=True):
        assert torch.equal(a, b.to(given.dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_steps_smaller_than_16_bits_can_tell_add_up(dtype):
    adapter = adapt(build("stack"), num_vectors=90)
    cast_trained(adapter, dtype)
    optimizer = vblora.AdamW([{"params": [adapter.topk_logits], "lr": 1e-4}])
    before, selected = adapter.dense_logits(), adapter.topk_indices.clone()
    for _ in range(50):  # AdamW moves each by its rate
        adapter.topk_logits.grad = -torch.ones_like(adapter.topk_logits)
        optimizer.step()
    assert torch.equal(adapter.topk_indices, selected)
    expected = before.gather(1, selected) + 50 * 1e-4
    torch.testing.assert_close(adapter.dense_logits().gather(1, selected), expected, atol=2e-5, rtol=0)
    assert torch.equal(adapter.topk_logits, adapter.dense_logits().gather(1, selected).to(dtype))


def test_training_follows_the_one_in_float32_and_goes_on_from_its_states(tmp_path):
    dtype = torch.bfloat16  # in float16 PyTorch's AdamW divides by 0: its eps is none there

    def make():
        model = build("stack")
        adapter = adapt(model, num_vectors=90, init_logits_std=0.01)
        return model, adapter, vblora.AdamW(vblora.param_groups(model, **RATES))

    def train(model, optimizer, steps):
        for step in steps:
            x = make_batch("stack", seed=step)["x"]
            loss = (run(model, {"x": x}) - 0.1 * x.mean(-1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    wide, other, first = make(), make(), make()
    for model, _, _ in (other, first):
        cast_trained(model, dtype)
    start = other[1].topk_indices.clone()
    begun = [train(model, optimizer, range(20)) for model, _, optimizer in (wide, other, first)]
    again = make()
    cast_trained(again[0], dtype)
    again[0].load_state_dict(first[0].state_dict())
    again[2].load_state_dict(copy.deepcopy(first[2].state_dict()))
    ended = [train(model, optimizer, range(20, 40)) for model, _, optimizer in (wide, other, again)]
    assert all(torch.equal(t, again[0].state_dict()[name]) for name, t in other[0].state_dict().items())
    assert (other[1].topk_indices != start).any()
    assert begun[1] == pytest.approx(begun[0], rel=0.2) and ended[1] == pytest.approx(ended[0], rel=0.2)
    for form in ("topk", "full"):
        other[1].save(tmp_path / form, form=form)
        loaded = build("stack")
        vblora.load(loaded, tmp_path / form)
        gap = (run(loaded, make_batch("stack")) - run(other[0], make_batch("stack"))).abs().max()
        assert gap < (1e-5 if form == "topk" else 2e-2)  # the full form has the logits unrounded
    restored = make()
    cast_trained(restored[0], dtype)
    restore(restored[1], tmp_path / "full")
    assert torch.equal(restored[1].dense_logits(), other[1].dense_logits())


# --- A base in 4 bits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_4_bits(tmp_path_factory):
    """Makes a tiny Llama whose layers are in 4 bits."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("llama")
    build("llama", hidden=64).save_pretrained(folder)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )

    def make():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
        # In training from the beginning: bitsandbytes lays weights out anew on a CPU in evaluation.
        adapter = adapt(model.train(), kind="llama", num_vectors=90, init_logits_std=0.01)
        return model, adapter, vblora.AdamW(vblora.param_groups(model, **RATES))

    return make


ROWS = [{"input_ids": make_batch("llama", 1, 12, seed)["input_ids"][0].tolist()} for seed in range(4)] * 4
SETTINGS = {"per_device_train_batch_size": 4, "num_train_epochs": 6, "report_to": [], "logging_steps": 1}


def assert_learned(trainer, adapter, before, model, tmp_path):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert (adapter.topk_indices != before).any()
    adapter.save(tmp_path / "adapter")
    with torch.no_grad():
        trained = run(model.eval(), make_batch("llama"))
        adapter.detach()
        vblora.load(model, tmp_path / "adapter", strict_base=True)  # whose weights are laid out otherwise by now
        torch.testing.assert_close(run(model, make_batch("llama")), trained)


def test_transformers_own_trainer_trains_on_a_base_in_4_bits(in_4_bits, tmp_path):
    model, adapter, optimizer = in_4_bits()
    rows = [{**row, "labels": row["input_ids"]} for row in ROWS]
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, save_strategy="epoch", **SETTINGS)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    assert_learned(trainer, adapter, adapter.topk_indices.clone(), model, tmp_path)


def test_trls_sft_trainer_trains_on_a_base_in_4_bits(in_4_bits, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    model, adapter, optimizer = in_4_bits()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w1"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    arguments = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, save_strategy="epoch", max_length=32, **SETTINGS)
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    assert adapter.vector_bank.dtype == torch.bfloat16 and adapter.logits.values.dtype == torch.float32
    assert_learned(trainer, adapter, adapter.topk_indices.clone(), model, tmp_path)


class Quantised(transformers.LlamaForCausalLM):
    """A model that says of itself that it is quantised, and whose weights are as ever."""

    is_quantized = True


def test_a_quantised_model_is_said_to_have_an_adapter_as_long_as_it_has_one(tmp_path):
    model = Quantised(build("llama").config)
    mark = "_hf_peft_config_loaded"
    first = adapt(model, kind="llama")
    second = adapt(model, kind="llama", name="another")
    assert getattr(model, mark)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())  # not as PEFT's adapters
    assert getattr(model, mark)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    first.detach()
    assert getattr(model, mark)
    second.detach()
    assert not getattr(model, mark) and mark not in vars(model)
