"""A whole model with the adapter in its weights, as a folder that transformers and every engine reads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from vblora.training import causal
from vblora.training.tuned import Tuned, with_adapter


def write_merged(tuned: Tuned, output: Path, original_weights: bool = False) -> Path:
    """Write base and adapter as one model, with its tokenizer, in sharded safetensors.

    An adapter that was trained on quantised weights is added to what those stand for (they are dequantised first), so
    that the model is the one that was trained; with `original_weights` it is added to the weights as published.

    Raises:
        ValueError: there is no adapter, or the output exists.
    """
    adapter = tuned.adapter
    if adapter is None:
        raise ValueError(f"{tuned.base}: there is no adapter to merge")
    if output.exists():
        raise ValueError(f"{output} exists: remove it, or name another folder")
    if original_weights:
        tuned = replace(tuned, bits=16)
    model = causal.load_model(tuned.weights, tuned.dtype, tuned.bits)
    if tuned.bits != 16:
        model = model.dequantize()
    model = with_adapter(model, adapter, merge=True)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(partial)
        causal.load_tokenizer(tuned.base).save_pretrained(partial)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output
