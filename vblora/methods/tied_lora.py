"""Tied-LoRA: one pair of factors per kind of layer, scaled by two vectors per layer (arXiv 2311.09578)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vblora.adapter import Adapter
from vblora.bank import Factors
from vblora.config import TensorSpec
from vblora.methods.scaled import ScaledConfig
from vblora.shapes import Count, LayerShape


@dataclass(kw_only=True)
class TiedLoRAConfig(ScaledConfig):
    """Settings of Tied-LoRA (arXiv 2311.09578; see also `ScaledConfig`).

    dW = lora_alpha / r * diag(v) B diag(u) A, with A (r, in) and B (out, r) of all layers of one kind, and u (r) and
    v (out) of each layer.
    """

    method: ClassVar[str] = "tied_lora"

    def spec(self, shapes: Sequence[LayerShape], form: str) -> dict[str, TensorSpec]:
        specs = {}
        for index, shape in enumerate(_kinds(shapes).values()):
            specs[f"factor_a_{index}"] = TensorSpec((self.r, shape.in_features))
            specs[f"factor_b_{index}"] = TensorSpec((self.r, shape.out_features))  # B transposed
        specs["scale_u"] = TensorSpec((len(shapes), self.r))
        specs["scale_v"] = TensorSpec((sum(shape.out_features for shape in shapes),))  # one after another
        return specs

    def factors(self, shapes: Sequence[LayerShape], tensors: Mapping[str, Tensor]) -> list[Factors]:
        kinds = list(_kinds(shapes))
        u = tensors["scale_u"] * self.scaling  # (L, r)
        v = tensors["scale_v"].split([shape.out_features for shape in shapes])
        pairs = []
        for layer, shape in enumerate(shapes):
            index = kinds.index(shape.kind)
            a = u[layer].unsqueeze(1) * tensors[f"factor_a_{index}"]  # (r, in)
            pairs.append((a, tensors[f"factor_b_{index}"] * v[layer]))  # B transposed, (r, out)
        return pairs

    def count(self, shapes: Sequence[LayerShape]) -> Count:
        from vblora.counts import count_tied_lora

        return count_tied_lora(shapes, r=self.r)


class TiedLoRA(Adapter, config=TiedLoRAConfig):
    """dW_l = alpha/r * diag(v_l) B diag(u_l) A, with A (r x in) and B (out x r) shared by all layers of a kind.

    A kind is a module's name without its layer number. A starts as LoRA's, B at zero, u and v at one; all four
    are trained.
    """

    groups: ClassVar[dict[str, str]] = {"scale_u": "scales", "scale_v": "scales"}

    config: TiedLoRAConfig

    def __init__(self, config: TiedLoRAConfig, targets: Mapping[str, nn.Module], seed: int | None) -> None:
        super().__init__(config, targets, seed)
        config.count(self.shapes)  # refuses layers of one kind with different shapes
        for name, tensor_spec in config.spec(self.shapes, "full").items():
            fill = torch.zeros if name.startswith("factor") else torch.ones
            self.register_parameter(name, nn.Parameter(fill(tensor_spec.shape)))
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for index in range(len(_kinds(self.shapes))):
                a = self.get_parameter(f"factor_a_{index}")
                nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def _kinds(shapes: Sequence[LayerShape]) -> dict[str, LayerShape]:
    """The kinds of layers, each with the first layer of its kind."""
    kinds: dict[str, LayerShape] = {}
    for shape in shapes:
        kinds.setdefault(shape.kind, shape)
    return kinds
