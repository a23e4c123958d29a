"""An adapter without a model, and the checks that every file of one goes through."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora.base_weights import BaseSample, take_sample
from vblora.config import AdapterConfig, TensorSpec
from vblora.files import layer_names
from vblora.files.layer_names import WIDEST
from vblora.io import describe_dtype
from vblora.shapes import LayerShape
from vblora.targets import head_tensors, is_conv1d, split_key

MOST_FACTOR_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Content:
    """An adapter without a model: all that its files say.

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
        base_sample: single weights of the base model, where they are known.
        task_type: PEFT's name of what the base model does, such as "CAUSAL_LM", where it has one.
        num_labels: how many a classifier tells apart.
    """

    config: AdapterConfig
    shapes: list[LayerShape]
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    base_model: str | None = None
    init_seed: int | None = None
    conv1d: bool = False
    stored: dict[str, tuple[str, int]] = field(default_factory=dict)
    base_sample: BaseSample | None = None
    task_type: str | None = None
    num_labels: int | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names, widths and outputs of the adapted layers, whatever their order."""
        return layer_names.fingerprint(self.shapes, self.outputs)

    @property
    def outputs(self) -> dict[str, slice]:
        """Which of its layer's outputs each target adapts: all, or those of one part of `split_modules`."""
        return {shape.name: outputs_of(shape, self.config) for shape in self.shapes}

    @property
    def factor_bytes(self) -> int:
        """What `factors` will take in memory."""
        return 4 * self.config.r * sum(shape.in_features + shape.out_features for shape in self.shapes)

    def factors(self, most_bytes: int = MOST_FACTOR_BYTES) -> dict[str, tuple[Tensor, Tensor]]:
        """A (r, in) and B (out, r) of each layer by name, in float32, as `Adapter.layer_factors`.

        Raises:
            ValueError: they would take more than `most_bytes`, or follow from the base model's weights (LoRA-XS).
        """
        if self.factor_bytes > most_bytes:
            raise ValueError(f"the factors take {self.factor_bytes:,} bytes, more than the {most_bytes:,} allowed")
        pairs = self.config.factors(self.shapes, self.tensors)
        return {shape.name: (a, b.T) for shape, (a, b) in zip(self.shapes, pairs, strict=True)}


def content_of(adapter: Any, form: str) -> Content:
    """What a file of this form holds of an adapter that is attached."""
    model, _ = adapter.home
    return Content(
        adapter.config.kept(form),
        list(adapter.shapes),
        {name: tensor.detach().cpu() for name, tensor in adapter.tensors(form).items()},
        {name: tensor.detach().cpu() for name, tensor in head_tensors(adapter.saved).items()},
        getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        adapter.init_seed,
        any(is_conv1d(module) for module in adapter.targets.values()),
        base_sample=take_sample(model, adapter.targets, adapter.shapes, adapter.outputs),
        task_type=task_type_of(model, adapter.saved_names),
        num_labels=getattr(getattr(model, "config", None), "num_labels", None),
    )


# PEFT's names by the endings of transformers' classes, and the heads of such a model that PEFT adds to modules_to_save.
TASK_TYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
}


def task_type_of(model: nn.Module, saved: Collection[str]) -> str | None:
    """PEFT's name of what a model does, with which its AutoPeftModelFor... classes load an adapter of it.

    None where PEFT could not: it looks for the head in the file, and so wants it among the `saved` modules.
    """
    ending = next((end for end in TASK_TYPES if type(model).__name__.endswith(end)), None)
    if ending is None:
        return None
    task_type, heads = TASK_TYPES[ending]
    if ending == "ForConditionalGeneration":  # some take sounds or pictures, and are none of PEFT's kinds
        of_texts = getattr(model, "main_input_name", None) == "input_ids"
        return task_type if of_texts and getattr(model.config, "is_encoder_decoder", False) else None
    own = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in heads}
    return task_type if not heads or (own and own <= set(saved)) else None


class FileContent(NamedTuple):
    """A file's tensors under our names, its heads, the seed of its initial values, and its base; all of it checked."""

    native: dict[str, Tensor]
    heads: dict[str, Tensor]
    init_seed: int | None
    base_sample: BaseSample | None

    @property
    def form(self) -> str:
        """ "topk" or "full"."""
        return form_of(self.native)


def form_of(native: dict[str, Tensor]) -> str:
    """Which form these tensors of an adapter are."""
    return "topk" if native.keys() & {"topk_indices", "topk_weights"} else "full"


def check_tensors(tensors: dict[str, Tensor], specs: dict[str, TensorSpec]) -> None:
    """Check names, shapes, kinds of number and values against what a file of this form must hold.

    Raises:
        ValueError: naming the first tensor that is wrong, and how.
    """
    if missing := [name for name in specs if name not in tensors]:
        raise ValueError(f"these tensors are missing: {', '.join(missing)}")
    if unknown := [name for name in tensors if name not in specs]:
        raise ValueError(f"these tensors belong to no adapter of these settings: {', '.join(unknown[:5])}")
    for name, spec in specs.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this model and configuration need {spec.shape}")
        if spec.below is None:
            check_floats(name, tensor)
        else:
            _check_indices(name, tensor, spec.below)
    if "topk_weights" in tensors:
        check_weights(tensors["topk_weights"])


def check_floats(name: str, tensor: Tensor) -> None:
    """Refuse anything but finite floating point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} holds {describe_dtype(tensor)}, not floating point numbers")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinite numbers")


def _check_indices(name: str, tensor: Tensor, below: int) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} holds {describe_dtype(tensor)}, not whole numbers")
    values = tensor.long()
    if values.numel() and (values.min() < 0 or values.max() >= below):
        raise ValueError(f"{name} has an index outside 0 to {below - 1}")
    ordered = values.sort(dim=-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise ValueError(f"{name} selects the same vector twice for one sub-vector")


def check_weights(weights: Tensor) -> None:
    """Each row is the first k - 1 of k weights that are at least 0 and sum to 1 (up to rounding)."""
    slack = 1e-2 if weights.dtype in (torch.float16, torch.bfloat16) else 1e-5
    values = weights.float()
    if values.numel() and (values.min() < -slack or values.sum(dim=-1).max() > 1 + slack):
        raise ValueError("topk_weights has a row that is no mixture: weights below 0, or a sum above 1")


def check_heads(heads: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Check the names, shapes and numbers of a file's heads against those of the model (see `head_tensors`).

    Raises:
        ValueError: naming what is missing, unknown or wrong.
    """
    if missing := [key for key in wanted if key not in heads]:
        raise ValueError(f"the model's {', '.join(missing)} are not in the file (modules_to_save)")
    if unknown := [key for key in heads if key not in wanted]:
        raise ValueError(f"tensors that belong to no layer of this model: {', '.join(unknown[:5])}")
    for key, tensor in heads.items():
        if tensor.shape != wanted[key].shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}; the model has {tuple(wanted[key].shape)}")
        if wanted[key].is_floating_point():
            check_floats(key, tensor)


def outputs_of(shape: LayerShape, config: AdapterConfig) -> slice:
    """As `vblora.targets.output_slice`, from the part's own width: all parts of a layer are equally wide."""
    parts, part = _parts(shape.name, config)
    if not parts:
        return slice(None)
    if part not in parts or len(parts) * shape.out_features > WIDEST:
        raise ValueError(f"{shape.name} is none of the {len(parts)} parts into which split_modules cuts its layer")
    start = parts.index(part) * shape.out_features
    return slice(start, start + shape.out_features)


def _parts(name: str, config: AdapterConfig) -> tuple[list[str], str]:
    """The parts of the layer that this target is in, none where it is a whole layer, and which one it is."""
    layer, _, part = name.rpartition(".")
    key = split_key(layer, config) if layer else None
    return ([], "") if key is None else ((config.split_modules or {})[key], part)
