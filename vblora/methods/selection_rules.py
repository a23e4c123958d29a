"""VB-LoRA with another selection than top-k, for the ablation of Table 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vblora.adapter import Adapter
from vblora.bank import Factors, Layout, compose, select, topk_tensors
from vblora.config import AdapterConfig, TensorSpec, VBLoRAConfig
from vblora.forward import in_backward
from vblora.logits import draw as draw_values
from vblora.selection import RULES, draw, gumbel_softmax, noisy_topk
from vblora.shapes import LayerShape


@dataclass(kw_only=True)
class SelectionConfig(VBLoRAConfig):
    """Settings of VB-LoRA with another selection rule (see `vblora.selection` for the equations).

    Args:
        rule: "noisy_topk", "gumbel" or "gumbel_st".
        tau: temperature of the Gumbel rules.
        topk: k, the vectors selected: in training by noisy top-k, at inference by every rule.
    """

    method: ClassVar[str] = "vblora_selection"
    kept_as_itself: ClassVar[bool] = False

    rule: str = "noisy_topk"
    tau: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in RULES:
            raise ValueError(f"rule is one of {', '.join(RULES)}, not {self.rule!r}")
        self.require_number("tau")
        if self.tau == 0:
            raise ValueError("tau must be above 0")

    @property
    def temperature(self) -> float:
        """What the logits are divided by."""
        return 1.0 if self.rule == "noisy_topk" else self.tau

    def spec(self, shapes: Sequence[LayerShape], form: str) -> dict[str, TensorSpec]:
        specs = super().spec(shapes, "full")
        return {**specs, "noise_scale": specs["logits"]} if self.rule == "noisy_topk" else specs

    def kept(self, form: str) -> AdapterConfig:
        """At inference it is plain VB-LoRA, and kept as that."""
        if form == "full":
            return self
        return VBLoRAConfig(**{field.name: getattr(self, field.name) for field in fields(VBLoRAConfig)})


class SelectionVBLoRA(Adapter, config=SelectionConfig):
    """A bank and dense logits, mixed by one of the rules. Any AdamW trains it: every logit has a gradient.

    The kept (top-k) form of its files is plain VB-LoRA's, because at inference that is what it is.
    """

    groups: ClassVar[dict[str, str]] = {"vector_bank": "vector_bank", "logits": "logits", "noise_scale": "logits"}

    config: SelectionConfig
    vector_bank: nn.Parameter
    logits: nn.Parameter
    noise_scale: nn.Parameter

    def __init__(self, config: SelectionConfig, targets: Mapping[str, nn.Module], seed: int | None) -> None:
        super().__init__(config, targets, seed)
        self.layout = Layout(self.shapes, config.r, config.vector_length)
        for name, spec in config.spec(self.shapes, "full").items():
            self.register_parameter(name, nn.Parameter(torch.zeros(spec.shape)))
        self._noise: Tensor | None = None  # of the running forward pass
        self._selected: Tensor | None = None  # indices (N, k) of the last training step, where the rule selects any
        if seed is not None:
            with torch.no_grad():
                bank, logits = draw_values(config, self.layout.parts, seed)
                self.vector_bank.copy_(bank)
                self.logits.copy_(torch.cat(list(logits)))

    def compose(self) -> tuple[Tensor, ...]:
        c = self.config
        if not (self.training and torch.is_grad_enabled()):
            values, indices = select(self.logits, c.topk)
            return (compose(self.vector_bank, indices, values / c.temperature),)
        # Reentrant checkpointing composes again within the backward pass: with the noise of the forward pass.
        if self._noise is None or not in_backward():
            self._noise = draw(self.logits, c.rule)
        if c.rule == "noisy_topk":
            table, self._selected = noisy_topk(self.vector_bank, self.logits, self.noise_scale, self._noise, c.topk)
            return (table,)
        return (gumbel_softmax(self.vector_bank, self.logits, self._noise, c.tau, hard=c.rule == "gumbel_st"),)

    def factors(self, composed: tuple[Tensor, ...]) -> list[Factors]:
        return self.layout.factors(composed[0])

    def state_key(self) -> tuple[Any, ...]:
        return (self.training, *super().state_key())

    @torch.no_grad()
    def selection(self) -> tuple[Tensor, Tensor]:
        """The vectors that inference uses and their weights, as `VBLoRA.selection`."""
        values, indices = select(self.logits, self.config.topk)
        return indices, (values / self.config.temperature).softmax(dim=-1)

    def step_selection(self) -> Tensor:
        """What the last training step selected; for the rules that mix all vectors, what inference would."""
        return self.selection()[0] if self._selected is None else self._selected

    @torch.no_grad()
    def tensors(self, form: str) -> dict[str, Tensor]:
        if form == "full":
            return {name: parameter.detach() for name, parameter in self.named_parameters()}
        values, indices = select(self.logits, self.config.topk)
        return topk_tensors(self.vector_bank.detach(), indices, values / self.config.temperature)

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(tensors[name])
