"""Settings of the methods whose update is scaled as LoRA's is."""

from __future__ import annotations

from dataclasses import dataclass

from vblora.config import AdapterConfig


@dataclass(kw_only=True)
class ScaledConfig(AdapterConfig):
    """Settings of methods whose update is scaled as LoRA's is (see also `AdapterConfig`).

    Args:
        lora_alpha: the update is scaled by lora_alpha / r; r (no scaling) unless given.
        lora_dropout: dropout probability on the factors' input.
    """

    lora_alpha: float | None = None
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_probability("lora_dropout")
        if self.lora_alpha is not None:
            self.require_number("lora_alpha")
            if self.lora_alpha == 0:
                raise ValueError("lora_alpha 0 would switch the adapter off: leave it out for no scaling")

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def scaling(self) -> float:
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r
