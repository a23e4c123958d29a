"""An adapter as plain LoRA, from a run or from an adapter's folder or packed file: `vblora export`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import vblora
from vblora.files import read_json
from vblora.methods import LoRAXSConfig
from vblora.storage import CONFIG_FILE, packing
from vblora.storage.lora_format import export
from vblora.training import causal
from vblora.training.tuned import Tuned


def write_exported(tuned: Tuned, output: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the adapter as a directory of plain LoRA. The base model's weights are read for LoRA-XS alone.

    Raises:
        ValueError: there is no adapter, it is one of PEFT's other methods, or it does not fit the model; or as in
            `vblora.storage.lora_format.export`.
    """
    adapter = tuned.adapter
    if adapter is None:
        raise ValueError(
            f"{tuned.base} is no run with an adapter: name a base model here, and the adapter with --adapter"
        )
    if adapter.is_dir() and read_json(adapter / CONFIG_FILE).get("peft_type") == "LORA":
        raise ValueError(f"{adapter} is PEFT's LORA already: use it as it is")
    content = packing.read_directory(adapter, tuned.base)
    if isinstance(content.config, LoRAXSConfig):
        model = causal.load_model(tuned.weights, tuned.dtype, tuned.bits)
        vblora.load(model, adapter).export_lora(output, dtype=dtype)
    else:
        task = None if content.heads else "CAUSAL_LM"
        export(replace(content, base_model=tuned.base), output, dtype=dtype, task_type=task)
    return output
