"""Whisper's sizes as layer shapes, and what each method stores for them: no model is loaded.

Only the standard library is needed. The layers are named as in transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vblora.counts import METHODS, count_full
from vblora.shapes import Count, LayerShape

_LAYERS = r"((self_attn|encoder_attn)\.(q|k|v|out)_proj|fc1|fc2)"
# The layers that are adapted: regular expressions by what they are called.
TARGETS = {
    "decoder": rf"(.*\.)?decoder\.layers\.\d+\.{_LAYERS}",
    "encoder": rf"(.*\.)?encoder\.layers\.\d+\.{_LAYERS}",
    "both": rf"(.*\.)?(encoder|decoder)\.layers\.\d+\.{_LAYERS}",
    "cross": r"(.*\.)?decoder\.layers\.\d+\.encoder_attn\.(q|k|v|out)_proj",
}


class Size(NamedTuple):
    """A Whisper: the feed-forward layers are four times as wide as the rest."""

    width: int
    layers: int
    """Of each side."""
    vocabulary: int = 51865
    mels: int = 80
    fewer: int = 0
    """Layers that the decoder has less than the encoder."""

    def layers_of(self, side: str) -> int:
        return self.layers - (self.fewer if side == "decoder" else 0)


_ENGLISH = 51864
SIZES = {
    "whisper-tiny.en": Size(384, 4, _ENGLISH),
    "whisper-tiny": Size(384, 4),
    "whisper-base.en": Size(512, 6, _ENGLISH),
    "whisper-base": Size(512, 6),
    "whisper-small.en": Size(768, 12, _ENGLISH),
    "whisper-small": Size(768, 12),
    "whisper-medium.en": Size(1024, 24, _ENGLISH),
    "whisper-medium": Size(1024, 24),
    "whisper-large": Size(1280, 32),
    "whisper-large-v2": Size(1280, 32),
    "whisper-large-v3": Size(1280, 32, 51866, 128),
    "whisper-large-v3-turbo": Size(1280, 32, 51866, 128, 28),
}
HEARD, SAID = 1500, 448  # positions of the encoder and of the decoder
# What is counted unless another setting is chosen: the ranks of the rows in ASR/asr_rows.py, and the paper's bank.
SETTINGS: dict[str, dict[str, int]] = {
    "lora": {"r": 8},
    "dora": {"r": 8},
    "vera": {"r": 256},
    "tied_lora": {"r": 8},
    "lora_xs": {"r": 32},
    "vblora": {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2},
}


class Stored(NamedTuple):
    """What one method stores for one size; full fine-tuning has no targets."""

    model: str
    targets: str
    method: str
    settings: Mapping[str, int]
    counts: Count


def stored(
    models: Sequence[str],
    targets: Sequence[str] = tuple(TARGETS),
    methods: Sequence[str] = ("full", *SETTINGS),
    chosen: Mapping[str, int] | None = None,
) -> list[Stored]:
    """What each method stores for each size and set of layers.

    Args:
        models: of `SIZES`.
        targets: of `TARGETS`.
        methods: "full", or of `SETTINGS`.
        chosen: settings that go before those of `SETTINGS`, in the methods that have them.

    Raises:
        ValueError: a setting that none of the methods has, or one that cannot be.
    """
    chosen = chosen or {}
    known = {name for method in methods for name in SETTINGS.get(method, {})}
    if unused := [name for name in chosen if name not in known]:
        raise ValueError(f"{' and '.join(unused)} does nothing with {', '.join(methods)}: leave it out")
    found = []
    for model in models:
        if "full" in methods:
            found.append(Stored(model, "", "full", {}, count_full(parameters(model))))
        for part in targets:
            for method in methods:
                if method != "full":
                    settings = {name: chosen.get(name, value) for name, value in SETTINGS[method].items()}
                    found.append(
                        Stored(model, part, method, settings, METHODS[method](shapes(model, part), **settings))
                    )
    return found


def shapes(model: str, targets: str) -> list[LayerShape]:
    """The linear layers of a size that `targets` adapts."""
    return [shape for shape in _linear_layers(SIZES[model]) if re.fullmatch(TARGETS[targets], shape.name)]


def _linear_layers(size: Size) -> Iterator[LayerShape]:
    wide = 4 * size.width
    for side, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"])):
        for layer in range(size.layers_of(side)):
            prefix = f"model.{side}.layers.{layer}"
            for attention in attentions:
                for part in ("q", "k", "v", "out"):
                    yield LayerShape(f"{prefix}.{attention}.{part}_proj", size.width, size.width)
            yield LayerShape(f"{prefix}.fc1", size.width, wide)
            yield LayerShape(f"{prefix}.fc2", wide, size.width)


def parameters(model: str) -> int:
    """All parameters of a size; the output layer is the decoder's embedding, and keys have no bias."""
    size = SIZES[model]
    linear = list(_linear_layers(size))
    weights = sum(shape.in_features * shape.out_features for shape in linear)
    biases = sum(shape.out_features for shape in linear if not shape.name.endswith("k_proj"))
    # A weight and a bias each: before every attention and feed-forward layer, and at the end of each side.
    norms = 2 * size.width * (2 * size.layers_of("encoder") + 3 * size.layers_of("decoder") + 2)
    convolutions = 3 * size.width * (size.mels + size.width) + 2 * size.width  # both three frames wide
    embeddings = size.width * (size.vocabulary + HEARD + SAID)
    return weights + biases + norms + convolutions + embeddings


def as_json(one: Stored) -> dict[str, Any]:
    return {**one._asdict(), "counts": one.counts._asdict()}
