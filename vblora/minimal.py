"""VB-LoRA as the paper writes it (arXiv 2405.15179, Section 3): for reading. Try it: python -m vblora.minimal"""

import torch
from torch import Tensor, nn


class MinimalVBLoRA(nn.Module):
    """y = W x + B A x. A (r, in) and B (out, r) are cut into sub-vectors mixed from a bank (h, b) of all layers."""

    def __init__(self, base: nn.Linear, bank: nn.Parameter, r: int = 4, topk: int = 2, std: float = 0.1) -> None:
        super().__init__()
        h, b = bank.shape
        self.base, self.bank, self.topk = base.requires_grad_(False), bank, topk
        self.logits_a = nn.Parameter(std * torch.randn(r, base.in_features // b, h))  # h logits for each sub-vector
        self.logits_b = nn.Parameter(std * torch.randn(r, base.out_features // b, h))

    def compose(self, logits: Tensor) -> Tensor:
        largest, chosen = logits.topk(self.topk)  # (r, n, k)
        return (largest.softmax(-1).unsqueeze(-1) * self.bank[chosen]).sum(-2).flatten(1)  # (r, n b)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.compose(self.logits_a).T @ self.compose(self.logits_b)


def train(steps: int = 300) -> None:
    """Fit a frozen network to a changed one, through the bank and the logits alone."""
    torch.manual_seed(0)
    bank, x = nn.Parameter(torch.empty(32, 16).uniform_(-0.02, 0.02)), torch.randn(256, 64)
    model = nn.Sequential(*(MinimalVBLoRA(nn.Linear(64, 64), bank) for _ in range(4)))
    y = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).requires_grad_(False)(x)
    logits = [p for p in model.parameters() if p.ndim == 3]
    before = [p.topk(2).indices for p in logits]
    optimizer = torch.optim.AdamW([{"params": [bank], "lr": 5e-3}, {"params": logits, "lr": 1e-2}], weight_decay=0)
    for step in range(steps + 1):
        loss = (model(x) - y).square().mean()
        if step % 100 == 0:
            changed = sum((p.topk(2).indices != old).any(-1).sum() for p, old in zip(logits, before, strict=True))
            print(f"step {step:3}: loss {loss:.4f}, {changed} of 128 sub-vectors take other vectors than at first")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    train()
