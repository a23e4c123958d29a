"""PEFT's VBLoRA files: its names and tensor layouts, and ours, one from the other.

PEFT keeps the logits of A as (r, in/b, h) and those of B as (out/b, r, h), per layer. Ours are rows of one
(N, h) table, layer by layer, A's as (r, in/b) and then B's as (r, out/b): so B is transposed on the way. The
same holds for the indices and weights of the top-k form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vblora.bank import Layout
from vblora.config import AdapterConfig, VBLoRAConfig
from vblora.io import describe_dtype
from vblora.shapes import LayerShape

PREFIX = "base_model.model."
BANK = "base_model.vblora_vector_bank"
# Keys of PEFT's adapter_config.json that say nothing about the mathematics.
IGNORED_KEYS = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",  # follows from the layer's type
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "save_only_topk_weights",
    "task_type",
)
# The parts of a table of sub-vectors, and the endings PEFT gives them.
START_KEYS = "init_vectors_of_a", "init_by_kind"  # settings of ours that PEFT does not have
ENDINGS = {"logits": "", "topk_indices": "_topk_indices", "topk_weights": "_topk_weights"}


def misfits(config: VBLoRAConfig, shapes: Sequence[LayerShape]) -> list[str]:
    """The layers with a width that b does not divide, as PEFT needs."""
    b = config.vector_length
    return [shape.name for shape in shapes if shape.in_features % b or shape.out_features % b]


def obstacle(config: VBLoRAConfig, shapes: Sequence[LayerShape]) -> str | None:
    """Why PEFT's format cannot hold this adapter, if it cannot."""
    b = config.vector_length
    if config.split_modules:
        return f"PEFT does not split layers (split_modules {', '.join(config.split_modules)})"
    if config.target_parameters:
        return f"PEFT's VB-LoRA adapts no experts (target_parameters {', '.join(config.target_parameters)})"
    for shape in shapes:
        for features in (shape.in_features, shape.out_features):
            if features % b:
                return f"vector_length {b} does not divide the width {features} of {shape.name}, as PEFT needs"
    return None


def to_peft(native: Mapping[str, Tensor], config: VBLoRAConfig, shapes: Sequence[LayerShape]) -> dict[str, Tensor]:
    """Our tensors under PEFT's names and in its layout."""
    tensors = {BANK: native["vector_bank"]}
    for part, ending in ENDINGS.items():
        if part not in native:
            continue
        for key, r_first, rows in _pieces(config, shapes):
            piece = native[part][rows].unflatten(0, (config.r, -1))  # (r, tiles, width)
            piece = piece if r_first else piece.transpose(0, 1)
            tensors[key + ending] = piece.contiguous()
    return tensors


def from_peft(tensors: dict[str, Tensor], config: VBLoRAConfig, shapes: Sequence[LayerShape]) -> dict[str, Tensor]:
    """PEFT's tensors as ours. What it takes is removed from `tensors`, so that the rest can be looked at.

    Raises:
        ValueError: a tensor is missing or has a shape that does not fit the layer.
    """
    part_names = ["logits"] if any(k.endswith("vblora_logits_A") for k in tensors) else ["topk_indices", "topk_weights"]
    widths = {"logits": config.num_vectors, "topk_indices": config.topk, "topk_weights": config.topk - 1}
    native = {"vector_bank": _take(tensors, BANK, (config.num_vectors, config.vector_length), whole=False)}
    for part in part_names:
        pieces = []
        for key, r_first, rows in _pieces(config, shapes):
            tiles = (rows.stop - rows.start) // config.r
            shape = (config.r, tiles, widths[part]) if r_first else (tiles, config.r, widths[part])
            piece = _take(tensors, key + ENDINGS[part], shape, whole=part == "topk_indices")
            pieces.append((piece if r_first else piece.transpose(0, 1)).flatten(0, 1))
        native[part] = torch.cat(pieces)
    return native


def to_peft_config(
    config: VBLoRAConfig,
    shapes: Sequence[LayerShape],
    form: str,
    fan_in_fan_out: bool,
    base_name: str | None,
    task_type: str | None = None,
) -> dict[str, Any]:
    """The adapter_config.json that PEFT reads."""
    settings = config.to_dict()
    del settings["split_modules"]  # None, and nothing that PEFT knows
    for key in START_KEYS:
        settings.pop(key, None)  # of the start alone: it stands in the tensors' metadata, which PEFT passes over
    if config.target_modules == "all-linear":  # PEFT would take a classification head for one of them
        settings["target_modules"] = [shape.name for shape in shapes]
    return {
        **settings,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "peft_type": "VBLORA",
        "revision": None,
        "save_only_topk_weights": form == "topk",
        "task_type": task_type,
    }


def from_peft_config(values: dict[str, Any]) -> VBLoRAConfig:
    """Our settings from PEFT's adapter_config.json.

    Raises:
        ValueError: a setting that we do not know and that is not off.
    """
    values = {key: value for key, value in values.items() if key not in IGNORED_KEYS}
    bias = values.pop("bias", "none")
    if bias != "none":
        raise ValueError(f"bias={bias!r} is not supported: only adapters trained with bias='none' can be loaded")
    known = VBLoRAConfig.__dataclass_fields__
    values = {key: value for key, value in values.items() if key in known or value not in (None, False, [], {})}
    config = VBLoRAConfig.from_dict(values)
    assert isinstance(config, VBLoRAConfig)
    return config


def start_metadata(config: AdapterConfig) -> dict[str, str]:
    """What PEFT's settings have no place for, as metadata of the tensors' file."""
    if not isinstance(config, VBLoRAConfig):
        return {}
    return {key: str(int(value)) for key in START_KEYS if (value := getattr(config, key))}


def with_start(config: VBLoRAConfig, metadata: Mapping[str, str]) -> VBLoRAConfig:
    """The settings with what `start_metadata` has put into the tensors' file.

    Raises:
        ValueError: it is no number that these settings can have.
    """
    found: dict[str, Any] = {key: metadata[key] for key in START_KEYS if key in metadata}
    for key, text in found.items():
        if not re.fullmatch(r"[01]" if key == "init_by_kind" else r"\d{1,9}", text):
            raise ValueError(f"{key} in the metadata must be a whole number, not {text!r}")
        found[key] = text == "1" if key == "init_by_kind" else int(text)
    return replace(config, **found)


def _pieces(config: VBLoRAConfig, shapes: Sequence[LayerShape]) -> Iterator[tuple[str, bool, slice]]:
    """For each factor: PEFT's name of its logits, whether r is its first dimension, its rows of our table."""
    layout = Layout(shapes, config.r, config.vector_length)
    start = 0
    for index, size in enumerate(layout.sizes):
        letter = "AB"[index % 2]
        yield (
            f"{PREFIX}{shapes[index // 2].name}.vblora_logits_{letter}",
            letter == "A",
            slice(start, start + size),
        )
        start += size


def _take(tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], *, whole: bool) -> Tensor:
    if key not in tensors:
        raise ValueError(f"the file has no tensor {key!r}, which this model and configuration need")
    tensor = tensors.pop(key)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{key!r} has shape {tuple(tensor.shape)}; this model and configuration need {shape}")
    if tensor.is_floating_point() == whole or tensor.dtype == torch.bool:
        kind = "whole" if whole else "floating point"
        raise ValueError(f"{key!r} holds {describe_dtype(tensor)}, not {kind} numbers")
    return tensor
