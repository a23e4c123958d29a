"""An adapter in one small file: `vblora pack`. The format is written down in docs/packed_format.md.

The file is a safetensors file, so that everybody's tools open it. Its names are those of our own format (and
`head.<parameter>`); what differs is how the numbers are written (vblora.storage.coding), and that the header says
everything that is needed to expand the adapter into plain factors without its base model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vblora.adapter import Adapter, TensorSpec
from vblora.bank import Layout, compose
from vblora.config import AdapterConfig
from vblora.counting import LayerShape
from vblora.methods.vb_lora import VBLoRAConfig, selected_logits
from vblora.methods.vb_lora_selection import SelectionConfig
from vblora.storage import HEAD_PREFIX, check_floats, check_tensors, head_tensors, shared_bank
from vblora.storage.coding import bits_for, pack_bits, to_int8, to_planes, to_steps
from vblora.storage.container import FLOATS, Raw, checksum, deserialize, is_count, parse_json, serialize
from vblora.storage.decoding import SCALE_PREFIX, Reader
from vblora.storage.files import replacing
from vblora.storage.layer_names import WIDEST, compact, expand, fingerprint
from vblora.targets import is_conv1d, split_key

VERSION = 1
HEADER, CHECKSUM = "vblora", "sha256"  # the keys of safetensors' metadata
FLOAT_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TYPES = ("lossless", *FLOAT_TYPES, "int8")
SHARED = "shared"
WEIGHTS: tuple[str | int, ...] = ("lossless", 16, 8)
KEYS = {"version", "method", "config", "layers", "fingerprint", "codes", "base_model", "init_seed", "conv1d"}
MOST_FACTOR_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Packed:
    """An adapter without a model: what a packed file holds.

    Attributes:
        config: the method's settings.
        shapes: the adapted layers, in the order of the tensors.
        tensors: the method's, by our names; for VB-LoRA vector_bank (h, b), topk_indices (N, k) and
            topk_weights (N, k - 1).
        heads: parameters and buffers of `modules_to_save`, by their names in the model.
        base_model: the base model's name, where it is known.
        init_seed: what the adapter's initial values were drawn from, where it is known.
        conv1d: the adapted layers are transformers' Conv1D.
        stored: how each tensor was written, and in how many bytes; empty for what comes from no packed file.
    """

    config: AdapterConfig
    shapes: list[LayerShape]
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    init_seed: int | None = None
    conv1d: bool = False
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, widths and outputs of the adapted layers, whatever their order."""
        return fingerprint(self.shapes, self.outputs)

    @property
    def outputs(self) -> dict[str, slice]:
        """Which of its layer's outputs each target adapts: all, or those of one part of `split_modules`."""
        return {shape.name: _outputs(shape, self.config) for shape in self.shapes}

    @property
    def factor_bytes(self) -> int:
        """What `factors` will take in memory."""
        return 4 * self.config.r * sum(shape.in_features + shape.out_features for shape in self.shapes)

    def factors(self, most_bytes: int = MOST_FACTOR_BYTES) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each layer by name, in float32, as `Adapter.layer_factors`.

        Raises:
            ValueError: they would take more than `most_bytes`, or follow from the base model's weights (LoRA-XS).
        """
        if self.config.method == "lora_xs":
            raise ValueError("the factors of lora_xs follow from the base model's weights: load it into its model")
        if self.factor_bytes > most_bytes:
            raise ValueError(f"the factors take {self.factor_bytes:,} bytes, more than the {most_bytes:,} allowed")
        if type(self.config) is VBLoRAConfig:
            layout = Layout(self.shapes, self.config.r, self.config.vector_length)
            logits = selected_logits(self.tensors["topk_weights"])
            pairs = layout.factors(
                compose(self.tensors["vector_bank"].float(), self.tensors["topk_indices"].long(), logits)
            )
            return {shape.name: (a, b.T) for shape, (a, b) in zip(self.shapes, pairs, strict=True)}
        adapter = Adapter.methods[type(self.config)](self.config, _stand_ins(self.shapes, self.config), None)
        adapter.load_tensors(self.tensors)
        return adapter.layer_factors()


def content_of(adapter: Adapter) -> Packed:
    """An attached adapter in its top-k form, with its heads, as `write` takes it.

    Raises:
        ValueError: the adapter is attached to no model.
    """
    model, _ = adapter._require_home()
    return Packed(
        adapter.kept_config("topk"),
        list(adapter.shapes),
        {name: t.detach().cpu() for name, t in adapter.tensors("topk").items()},
        {name: t.detach().cpu() for name, t in head_tensors(adapter.saved).items()},
        getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        adapter.init_seed,
        any(is_conv1d(module) for module in adapter.targets.values()),
    )


def write(
    adapter: Adapter | Packed,
    path: str | Path,
    *,
    bank: str = "lossless",
    weights: str | int = "lossless",
    heads: str = "lossless",
) -> int:
    """Write an adapter, with its heads, as one packed file; what was there is replaced in one step.

    Args:
        adapter: an adapter attached to its model, or what `read` gave.
        path: by convention NAME.vblora.safetensors.
        bank: "lossless", "float32", "float16", "bfloat16" or "int8" (with a scale per vector). For the other methods
            this is the type of all their tensors, and "int8" is refused. "shared": not in this file, but in one beside
            it that is called by its checksum, once for all adapters that have the same bank.
        weights: "lossless", 16 or 8: bits of a weight of the admixture.
        heads: as `bank`, but not shared; int8 with a scale per row, for matrices only.

    Returns:
        The file's bytes, without those of a shared bank.

    Raises:
        ValueError: a setting that does not exist, or that cannot hold this adapter. Nothing is written then.
    """
    path = Path(path)
    content = content_of(adapter) if isinstance(adapter, Adapter) else adapter
    data = dumps(content, bank=bank, weights=weights, heads=heads)
    if bank == SHARED:
        shared_bank.write_beside(path.parent, content.tensors["vector_bank"])
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def read(path: str | Path) -> Packed:
    """The adapter in a packed file, all of it checked.

    Raises:
        ValueError: no such file, or it is damaged or no packed adapter; the message says what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        return loads(path.read_bytes(), lambda key: shared_bank.read_beside(path.parent, key))
    except ValueError as error:
        raise ValueError(f"{path} is no whole packed adapter: {error}") from error


# --- Writing ------------------------------------------------------------------------------------------------------


def dumps(
    adapter: Adapter | Packed, *, bank: str = "lossless", weights: str | int = "lossless", heads: str = "lossless"
) -> bytes:
    """The bytes that `write` writes."""
    content = content_of(adapter) if isinstance(adapter, Adapter) else adapter
    _check_settings(content.config, bank, weights, heads)
    check_tensors(content.tensors, _spec(content.config, content.shapes))
    raws: dict[str, Raw] = {}
    codes: dict[str, Any] = {}
    tensors = dict(content.tensors)
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
    return serialize(raws, {HEADER: text, CHECKSUM: checksum(text, raws)})


def _check_settings(config: AdapterConfig, bank: str, weights: str | int, heads: str) -> None:
    for what, value, known in (("bank", bank, (*TYPES, SHARED)), ("heads", heads, TYPES)):
        if value not in known:
            raise ValueError(f"{what} is one of {', '.join(known)}, not {value!r}")
    if type(config) is not VBLoRAConfig and bank == SHARED:
        raise ValueError(f"{config.method} has no bank to share")
    if weights not in WEIGHTS:
        raise ValueError(f"weights is one of {', '.join(map(str, WEIGHTS))}, not {weights!r}")
    if type(config) is not VBLoRAConfig and bank == "int8":
        raise ValueError(f"int8 is offered for VB-LoRA's bank, not for {config.method}: use float16 or bfloat16")


def _header(content: Packed, codes: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in content.config.to_dict().items() if value is not None}
    targets, names = settings["target_modules"], _names(content.shapes)
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
    """Write one tensor as its setting asks; what are no floats, and vectors instead of int8, as they are."""
    if not tensor.is_floating_point():
        raws[name] = Raw.of(tensor)
        return
    check_floats(name, tensor)
    if setting in FLOAT_TYPES:
        rounded = tensor.detach().to(FLOAT_TYPES[setting])
        if not torch.isfinite(rounded).all():
            raise ValueError(f"{name} has numbers that {setting} cannot hold: use bfloat16, float32 or lossless")
        raws[name] = Raw.of(rounded)
    elif setting == "int8" and tensor.dim() > 1:
        whole, scale = to_int8(tensor)
        raws[name], raws[SCALE_PREFIX + name] = Raw.of(whole), Raw.of(scale)
        codes[name] = "int8"
    else:
        raws[name] = Raw.of(tensor)
        if raws[name].dtype in FLOATS and (planes := to_planes(tensor)) is not None:
            codes[name] = [raws[name].dtype, *tensor.shape]
            raws[name] = Raw("U8", (len(planes),), planes)


def _as_uint16(steps: Tensor) -> Tensor:
    return torch.where(steps < 2**15, steps, steps - 2**16).to(torch.int16).view(torch.uint16)


# --- Reading ------------------------------------------------------------------------------------------------------


def loads(data: bytes, bank_of: Callable[[str], Tensor] | None = None) -> Packed:
    """The adapter in a packed file's bytes, all of it checked.

    No number of the file is believed before the bytes behind it are counted: reading takes memory in proportion to
    the file (the factors, which `Packed.factors` makes, are larger).

    Args:
        data: the file's bytes.
        bank_of: gives a shared bank by its key, as `shared_bank.read_beside`; without it such a file is refused.

    Raises:
        ValueError: the bytes are damaged, or no packed adapter.
    """
    raws, metadata = deserialize(data)
    if HEADER not in metadata:
        raise ValueError(f"a safetensors file without {HEADER!r} in its metadata, so no packed adapter")
    header = parse_json(metadata[HEADER])
    if not isinstance(header, dict) or not is_count(header.get("version")):
        raise ValueError(f"{HEADER!r} in the metadata has no version")
    if header["version"] != VERSION:
        raise ValueError(f"format version {header['version']}; this program reads version {VERSION}: update it")
    if metadata.get(CHECKSUM) != checksum(metadata[HEADER], raws):
        raise ValueError("the checksum is not that of the content: the file is damaged")
    json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair is no text: a UnicodeError, a ValueError
    _check_header(header)
    stored_bytes = sum(len(raw.data) for raw in raws.values())
    shapes = expand(header["layers"], 8 * stored_bytes, 16 * len(data) + 2**16)
    config = _read_config(header, _names(shapes))
    if fingerprint(shapes, {shape.name: _outputs(shape, config) for shape in shapes}) != header["fingerprint"]:
        raise ValueError("the fingerprint is not that of the layers")
    reader = Reader(raws, header["codes"], bank_of)
    tensors = {name: reader.take(name, spec) for name, spec in _spec(config, shapes).items()}
    heads = {name.removeprefix(HEAD_PREFIX): reader.head(name) for name in list(raws) if name.startswith(HEAD_PREFIX)}
    reader.require_empty()
    check_tensors(tensors, _spec(config, shapes))
    base, seed = header.get("base_model"), header.get("init_seed")
    return Packed(config, shapes, tensors, heads, base, seed, header.get("conv1d", False), reader.stored)


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
        raise ValueError("the header's init_seed is no seed")


def _names(shapes: Sequence[LayerShape]) -> list[str]:
    return [shape.name for shape in shapes]


def _read_config(header: dict[str, Any], names: list[str]) -> AdapterConfig:
    # The other selections are kept as plain VB-LoRA.
    by_name = {config.method: config for config in Adapter.methods if config is not SelectionConfig}
    if header["method"] not in by_name:
        raise ValueError(f"method {header['method']!r} is not one of {', '.join(sorted(by_name))}")
    try:
        return by_name[header["method"]].from_dict({"target_modules": names, **header["config"]})
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the settings are damaged: {error}") from error


def _spec(config: AdapterConfig, shapes: Sequence[LayerShape]) -> dict[str, TensorSpec]:
    return Adapter.methods[type(config)].spec(config, shapes, "topk")


# --- Layers that are not there --------------------------------------------------------------------------------------


def _outputs(shape: LayerShape, config: AdapterConfig) -> slice:
    """As `vblora.targets.output_slice`, from the part's own width: all parts of a layer are equally wide."""
    parts, part = _parts(shape.name, config)
    if not parts:
        return slice(None)
    if part not in parts or len(parts) * shape.out_features > WIDEST:
        raise ValueError(f"{shape.name} is no part of a layer that split_modules make {len(parts)}")
    start = parts.index(part) * shape.out_features
    return slice(start, start + shape.out_features)


def _parts(name: str, config: AdapterConfig) -> tuple[list[str], str]:
    """The parts of the layer that this target is in, none where it is a whole layer, and which one it is."""
    layer, _, part = name.rpartition(".")
    key = split_key(layer, config) if layer else None
    return ([], "") if key is None else ((config.split_modules or {})[key], part)


def _stand_ins(shapes: Sequence[LayerShape], config: AdapterConfig) -> dict[str, nn.Module]:
    """Layers of these names and widths, without weights."""
    result: dict[str, nn.Module] = {}
    for shape in shapes:
        width = shape.out_features * max(1, len(_parts(shape.name, config)[0]))
        result[shape.name] = nn.Linear(shape.in_features, width, bias=False, device="meta")
    return result
