"""The fast path against the method as it stands on one page, `vblora.minimal`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core_helpers import Stack
from torch import nn

import vblora
from vblora.files import peft_format
from vblora.minimal import MinimalVBLoRA

PAGE = Path(__file__).resolve().parents[1] / "vblora" / "minimal.py"
LAYERS = [f"layers.{i}.{part}" for i in range(2) for part in ("up", "down")]
SETTINGS = {"r": 3, "num_vectors": 40, "vector_length": 8, "init_vector_bank_bound": 0.3, "init_logits_std": 0.05}


def both(topk, seed=0):
    """One network twice: with an adapter of the fast path, and with the page's layers holding the same numbers."""
    torch.manual_seed(seed)
    fast, plain = Stack().double(), Stack().double()
    plain.load_state_dict(fast.state_dict())
    config = vblora.VBLoRAConfig(target_modules=["up", "down"], topk=topk, **SETTINGS)
    adapter = vblora.attach(fast, config, seed=seed)
    adapter.double()
    plain.requires_grad_(False)
    bank = nn.Parameter(adapter.vector_bank.detach().clone())
    for name in LAYERS:
        parent, _, last = name.rpartition(".")
        layer = MinimalVBLoRA(plain.get_submodule(name), bank, r=config.r, topk=topk).double()
        layer.bank = bank
        setattr(plain.get_submodule(parent), last, layer)
    numbers = in_page_layout(adapter, adapter.dense_logits())
    with torch.no_grad():
        for name in LAYERS:
            layer = plain.get_submodule(name)
            layer.logits_a.copy_(numbers[name][0])
            layer.logits_b.copy_(numbers[name][1])
    return fast, adapter, plain, bank


def in_page_layout(adapter, logits):
    """Logits (N, h) of the fast path as those of A, (r, in / b, h), and of B, (r, out / b, h), of each layer."""
    native = {"vector_bank": adapter.vector_bank.detach(), "logits": logits}
    tensors = peft_format.to_peft(native, adapter.config, adapter.shapes)
    prefix = "base_model.model."
    return {
        name: (tensors[f"{prefix}{name}.vblora_logits_A"], tensors[f"{prefix}{name}.vblora_logits_B"].transpose(0, 1))
        for name in LAYERS
    }


def page_logits(plain, gradient=False):
    pairs = {name: (plain.get_submodule(name).logits_a, plain.get_submodule(name).logits_b) for name in LAYERS}
    return {name: tuple(p.grad if gradient else p.detach() for p in pair) for name, pair in pairs.items()}


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(12, 16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("topk", [1, 2, 3])
def test_values_and_gradients_are_the_same(topk):
    fast, adapter, plain, bank = both(topk)
    x, y = batches()
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-12, atol=1e-12)
    with adapter.disabled():
        assert (fast(x) - plain(x)).abs().max() > 1e-3  # the adapter has an effect to compare
    loss_of(fast, x, y).backward()
    loss_of(plain, x, y).backward()
    torch.testing.assert_close(adapter.vector_bank.grad, bank.grad, rtol=1e-10, atol=1e-14)
    dense = torch.zeros_like(adapter.dense_logits()).scatter(1, adapter.topk_indices, adapter.topk_logits.grad)
    ours, theirs = in_page_layout(adapter, dense), page_logits(plain, gradient=True)
    for name in LAYERS:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-14)
    assert bank.grad.abs().max() > 0
    assert (topk == 1) == (max(g.abs().max() for pair in theirs.values() for g in pair) == 0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_300_steps_in_which_selections_change_are_the_same(weight_decay):
    fast, adapter, plain, bank = both(topk=2)
    x, y = batches()
    first = adapter.topk_indices.clone()
    fast_groups = vblora.param_groups(fast, lr=1e-3, lr_vector_bank=5e-3, lr_logits=2e-2)
    for group in fast_groups:
        group["weight_decay"] = weight_decay
    logits = [p for name in LAYERS for p in plain.get_submodule(name).parameters() if p.ndim == 3]
    ours = vblora.AdamW(fast_groups)
    theirs = torch.optim.AdamW(
        [{"params": [bank], "lr": 5e-3}, {"params": logits, "lr": 2e-2}], weight_decay=weight_decay
    )
    for _ in range(300):
        for model, optimizer in ((fast, ours), (plain, theirs)):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
    changed = (adapter.topk_indices.sort(dim=1).values != first.sort(dim=1).values).any(dim=1)
    assert changed.float().mean() > 0.2
    torch.testing.assert_close(adapter.vector_bank.detach(), bank.detach(), rtol=0, atol=1e-8)
    fast_logits, plain_logits = in_page_layout(adapter, adapter.dense_logits()), page_logits(plain)
    for name in LAYERS:
        torch.testing.assert_close(fast_logits[name], plain_logits[name], rtol=0, atol=1e-8)
    torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=1e-8)


def test_the_page_is_one_page_and_runs_by_itself():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("\n") <= 45
    done = subprocess.run([sys.executable, str(PAGE)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in done.stdout.splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    assert " 0 of 128" not in done.stdout.splitlines()[-1]
