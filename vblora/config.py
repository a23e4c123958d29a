"""What every method's settings have in common: where the adapter goes, and its rank.

Field names and meanings are PEFT's, so that a configuration file written there can be read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from vblora.bank import Factors, Layout, compose, selected_logits
from vblora.shapes import Count, LayerShape, count_vblora, float32, sub_vectors

FORMS = ("topk", "full")  # of a file: what one keeps and uses, or what one needs to go on training


class TensorSpec(NamedTuple):
    """What a tensor in a file must be: floating point numbers, or whole numbers from 0 to `below` - 1."""

    shape: tuple[int, ...]
    below: int | None = None


@dataclass(kw_only=True)
class AdapterConfig:
    """Settings shared by all methods; each method adds its own.

    Args:
        r: rank of the two factors of every adapted layer.
        target_modules: which layers: a list of names or name endings ("query" matches "...self.query"), a
            regular expression for the whole name, or "all-linear" (every linear layer but the output layer).
        exclude_modules: layers to leave out, as a list of names or endings, or a regular expression.
        modules_to_save: names or endings of modules that are trained and saved in full (a classification head).
        layers_to_transform: adapt only layers with these numbers; with `target_modules` as a list.
        layers_pattern: name of the list the numbers refer to ("layers", "h"), where a name has several numbers.
        split_modules: layers that are several in one, by name or ending, and what to call their parts: with
            {"c_attn": ["q", "k", "v"]} GPT-2's fused projection is adapted as three layers of a third of its output
            each, "...c_attn.q" and so on; `exclude_modules` takes those names too. PEFT has no such thing.
        target_parameters: experts, as a list of parameters' names or endings ("experts.down_proj"): each matrix in
            such a parameter of three dimensions is a target (`vblora.experts`). `target_modules` may be missing then,
            and `exclude_modules` and `layers_to_transform` say nothing of them.

    Raises:
        ValueError: a value that cannot work, naming the field.
    """

    method: ClassVar[str]
    known: ClassVar[dict[str, type[AdapterConfig]]] = {}
    kept_as_itself: ClassVar[bool] = True
    """Whether what is kept after training is of this method: see `kept`."""

    r: int = 4
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    split_modules: dict[str, list[str]] | None = None
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        lists = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "target_parameters")
        for name in lists:
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value))
        for name in ("modules_to_save", "target_parameters"):
            if getattr(self, name) is not None and not _is_list(getattr(self, name), str):
                raise ValueError(f"{name} takes a list of names, not {getattr(self, name)!r}")
        if not self.target_modules and not self.target_parameters:
            raise ValueError('target_modules is missing: give a list of names, a regular expression or "all-linear"')
        self._require_names("target_modules", "exclude_modules", "layers_pattern")
        numbers = self.layers_to_transform
        if numbers is not None and not _is_list(numbers if isinstance(numbers, list) else [numbers], int):
            raise ValueError(f"layers_to_transform must be a whole number or a list of them, not {numbers!r}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern does nothing without layers_to_transform")
        self._require_parts()
        self.require_positive("r")

    def __init_subclass__(cls) -> None:
        """A configuration with a `method` of its own is known by that name to files and command lines."""
        if "method" in cls.__dict__:
            AdapterConfig.known[cls.method] = cls

    # -- what a method says of itself, without a model ---------------------------------------------------------------

    def spec(self, shapes: Sequence[LayerShape], form: str) -> dict[str, TensorSpec]:
        """What a file of this form ("topk" or "full") holds: name, shape and kind of each tensor."""
        raise NotImplementedError

    def factors(self, shapes: Sequence[LayerShape], tensors: Mapping[str, Tensor]) -> list[Factors]:
        """A (r, in) and B transposed (r, out) of each layer, from the tensors of a file in its top-k form."""
        raise ValueError(f"the factors of {self.method} follow from the base model's weights: load it into its model")

    def count(self, shapes: Sequence[LayerShape]) -> Count:
        """What is stored, without the modules of `modules_to_save`: all numbers of a file, in float32."""
        return float32(sum(math.prod(spec.shape) for spec in self.spec(shapes, "topk").values()))

    def kept(self, form: str) -> AdapterConfig:
        """The settings that a file of this form is written with."""
        return self

    @property
    def dropout(self) -> float:
        """Dropout probability on the input of the factors."""
        return 0.0

    def require_positive(self, *names: str) -> None:
        """Refuse fields that are not whole numbers from 1 up."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 up, not {value!r}")

    def require_number(self, name: str, *, below: float = 2.0**63) -> None:
        """Refuse a field that is no number from 0 up to, and without, `below`."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < below:
            limit = "" if below == 2.0**63 else f" and below {below:g}"
            raise ValueError(f"{name} must be a number of at least 0{limit}, not {value!r}")

    def require_probability(self, name: str) -> None:
        """Refuse a field that is no dropout probability."""
        self.require_number(name, below=1)

    def _require_names(self, *names: str) -> None:
        """Refuse fields that are neither a list of names nor a regular expression."""
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str) and not _is_list(value, str):
                raise ValueError(f"{name} must be a list of names or a regular expression, not {value!r}")
            for pattern in [value] if isinstance(value, str) else value if name == "layers_pattern" else []:
                from vblora.patterns import compiled  # few settings have one

                compiled(pattern, name)

    def _require_parts(self) -> None:
        """Refuse split_modules that are no names with at least two names of parts each."""
        if self.split_modules is None:
            return
        if not isinstance(self.split_modules, dict):
            raise ValueError(f"split_modules takes a dictionary of names and their parts, not {self.split_modules!r}")
        for name, parts in self.split_modules.items():
            good = _is_list(parts, str) and len(parts) > 1 and len(set(parts)) == len(parts)
            if not isinstance(name, str) or not good or any(not part or "." in part for part in parts):
                raise ValueError(f"split_modules: {name!r} needs a list of two or more different names, not {parts!r}")

    def to_dict(self) -> dict[str, Any]:
        """By the fields' names; target_parameters that are missing are not mentioned: older versions read it too."""
        return {name: value for name, value in asdict(self).items() if value or name != "target_parameters"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterConfig:
        """The configuration a dictionary holds; an unknown key is refused by name."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"unknown key for {cls.__name__}: {', '.join(unknown)} (known: {', '.join(sorted(known))})"
            )
        return cls(**values)


@dataclass(kw_only=True)
class VBLoRAConfig(AdapterConfig):
    """Settings of VB-LoRA (arXiv 2405.15179), under PEFT's field names (see also `AdapterConfig`).

    With the bank's vectors v_j (b) and a sub-vector's logits z (h), the sub-vector is the sum over the k largest z_j of
    softmax(z)_j v_j, taken over these k. A (r, in) and B transposed (r, out) are rows of such sub-vectors.

    Args:
        num_vectors: h, the number of vectors in the bank.
        vector_length: b, the length of a sub-vector. It need not divide the layers' widths.
        topk: k, the vectors mixed into a sub-vector.
        vblora_dropout: dropout probability on the factors' input.
        init_vector_bank_bound: the bank starts uniform in [-bound, bound].
        init_logits_std: the logits start normal with this standard deviation. PEFT's default is 0.1; the
            authors' GLUE code, and this project's GLUE scripts, use 0.01.
        init_vectors_of_a: 0, as in the paper: every factor starts as a mixture of any vectors. n: the first n vectors
            start as drawn and every A is made of them, the others start at zero and every B is made of them, so that
            the update starts at zero as LoRA's does (docs/recipe.md). It says where training starts and no more: what
            is kept is read without it, and a sub-vector may come to select any vector.
        init_by_kind: every kind of layer (the name without its numbers: query, key, ...) starts on vectors of its own,
            as many as its share of the sub-vectors. It, too, says where training starts and no more.
    """

    method: ClassVar[str] = "vblora"

    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    init_vectors_of_a: int = 0
    init_by_kind: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_vectors", "vector_length", "topk")
        self.require_probability("vblora_dropout")
        if self.topk > self.num_vectors:
            raise ValueError(f"topk {self.topk} is more than the {self.num_vectors} vectors of the bank")
        for name in ("init_vector_bank_bound", "init_logits_std"):
            self.require_number(name)
        if type(self.init_by_kind) is not bool:
            raise ValueError(f"init_by_kind must be True or False, not {self.init_by_kind!r}")
        if type(self.init_vectors_of_a) is not int or self.init_vectors_of_a < 0:
            raise ValueError(f"init_vectors_of_a must be a whole number from 0 up, not {self.init_vectors_of_a!r}")
        if self.init_vectors_of_a and not self.topk <= self.init_vectors_of_a <= self.num_vectors - self.topk:
            raise ValueError(
                f"init_vectors_of_a {self.init_vectors_of_a} leaves A or B fewer than topk {self.topk} of the "
                f"{self.num_vectors} vectors: give 0, or {self.topk} to {self.num_vectors - self.topk}"
            )
        if not self.init_logits_std and (self.init_vectors_of_a or self.init_by_kind):
            raise ValueError("init_logits_std 0 lets all sub-vectors start on the same vectors: give a number above 0")

    def to_dict(self) -> dict[str, Any]:
        """As everywhere; a start that is not divided is not mentioned, so that older versions read it too."""
        values = super().to_dict()
        return {n: value for n, value in values.items() if value or n not in ("init_vectors_of_a", "init_by_kind")}

    @property
    def dropout(self) -> float:
        return self.vblora_dropout

    def spec(self, shapes: Sequence[LayerShape], form: str) -> dict[str, TensorSpec]:
        n = sub_vectors(shapes, self.r, self.vector_length)
        h, b, k = self.num_vectors, self.vector_length, self.topk
        bank = {"vector_bank": TensorSpec((h, b))}
        if form == "full":
            return {**bank, "logits": TensorSpec((n, h))}
        return {**bank, "topk_indices": TensorSpec((n, k), below=h), "topk_weights": TensorSpec((n, k - 1))}

    def count(self, shapes: Sequence[LayerShape]) -> Count:
        return count_vblora(
            shapes, r=self.r, num_vectors=self.num_vectors, vector_length=self.vector_length, topk=self.topk
        )

    def factors(self, shapes: Sequence[LayerShape], tensors: Mapping[str, Tensor]) -> list[Factors]:
        selected = selected_logits(tensors["topk_weights"])
        table = compose(tensors["vector_bank"].float(), tensors["topk_indices"].long(), selected)
        return Layout(shapes, self.r, self.vector_length).factors(table)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
