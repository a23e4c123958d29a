"""What an adapter directory or a packed file holds, read from its files alone: `vblora inspect DIR`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vblora.config import VBLoRAConfig
from vblora.experts import parameter_of
from vblora.files import packed
from vblora.files.content import check_floats, check_weights
from vblora.files.directory import HEAD_PREFIX, opened, seed_of
from vblora.files.peft_format import BANK, PREFIX
from vblora.io import describe_dtype


def describe(directory: str | Path) -> dict[str, Any]:
    """The content of an adapter directory, or of a packed file, as plain values.

    Keys: method, format, form, settings, parts (what kinds of tensor: how many, numbers, bytes, types),
    adapter_bytes, head_parameters, head_bytes, file_bytes, init_seed; for VB-LoRA also sub_vectors and selection
    (vectors of the bank in use, and the share of the most used one); for a packed file also base_model, layers,
    experts (how many of the layers are) and fingerprint. Its parts have the bytes that are stored, and for their types
    how they are stored.

    Raises:
        ValueError: no adapter is there, or its files are damaged.
    """
    directory = Path(directory)
    if directory.is_file():
        return _describe_packed(directory)
    with opened(directory) as found:
        config, is_peft, metadata, tensors = found.config, found.is_peft, found.metadata, found.tensors()
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            check_floats(name, tensor)
        part = parts.setdefault(_part_of(name, is_peft), {"tensors": 0, "numbers": 0, "bytes": 0, "types": []})
        part["tensors"] += 1
        part["numbers"] += tensor.numel()
        part["bytes"] += _bytes(tensor)
        if describe_dtype(tensor) not in part["types"]:
            part["types"].append(describe_dtype(tensor))
    head = parts.get("head", {"numbers": 0, "bytes": 0})
    result: dict[str, Any] = {
        "method": config.method,
        "format": "PEFT VBLoRA" if is_peft else "vblora native",
        "form": "full" if "logits" in parts or "topk_indices" not in parts else "topk",
        "settings": config.to_dict(),
        "parts": parts,
        "adapter_bytes": sum(part["bytes"] for part in parts.values()) - head["bytes"],
        "head_parameters": head["numbers"],
        "head_bytes": head["bytes"],
        "file_bytes": sum(path.stat().st_size for path in directory.iterdir() if path.suffix == ".safetensors"),
        "init_seed": seed_of(metadata),
    }
    if type(config) is VBLoRAConfig:
        result |= _selection(tensors, config)
    return result


def _describe_packed(file: Path) -> dict[str, Any]:
    content = packed.read(file)
    parts: dict[str, dict[str, Any]] = {}
    heads = {HEAD_PREFIX + name: tensor for name, tensor in content.heads.items()}
    for name, tensor in (content.tensors | heads).items():
        how, size = content.stored.get(name, ("", 0))  # for k = 1 no weights are stored
        empty: dict[str, Any] = {"tensors": 0, "numbers": 0, "bytes": 0, "types": []}
        part = parts.setdefault(_part_of(name, is_peft=False), empty)
        part["tensors"] += 1
        part["numbers"] += tensor.numel()
        part["bytes"] += size
        if how and how not in part["types"]:
            part["types"].append(how)
    head = parts.get("head", {"numbers": 0, "bytes": 0})
    result = {
        "method": content.config.method,
        "format": "vblora packed",
        "form": "topk",
        "settings": content.config.to_dict(),
        "parts": parts,
        "adapter_bytes": sum(part["bytes"] for part in parts.values()) - head["bytes"],
        "head_parameters": head["numbers"],
        "head_bytes": head["bytes"],
        "file_bytes": file.stat().st_size,
        "init_seed": content.init_seed,
        "base_model": content.base_model,
        "layers": len(content.shapes),
        "experts": sum(parameter_of(s.name, content.config.target_parameters) is not None for s in content.shapes),
        "fingerprint": content.fingerprint,
    }
    if type(content.config) is VBLoRAConfig:
        result |= _selection(content.tensors, content.config)
    return result


def render(content: dict[str, Any]) -> str:
    """The same for reading."""
    settings = content["settings"]
    shown = ", ".join(f"{key} {_short(value)}" for key, value in settings.items() if value is not None)
    lines = [
        f"{content['method']}, {content['format']}, {content['form']} form",
        f"settings      {shown}",
        f"file          {content['file_bytes']:,} bytes, of which adapter {content['adapter_bytes']:,}"
        f" and head {content['head_bytes']:,} ({content['head_parameters']:,} parameters)",
    ]
    for name, part in content["parts"].items():
        lines.append(
            f"  {name:<12}{part['tensors']:>5} tensors {part['numbers']:>12,} numbers {part['bytes']:>12,} bytes"
            f"  {', '.join(part['types'])}"
        )
    if "sub_vectors" in content:
        selection = content["selection"]
        lines.append(f"sub-vectors   {content['sub_vectors']:,}, of {settings['topk']} vectors each")
        lines.append(
            f"bank          {selection['vectors_used']} of {settings['num_vectors']} vectors in use; the most used "
            f"one carries {selection['largest_share']:.1%} of all weight"
        )
    if "fingerprint" in content:
        experts = f", of which {content['experts']} experts," if content["experts"] else ""
        base = content["base_model"] or "a model that is not named"
        lines.append(f"layers        {content['layers']}{experts} of {base}")
        lines.append(f"fingerprint   {content['fingerprint']}")
    if content["init_seed"] is not None:
        lines.append(f"seed          {content['init_seed']} (of the initial values)")
    return "\n".join(lines)


def selections(tensors: dict[str, Tensor], config: VBLoRAConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """The selected vectors and their weights, both (rows, k), tensor by tensor of a file in either form.

    Raises:
        ValueError: an index lies outside the bank, or indices and weights do not belong together.
    """
    for name, tensor in tensors.items():
        if name.endswith("topk_indices"):
            beside = name.replace("topk_indices", "topk_weights")
            if beside not in tensors:
                raise ValueError(f"{name} has no {beside} beside it")
            check_weights(tensors[beside])
            first = tensors[beside].double()
            weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], dim=-1)
            indices = tensor.long()
        elif name == "logits" or name.endswith(("vblora_logits_A", "vblora_logits_B")):
            if tensor.shape[-1] != config.num_vectors:
                raise ValueError(f"{name} is {tensor.shape[-1]} wide; the bank has {config.num_vectors} vectors")
            values, indices = tensor.double().topk(config.topk, dim=-1)
            weights = values.softmax(dim=-1)
        else:
            continue
        if indices.numel() and (indices.min() < 0 or indices.max() >= config.num_vectors):
            raise ValueError(f"{name}: an index lies outside the bank of {config.num_vectors} vectors")
        if indices.shape != weights.shape or indices.shape[-1] != config.topk:
            raise ValueError(f"{name}: shape {tuple(indices.shape)} beside weights of {tuple(weights.shape)}")
        yield indices.reshape(-1, config.topk), weights.reshape(-1, config.topk)


def _selection(tensors: dict[str, Tensor], config: VBLoRAConfig) -> dict[str, Any]:
    bank = tensors.get(BANK, tensors.get("vector_bank"))
    if bank is None or tuple(bank.shape) != (config.num_vectors, config.vector_length):
        raise ValueError(f"the file has no vector bank of {config.num_vectors} times {config.vector_length} numbers")
    total = torch.zeros(config.num_vectors, dtype=torch.float64, device="cpu")  # the weight each vector carries
    n = 0
    for indices, weights in selections(tensors, config):
        total.scatter_add_(0, indices.flatten(), weights.flatten())
        n += indices.shape[0]
    if n == 0:
        raise ValueError("the file holds no selection and no logits")
    return {
        "sub_vectors": n,
        "selection": {
            "vectors_used": int((total > 0).sum()),
            "largest_share": float(total.max() / max(n, 1)),
        },
    }


def _part_of(name: str, is_peft: bool) -> str:
    """Which part of an adapter a tensor belongs to."""
    if not is_peft:
        return "head" if name.startswith(HEAD_PREFIX) else name
    if name == BANK:
        return "vector_bank"
    for ending in ("topk_indices", "topk_weights"):
        if name.endswith(f"_{ending}"):
            return ending
    if "vblora_logits" in name:
        return "logits"
    return "head" if name.startswith(PREFIX) else name


def _short(value: Any) -> Any:
    """A setting for reading: of a long list, its first entry and how many there are."""
    return f"[{value[0]!r} and {len(value) - 1} more]" if isinstance(value, list) and len(value) > 8 else value


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
