"""Saving and loading adapters.

A directory holds adapter_config.json and adapter_model.safetensors. VB-LoRA is written as PEFT's VBLoRA
wherever that format can hold it; everything else in a format of our own of the same two files:

    adapter_config.json         {"vblora_method": "tied_lora", ...the settings}
    adapter_model.safetensors   the method's tensors by their names, and "head.<parameter>" for heads

Two forms: "topk" (indices and weights of the selection: what one keeps) and "full" (all logits: what one needs
to go on training exactly). The other methods have one form. A packed file (vblora.files.packed) holds the top-k form
in one small file, and is read wherever a directory is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vblora.bank import smallest_index_dtype
from vblora.config import AdapterConfig, VBLoRAConfig
from vblora.files import peft_format
from vblora.files.content import Content, FileContent, check_floats, check_heads, check_tensors, form_of
from vblora.io import read_json, read_metadata, read_tensors, write_json, write_tensors
from vblora.shapes import LayerShape
from vblora.targets import head_tensors

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
METHOD_KEY = "vblora_method"
CHECKSUM = "vblora_sha256"  # in the metadata of the tensor file, which other readers ignore
HEAD_PREFIX = "head."
FORMATS = ("auto", "peft", "native")


def write_directory(content: Content, directory: str | Path, format: str = "auto") -> None:
    """Write an adapter into a directory; what was there is replaced, each file in one step.

    Raises:
        ValueError: no such format, one that cannot hold this adapter, or a tensor holds NaN or infinite numbers, which
            no reader would take. What was there stays.
    """
    if format not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, not {format!r}")
    for name, tensor in {**content.tensors, **content.heads}.items():
        if tensor.is_floating_point():
            check_floats(name, tensor)
    files = to_files(
        content.config, content.shapes, content.tensors, content.heads, content.conv1d, content.base_model, format
    )
    write_files(directory, *files, content.config, content.init_seed)


def to_files(
    config: AdapterConfig,
    shapes: Sequence[LayerShape],
    native: dict[str, Tensor],
    heads: dict[str, Tensor],
    conv1d: bool,
    base_name: str | None,
    format: str,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the two files of a directory hold: the settings, and the tensors by their names there."""
    if "topk_indices" in native:
        assert isinstance(config, VBLoRAConfig)
        native = {**native, "topk_indices": native["topk_indices"].to(smallest_index_dtype(config.num_vectors))}
    if _use_peft(config, shapes, format):
        assert isinstance(config, VBLoRAConfig)
        settings = peft_format.to_peft_config(config, shapes, form_of(native), conv1d, base_name)
        tensors = peft_format.to_peft(native, config, shapes)
        head_prefix = peft_format.PREFIX
    else:
        settings = {METHOD_KEY: config.method, **config.to_dict()}
        tensors = dict(native)
        head_prefix = HEAD_PREFIX
    return settings, tensors | {head_prefix + name: t for name, t in heads.items()}


def write_files(
    directory: str | Path,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    config: AdapterConfig,
    init_seed: int | None,
) -> None:
    """Write the two files of a directory, tied together by a checksum over the settings and the tensors."""
    metadata = {} if init_seed is None else {"init_seed": str(init_seed)}
    if METHOD_KEY not in settings:
        metadata |= peft_format.start_metadata(config)
    understood, _ = _parse_config(json.loads(json.dumps(settings)), metadata)
    metadata[CHECKSUM] = pair_checksum(understood, tensors, metadata)
    write_tensors(Path(directory) / TENSOR_FILE, tensors, metadata)
    write_json(Path(directory) / CONFIG_FILE, settings)


def read_content(
    directory: Path,
    config: AdapterConfig,
    is_peft: bool,
    shapes: Sequence[LayerShape],
    saved: dict[str, nn.Module] | None,
) -> FileContent:
    path = directory / TENSOR_FILE
    tensors, metadata = read_tensors(path)
    require_pair(path, config, tensors, metadata)
    try:
        if is_peft:
            assert isinstance(config, VBLoRAConfig)
            native = peft_format.from_peft(tensors, config, shapes)
            heads = {key.removeprefix(peft_format.PREFIX): t for key, t in tensors.items()}
        else:
            native = {key: t for key, t in tensors.items() if not key.startswith(HEAD_PREFIX)}
            heads = {key.removeprefix(HEAD_PREFIX): t for key, t in tensors.items() if key not in native}
        check_tensors(native, config.spec(shapes, form_of(native)))
        if saved is None:
            heads = {}
        else:
            check_heads(heads, head_tensors(saved))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return FileContent(native, heads, seed_of(metadata))


class TornPair(ValueError):
    """The two files of a directory are not of one save, as while another process is saving, or one is damaged."""


def pair_checksum(config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the settings as they are understood, the seed, and each tensor's name, type, shape and bytes.

    Settings at their default do not count, so that a later version's new setting leaves the checksum what it was.
    """
    usual = {field.name: field.default for field in fields(config)}
    settings = {name: value for name, value in config.to_dict().items() if value != usual[name]}
    digest = hashlib.sha256()
    digest.update(json.dumps([config.method, settings, metadata.get("init_seed")], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_pair(path: Path, config: AdapterConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuse a tensor file that is damaged or belongs to other settings; older files have no checksum and pass.

    Raises:
        ValueError: the checksum is another.
    """
    if CHECKSUM in metadata and metadata[CHECKSUM] != pair_checksum(config, tensors, metadata):
        raise TornPair(
            f"{path} does not belong to the {CONFIG_FILE} beside it, or is damaged: the checksum is another. "
            "Load again if the adapter was being saved just now, else save it again"
        )


def seed_of(metadata: dict[str, str]) -> int | None:
    """The recorded seed, if it is one that PyTorch takes."""
    text = metadata.get("init_seed", "")
    seed = int(text) if re.fullmatch(r"-?\d{1,20}", text) else None
    return seed if seed is not None and -(2**63) <= seed < 2**64 else None


def read_config(directory: Path) -> tuple[AdapterConfig, bool]:
    """The settings in a directory, and whether it is PEFT's format.

    Raises:
        ValueError: no adapter of ours or of PEFT's VBLoRA is there.
    """
    path = directory / CONFIG_FILE
    values = read_json(path)
    try:
        tensors = directory / TENSOR_FILE
        return _parse_config(values, read_metadata(tensors) if tensors.exists() else {})
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parse_config(values: dict[str, Any], metadata: Mapping[str, str]) -> tuple[AdapterConfig, bool]:
    by_name = AdapterConfig.known
    if METHOD_KEY in values:
        method = values.pop(METHOD_KEY)
        if not isinstance(method, str) or method not in by_name:
            raise ValueError(f"{METHOD_KEY} is {method!r}, not one of {', '.join(sorted(by_name))}")
        return by_name[method].from_dict(values), False
    if values.get("peft_type") == "VBLORA":
        return peft_format.with_start(peft_format.from_peft_config(values), metadata), True
    raise ValueError(
        f"peft_type is {values.get('peft_type')!r}: only VBLORA is loaded here; "
        "load adapters of other methods with peft.PeftModel.from_pretrained"
    )


def _use_peft(config: AdapterConfig, shapes: Sequence[LayerShape], format: str) -> bool:
    if type(config) is not VBLoRAConfig:
        reason: str | None = f"PEFT has no format for {config.method}"
    else:
        reason = peft_format.obstacle(config, shapes)
    if format == "peft" and reason is not None:
        raise ValueError(f'PEFT\'s format cannot hold this adapter: {reason}; use format="native"')
    return format != "native" and reason is None
