"""LoRA-XS: an r x r matrix between the frozen singular factors of each base weight (arXiv 2405.17604)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vblora.adapter import Adapter
from vblora.config import TensorSpec
from vblora.methods.scaled import ScaledConfig
from vblora.shapes import LayerShape


@dataclass(kw_only=True)
class LoRAXSConfig(ScaledConfig):
    """Settings of LoRA-XS (arXiv 2405.17604; see also `ScaledConfig`).

    dW = lora_alpha / r * U S R V^T, with U (out, r), S and V (in, r) the r largest singular triples of the base weight,
    which are frozen, and R (r, r) trained.

    Args:
        init_std: the r x r matrices start normal with this standard deviation (the paper's 1e-5).
    """

    method: ClassVar[str] = "lora_xs"

    init_std: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("init_std")

    def spec(self, shapes: Sequence[LayerShape], form: str) -> dict[str, TensorSpec]:
        return {"mixing": TensorSpec((len(shapes), self.r, self.r))}


class LoRAXS(Adapter, config=LoRAXSConfig):
    """dW = alpha/r * (U S) R V^T, with U S V^T the r largest singular triples of the base weight.

    Only R (r x r) is trained and stored; U S and V^T are computed from the base weight when the adapter is
    attached, so a file fits the very base model it was trained on.
    """

    config: LoRAXSConfig

    def __init__(self, config: LoRAXSConfig, targets: Mapping[str, nn.Module], seed: int | None) -> None:
        from vblora.base_weights import full_weight

        super().__init__(config, targets, seed)
        for shape in self.shapes:
            if config.r > min(shape.in_features, shape.out_features):
                raise ValueError(
                    f"rank {config.r} is more than {shape.name} has singular values "
                    f"({shape.in_features} -> {shape.out_features})"
                )
        self.mixing = nn.Parameter(torch.zeros(len(self.shapes), config.r, config.r))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                self.mixing.normal_(generator=generator).mul_(config.init_std)
        pairs = [truncated_svd(full_weight(m)[self.outputs[name]], config.r) for name, m in self.targets.items()]
        # Not part of the state_dict: they follow from the base weights. Flat, one layer after another.
        self.register_buffer("svd_out", torch.cat([us.flatten().cpu() for us, _ in pairs]), persistent=False)
        self.register_buffer("svd_in", torch.cat([vt.flatten().cpu() for _, vt in pairs]), persistent=False)

    def compose(self) -> tuple[Tensor, ...]:
        r = self.config.r
        outs = self.get_buffer("svd_out").split([r * shape.out_features for shape in self.shapes])
        ins = self.get_buffer("svd_in").split([r * shape.in_features for shape in self.shapes])
        composed: list[Tensor] = []
        for mixing, us, vt in zip(self.mixing * self.config.scaling, outs, ins, strict=True):
            composed.append(mixing @ vt.view(r, -1))  # (r, in)
            composed.append(us.view(r, -1))  # (r, out)
        return tuple(composed)


@torch.no_grad()
def truncated_svd(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """(U S)^T (r, out) and V^T (r, in) of the r largest singular triples of W (out, in), in float32.

    By the eigenvectors of the smaller Gram matrix in float64: exact and the same at every call, which a
    randomised decomposition is not. Signs are fixed so that the largest entry of each row of V^T is positive.
    """
    w = weight.double()
    wide = w.shape[0] <= w.shape[1]
    gram = w @ w.T if wide else w.T @ w
    values, vectors = torch.linalg.eigh(gram)  # ascending
    top = vectors[:, -r:].flip(1)  # U (out, r) or V (in, r)
    sizes = values[-r:].flip(0).clamp(min=torch.finfo(torch.float64).tiny).sqrt()  # singular values
    us, vt = (top * sizes, (top.T @ w) / sizes[:, None]) if wide else (w @ top, top.T)
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))  # (r, 1)
    sign = torch.where(largest < 0, -1.0, 1.0)
    return (us.T * sign).float(), (vt * sign).float()
