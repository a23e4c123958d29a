"""An adapter in one small file: `vblora pack`. The format is written down in docs/packed_format.md.

The file is a safetensors file, so that everybody's tools open it. Its names are those of our own format (and
`head.<parameter>`); what differs is how the numbers are written (vblora.files.encoding), and that the header says
everything that is needed to expand the adapter into plain factors without its base model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vblora.base_weights import read_sample
from vblora.config import AdapterConfig, TensorSpec, VBLoRAConfig
from vblora.container import FLOATS, Raw, checksum, deserialize, is_count, opened, parse_json, serialize
from vblora.experts import layers_among
from vblora.files import drawn, shared_bank
from vblora.files.content import Content, check_floats, check_tensors, outputs_of
from vblora.files.decoding import SCALE_PREFIX, WHOLE_BITS, Reader
from vblora.files.directory import HEAD_PREFIX
from vblora.files.encoding import bits_for, from_whole, pack_bits, to_planes, to_steps, to_whole
from vblora.files.layer_names import compact, expand, fingerprint
from vblora.io import replacing
from vblora.shapes import LayerShape, check_rank

VERSION = 1
MOST_CHARACTERS = 2**22  # of all names, beside 16 for each byte of the file: a mixture of experts has many
MOST_BYTES = 2**30  # of a file from anybody, beside what heads may take
HEADER, CHECKSUM = "vblora", "sha256"  # the keys of safetensors' metadata
FLOAT_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TYPES = ("lossless", *FLOAT_TYPES, "int8")
SHARED = "shared"
BANKS = (*TYPES, "int4", SHARED)
SELECTIONS = ("indices", "seed")
WEIGHTS: tuple[str | int, ...] = ("lossless", 16, 8)
KEYS = {"version", "method", "config", "layers", "fingerprint", "codes", "base_model", "init_seed", "conv1d"}


class HasContent(Protocol):
    """An adapter that is attached to a model."""

    def content(self) -> Content: ...


def write(
    content: Content | HasContent,
    path: str | Path,
    *,
    bank: str = "lossless",
    weights: str | int = "lossless",
    heads: str = "lossless",
    selection: str = "indices",
) -> int:
    """Write an adapter, with its heads, as one packed file; what was there is replaced in one step.

    Args:
        content: an adapter, or what `Adapter.content` or `read` gave.
        path: by convention NAME.vblora.safetensors.
        bank: "lossless", "float32", "float16", "bfloat16", "int8" or "int4" (both with a scale per vector). For the
            other methods this is the type of all their tensors, and int8 and int4 are refused. "shared": not in this
            file, but in one beside it that is called by its checksum, once for all adapters that have the same bank.
        weights: "lossless", 16 or 8: bits of a weight of the admixture.
        heads: as `bank`, but neither shared nor int4; int8 with a scale per row, for matrices only.
        selection: "seed" leaves out the indices (and weights) that the adapter's seed draws again, where the selection
            never moved (k = 1, or logits that were not trained). Readers need a processor that draws as this one.

    Returns:
        The file's bytes, without those of a shared bank.

    Raises:
        ValueError: a setting that does not exist, or that cannot hold this adapter. Nothing is written then.
    """
    path, content = Path(path), _content_of(content)
    check_rank(content.config.r, content.shapes)
    data = dumps(content, bank=bank, weights=weights, heads=heads, selection=selection)
    beside = nullcontext() if bank != SHARED else shared_bank.beside(path.parent, content.tensors["vector_bank"])
    with beside, replacing(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def read(path: str | Path, most_bytes: int | None = None) -> Content:
    """The adapter in a packed file, all of it checked. Of a file of more than `most_bytes` only the header is read.

    Raises:
        ValueError: no such file, or it is damaged, too large or no packed adapter; the message says what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with opened(path) as file:
            _require_packed(file.metadata)  # before a base model's gigabytes are read
            check_size(file.size, most_bytes)
            return _read(file.raws(), file.metadata, file.size, lambda key: shared_bank.read_beside(path.parent, key))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no whole packed adapter: {error}") from error


def read_for(model: nn.Module, path: str | Path) -> Content:
    """As `read`, if the file is not larger than any adapter for this model, which may hold all of it as heads."""
    return read(path, MOST_BYTES + 8 * sum(parameter.numel() for parameter in model.parameters()))


def check_size(size: int, most_bytes: int | None) -> None:
    """Refuse a file before it is read into memory."""
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f"it has {size:,} bytes, more than the {most_bytes:,} allowed")


# --- Writing ------------------------------------------------------------------------------------------------------


def dumps(
    content: Content | HasContent,
    *,
    bank: str = "lossless",
    weights: str | int = "lossless",
    heads: str = "lossless",
    selection: str = "indices",
) -> bytes:
    """The bytes that `write` writes."""
    content = _content_of(content)
    _check_settings(content.config, bank, weights, heads, selection)
    check_tensors(content.tensors, _spec(content.config, content.shapes))
    raws: dict[str, Raw] = {}
    codes: dict[str, Any] = {}
    tensors = dict(content.tensors)
    if selection == "seed":
        codes |= _drawn_again(content)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in drawn.SELECTION}
    if weights != "lossless" and "topk_weights" in tensors:
        tensors |= _heaviest_first(tensors["topk_indices"], tensors["topk_weights"])
    for name, tensor in tensors.items():
        if name == "topk_indices":
            assert isinstance(content.config, VBLoRAConfig)
            raws[name] = Raw.of(pack_bits(tensor.cpu(), bits_for(content.config.num_vectors)))
        elif name == "topk_weights":
            _put_weights(raws, codes, tensor, weights)
        elif name == "vector_bank" and bank == SHARED:
            codes[name] = [SHARED, shared_bank.key_of(tensor)]
        else:
            _put(raws, codes, name, tensor, bank)
    for name, tensor in content.heads.items():
        _put(raws, codes, HEAD_PREFIX + name, tensor, heads)
    text = json.dumps(_header(content, codes), separators=(",", ":"), ensure_ascii=False)
    base = {} if content.base_sample is None else content.base_sample.metadata()
    return serialize(raws, {HEADER: text, CHECKSUM: checksum(text, raws), **base})


def _content_of(source: Content | HasContent) -> Content:
    return source if isinstance(source, Content) else source.content()


def _drawn_again(content: Content) -> dict[str, Any]:
    """The codes of a selection that the adapter's seed draws again.

    Raises:
        ValueError: it does not.
    """
    assert isinstance(content.config, VBLoRAConfig)
    again = drawn.selection_of(content.config, content.shapes, content.init_seed)
    if not all(torch.equal(content.tensors[name].cpu().to(again[name].dtype), again[name]) for name in drawn.SELECTION):
        raise ValueError(
            "the selection is not the one that the adapter's seed draws: leave selection at 'indices'; of a directory "
            "in PEFT's format, which has the layers in another order, give the model too (vblora pack --model MODEL)"
        )
    return {name: drawn.code_of(tensor) for name, tensor in again.items() if tensor.numel()}


def _check_settings(config: AdapterConfig, bank: str, weights: str | int, heads: str, selection: str) -> None:
    choices = (("bank", bank, BANKS), ("heads", heads, TYPES), ("selection", selection, SELECTIONS))
    for what, value, known in choices:
        if value not in known:
            raise ValueError(f"{what} is one of {', '.join(known)}, not {value!r}")
    if type(config) is not VBLoRAConfig and selection == "seed":
        raise ValueError(f"{config.method} has no selection to draw again: leave selection at 'indices'")
    if type(config) is not VBLoRAConfig and bank == SHARED:
        raise ValueError(f"{config.method} has no bank to share")
    if weights not in WEIGHTS:
        raise ValueError(f"weights is one of {', '.join(map(str, WEIGHTS))}, not {weights!r}")
    if type(config) is not VBLoRAConfig and bank in WHOLE_BITS:
        raise ValueError(f"{bank} is offered for VB-LoRA's bank, not for {config.method}: use float16 or bfloat16")


def _header(content: Content, codes: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in content.config.to_dict().items() if value is not None}
    targets = settings.get("target_modules")
    names = layers_among(_names(content.shapes), settings.get("target_parameters"))
    if isinstance(targets, list) and sorted(targets) == sorted(names):
        del settings["target_modules"]  # as PEFT's format has them for "all-linear": hundreds of names, said in layers
    header = {
        "version": VERSION,
        "method": content.config.method,
        "config": settings,
        "layers": compact(content.shapes),
        "fingerprint": content.fingerprint,
        "codes": codes,
        "base_model": content.base_model,
        "init_seed": content.init_seed,
        "conv1d": content.conv1d or None,
    }
    return {key: value for key, value in header.items() if value is not None}


def _heaviest_first(indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The same selections with the k weights of each row in falling order, as steps need them; in float64."""
    first = weights.cpu().double().clamp(min=0)  # (N, k - 1)
    every = torch.cat([first, (1 - first.sum(-1, keepdim=True)).clamp(min=0)], dim=1)
    ordered, order = every.sort(dim=-1, descending=True, stable=True)
    return {"topk_indices": indices.cpu().long().gather(1, order), "topk_weights": ordered[:, :-1]}


def _put_weights(raws: dict[str, Raw], codes: dict[str, Any], tensor: Tensor, weights: str | int) -> None:
    if tensor.shape[1] == 0:
        return
    if isinstance(weights, str):
        _put(raws, codes, "topk_weights", tensor, weights)
        return
    steps = to_steps(tensor, weights)
    raws["topk_weights"] = Raw.of(steps.to(torch.uint8) if weights == 8 else _as_uint16(steps))
    codes["topk_weights"] = "steps"


def _put(raws: dict[str, Raw], codes: dict[str, Any], name: str, tensor: Tensor, setting: str) -> None:
    """Write one tensor as its setting asks; what are no floats, and vectors instead of whole numbers, as they are."""
    if not tensor.is_floating_point():
        raws[name] = Raw.of(tensor)
        return
    check_floats(name, tensor)
    if setting in FLOAT_TYPES:
        rounded = tensor.detach().to(FLOAT_TYPES[setting])
        if not torch.isfinite(rounded).all():
            raise ValueError(f"{name} has numbers that {setting} cannot hold: use bfloat16, float32 or lossless")
        raws[name] = Raw.of(rounded)
    elif setting in WHOLE_BITS and tensor.dim() > 1:
        whole, scale = to_whole(tensor, WHOLE_BITS[setting])
        if not (torch.isfinite(scale).all() and torch.isfinite(from_whole(whole, scale)).all()):
            raise ValueError(f"{name} has numbers that {setting} cannot hold: use lossless")
        raws[name] = Raw.of(whole if setting == "int8" else pack_bits(whole.cpu() + 8, 4))
        raws[SCALE_PREFIX + name], codes[name] = Raw.of(scale), setting
    else:
        raws[name] = Raw.of(tensor)
        if raws[name].dtype in FLOATS and (planes := to_planes(tensor)) is not None:
            codes[name] = [raws[name].dtype, *tensor.shape]
            raws[name] = Raw("U8", (len(planes),), planes)


def _as_uint16(steps: Tensor) -> Tensor:
    return torch.where(steps < 2**15, steps, steps - 2**16).to(torch.int16).view(torch.uint16)


# --- Reading ------------------------------------------------------------------------------------------------------


def loads(data: bytes, bank_of: Callable[[str], Tensor] | None = None) -> Content:
    """The adapter in a packed file's bytes, all of it checked.

    No number of the file is believed before the bytes behind it are counted: reading takes memory in proportion to
    the file (the factors, which `Content.factors` makes, are larger). Only a selection that the seed draws has no
    bytes; how much is drawn has limits of its own (vblora.files.drawn).

    Args:
        data: the file's bytes.
        bank_of: gives a shared bank by its key, as `shared_bank.read_beside`; without it such a file is refused.

    Raises:
        ValueError: the bytes are damaged, or no packed adapter.
    """
    return _read(*deserialize(data), len(data), bank_of)


def _read(
    raws: dict[str, Raw], metadata: dict[str, str], size: int, bank_of: Callable[[str], Tensor] | None
) -> Content:
    _require_packed(metadata)
    header = parse_json(metadata[HEADER])
    if not isinstance(header, dict) or not is_count(header.get("version")):
        raise ValueError(f"{HEADER!r} in the metadata names no version of the format")
    if header["version"] != VERSION:
        raise ValueError(
            f"it has version {header['version']} of the format, and this program reads version {VERSION}: update it"
        )
    if metadata.get(CHECKSUM) != checksum(metadata[HEADER], raws):
        raise ValueError("the checksum is not that of the content: the file is damaged")
    json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair is no text: a UnicodeError, a ValueError
    _check_header(header)
    stored_bytes = sum(len(raw.data) for raw in raws.values())
    shapes = expand(header["layers"], 8 * stored_bytes, 16 * size + MOST_CHARACTERS)
    config = _read_config(header, _names(shapes))
    check_rank(config.r, shapes)
    if fingerprint(shapes, {shape.name: outputs_of(shape, config) for shape in shapes}) != header["fingerprint"]:
        raise ValueError("the header's fingerprint is not that of the layers that it names")
    reader = Reader(raws, header["codes"], bank_of, lambda: _draw(config, shapes, header.get("init_seed")))
    tensors = {name: reader.take(name, spec) for name, spec in _spec(config, shapes).items()}
    heads = {name.removeprefix(HEAD_PREFIX): reader.head(name) for name in list(raws) if name.startswith(HEAD_PREFIX)}
    reader.require_empty()
    check_tensors(tensors, _spec(config, shapes))
    base, seed = header.get("base_model"), header.get("init_seed")
    conv1d, sample = header.get("conv1d", False), read_sample(metadata)
    return Content(config, shapes, tensors, heads, base, seed, conv1d, reader.stored, sample)


def _draw(config: AdapterConfig, shapes: Sequence[LayerShape], seed: int | None) -> dict[str, Tensor]:
    if type(config) is not VBLoRAConfig:
        raise ValueError(f"{config.method} has no selection that a seed draws")
    return drawn.selection_of(config, shapes, seed)


def _require_packed(metadata: dict[str, str]) -> None:
    if HEADER not in metadata:
        raise ValueError(f"it is a safetensors file without {HEADER!r} in its metadata, so no packed adapter")


def _check_header(header: dict[str, Any]) -> None:
    if unknown := sorted(header.keys() - KEYS):
        raise ValueError(f"unknown keys in the header: {', '.join(unknown[:5])}")
    kinds: dict[str, Any] = {"method": str, "config": dict, "layers": list, "fingerprint": str, "codes": dict}
    optional = {"base_model": str, "conv1d": bool, "init_seed": int}
    for key, kind in (kinds | optional).items():
        if key not in header and key in kinds:
            raise ValueError(f"the header has no {key!r}")
        if key in header and type(header[key]) is not kind:
            raise ValueError(f"the header's {key!r} is {type(header[key]).__name__}, not {kind.__name__}")
    if not -(2**63) <= header.get("init_seed", 0) < 2**64:
        raise ValueError("the header's init_seed is no whole number that PyTorch takes for a seed")


def _names(shapes: Sequence[LayerShape]) -> list[str]:
    return [shape.name for shape in shapes]


def _read_config(header: dict[str, Any], names: list[str]) -> AdapterConfig:
    by_name = {name: config for name, config in AdapterConfig.known.items() if config.kept_as_itself}
    if header["method"] not in by_name:
        raise ValueError(f"method {header['method']!r} is not one of {', '.join(sorted(by_name))}")
    try:
        layers = layers_among(names, header["config"].get("target_parameters"))
        return by_name[header["method"]].from_dict({"target_modules": layers or None, **header["config"]})
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the settings are damaged: {error}") from error


def _spec(config: AdapterConfig, shapes: Sequence[LayerShape]) -> dict[str, TensorSpec]:
    return config.spec(shapes, "topk")
