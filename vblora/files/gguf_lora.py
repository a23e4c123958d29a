"""An adapter as LoRA for llama.cpp and what is built on it (Ollama, LM Studio): one GGUF file, exactly.

As in `vblora.files.lora` nothing is approximated: lora_alpha = r, and A and B are the adapter's own. llama.cpp calls
layers by names of its own and keeps the rows of some of them in another order; both are those of its converter.
https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py

    general.type = adapter, adapter.type = lora, adapter.lora.alpha = r
    <layer>.weight.lora_a (r, in) and <layer>.weight.lora_b (out, r)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vblora.files.content import Content
from vblora.files.lora import Pairs, padded, whole_layers
from vblora.io import replacing

# By transformers' model_type: llama.cpp's architecture, and whether it turns the rows of q and k for its own rotary
# embedding.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "phi3": ("phi3", False),
    "gpt2": ("gpt2", False),
}
TYPES = (torch.float32, torch.float16)


def export(
    content: Content,
    file: str | Path,
    model: Mapping[str, Any],
    factors: Pairs | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter of any method as a GGUF file of LoRA; what was there is replaced in one step.

    Args:
        content: what `Adapter.content` or `vblora.files.packed.read` gave.
        file: by convention NAME.gguf.
        model: the base model's configuration, as transformers' `config.to_dict()`.
        factors: by layer, where the content alone does not give them (LoRA-XS).
        dtype: of the factors: float32 or float16.

    Raises:
        ValueError: the gguf package is missing, the architecture or a layer is not known, the adapter has heads, which
            such a file cannot hold, or `dtype` cannot hold the factors. Nothing is written then.
    """
    gguf = _package()
    if content.heads:
        heads = sorted({name.rpartition(".")[0] for name in content.heads})
        raise ValueError(f"a GGUF adapter holds no heads, and this one has {', '.join(heads)}: export it --to lora")
    if dtype not in TYPES:
        raise ValueError(f"a GGUF adapter is float32 or float16 here, not {str(dtype).removeprefix('torch.')}")
    kind = model.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"a model of type {kind!r} is not known here; known: {', '.join(ARCHITECTURES)}")
    architecture, turned = ARCHITECTURES[kind]
    pairs = whole_layers(content.factors() if factors is None else factors, content.config)
    r = max(a.shape[0] for a, _ in pairs.values())
    names = _Names(gguf, architecture, model)
    tensors: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        a, b = padded(layer, *pair, r, dtype)
        if turned and (heads_of := re.search(r"\.(q|k)_proj$", layer)):
            b = turn_rows(b, _heads(model, heads_of[1]))
        name = names.of(layer)
        tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": b}
    with replacing(Path(file)) as temporary:
        _write(gguf, temporary, architecture, r, content, tensors)


def turn_rows(b: Tensor, heads: int) -> Tensor:
    """B (out, r) with the rows of each head as llama.cpp's rotary embedding has them.

    transformers rotates row i of a head together with row i + half, llama.cpp 2 i with 2 i + 1.
    """
    return b.view(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _heads(model: Mapping[str, Any], which: str) -> int:
    heads = int(model["num_attention_heads"])
    return heads if which == "q" else int(model.get("num_key_value_heads") or heads)


class _Names:
    """llama.cpp's names of a model's layers."""

    def __init__(self, gguf: Any, architecture: str, model: Mapping[str, Any]) -> None:
        number = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        layers = model.get("num_hidden_layers") or model.get("n_layer")
        self._map = gguf.get_tensor_name_map(number, int(layers or 0))
        self._architecture = architecture

    def of(self, layer: str) -> str:
        found = self._map.get_name(layer)
        if found is None:
            raise ValueError(f"llama.cpp's {self._architecture} has no layer that {layer} could be: leave it out")
        return str(found)


def _write(gguf: Any, path: Path, architecture: str, r: int, content: Content, tensors: Mapping[str, Tensor]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(r))
        if content.base_model:
            writer.add_string("general.base_model.0.name", content.base_model.rpartition("/")[2])
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("a GGUF file needs llama.cpp's package: pip install gguf") from error
    return gguf
