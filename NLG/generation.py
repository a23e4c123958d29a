"""Texts from a causal language model: beam search with the settings of LoRA's E2E command."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor


@dataclass
class Decoding:
    """How texts are decoded; the defaults are those of LoRA's E2E command."""

    beam: int = field(default=10, metadata={"help": "beams; 1 takes the likeliest token each time"})
    length_penalty: float = field(default=0.8, metadata={"help": "beams are compared by log p / length ** this"})
    no_repeat_ngram: int = field(default=4, metadata={"help": "no n-gram of this size twice; 0 switches it off"})
    max_new_tokens: int = field(default=64, metadata={"help": "tokens of a text at most"})

    def __post_init__(self) -> None:
        for name, least in (("beam", 1), ("max_new_tokens", 1), ("no_repeat_ngram", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, encoded: list[list[int]], decoding: Decoding) -> list[str]:
    """One text for each encoded prompt, in one batch; each ends at the end token or at an empty line.

    `model` is in evaluation mode; the tokenizer pads on the left.
    """
    batch = tokenizer.pad({"input_ids": encoded}, return_tensors="pt").to(model.device)
    width = batch["input_ids"].shape[1]
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        past_key_values=_read_once(model, batch, decoding.beam),
        num_beams=decoding.beam,
        do_sample=False,
        length_penalty=decoding.length_penalty if decoding.beam > 1 else None,
        early_stopping="never" if decoding.beam > 1 else False,  # no text may still come that scores higher
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=_ends(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList(
            [NoRepeatAfter(decoding.no_repeat_ngram, width)] if decoding.no_repeat_ngram else []
        ),
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _read_once(model: Any, batch: Any, beams: int) -> DynamicCache | None:
    """The keys and values of the prompts, once for each beam; None where generate has to read them itself.

    Left to itself generate copies each prompt for every beam and reads all the copies.
    """
    mask = batch["attention_mask"][:, :-1]  # generate reads the last token
    if beams == 1 or not mask.shape[1]:
        return None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = model(
        input_ids=batch["input_ids"][:, :-1], attention_mask=mask, position_ids=positions, use_cache=True
    ).past_key_values
    if type(cache) is not DynamicCache:
        return None
    cache.batch_repeat_interleave(beams)
    return cache


class NoRepeatAfter(LogitsProcessor):
    """No n-gram twice among the generated tokens; transformers' own processor counts those of the prompt too.

    Names stand in the prompt and must be said once: with it, one of four tokens could not be.
    """

    def __init__(self, size: int, prompt_width: int) -> None:
        self.inner = NoRepeatNGramLogitsProcessor(size)
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = input_ids[:, self.prompt_width :]
        return self.inner(generated, scores) if generated.shape[1] else scores


def _ends(tokenizer: Any) -> list[int]:
    """The end token, and the one of an empty line where there is one (LoRA's command ends at both)."""
    empty_line = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    return sorted({tokenizer.eos_token_id, *(empty_line if len(empty_line) == 1 else [])})
