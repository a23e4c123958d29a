"""A method of one's own, trained and exported as plain LoRA: python examples/own_method.py

docs/your_own_method.md explains each part.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import vblora
from vblora.config import AdapterConfig, TensorSpec


@dataclass(kw_only=True)
class DiagonalConfig(AdapterConfig):
    """dW = B diag(s) A, with A and B drawn from a seed that is a setting: only s, r numbers for a layer, is kept."""

    method: ClassVar[str] = "diagonal"
    factor_seed: int = 0

    def spec(self, shapes: Any, form: str) -> dict[str, TensorSpec]:
        return {"diagonals": TensorSpec((len(shapes), self.r))}

    def factors(self, shapes: Any, tensors: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.factor_seed)
        pairs = []
        for scale, shape in zip(tensors["diagonals"], shapes, strict=True):
            a = torch.randn(self.r, shape.in_features, generator=generator) / shape.in_features**0.5
            b = torch.randn(self.r, shape.out_features, generator=generator) / self.r**0.5
            pairs.append((scale[:, None] * a.to(scale), b.to(scale)))  # A (r, in), B transposed (r, out)
        return pairs


class Diagonal(vblora.Adapter, config=DiagonalConfig):
    """Starts at zero, and so at the base model."""

    def __init__(self, config: DiagonalConfig, targets: Any, seed: int | None) -> None:
        super().__init__(config, targets, seed)
        self.diagonals = nn.Parameter(torch.zeros(len(self.shapes), config.r))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    x, y = torch.randn(256, 16), torch.randn(256, 16)
    adapter = vblora.attach(model, DiagonalConfig(r=32, target_modules=["0", "2"]))
    optimizer = vblora.AdamW(vblora.param_groups(model, lr=1e-2))
    for step in range(201):
        loss = (model(x) - y).square().mean()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        print(f"packed: {adapter.pack(Path(folder) / 'diagonal.safetensors'):,} bytes")
        adapter.export_lora(Path(folder) / "lora")
        print("as plain LoRA:", *sorted(path.name for path in (Path(folder) / "lora").iterdir()))


if __name__ == "__main__":
    main()
