"""The "# params" column of the paper's Tables 1 to 4, and what the layer shapes give beside it.

Three parts: the models as layer shapes, the printed column as one table of data, and the comparison that
says which counting rule, if any, reproduces each printed figure. Only the standard library is needed.

Source of the printed figures and hyper-parameters: arXiv 2405.15179v3, Tables 1 to 4 and 7 to 9. The ranks
of the baselines are those with which the counts agree; where none does, a note says which is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import NamedTuple

from vblora.counts import METHODS, count_full
from vblora.shapes import Count, LayerShape

# --- The models -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A pre-trained model, as the numbers its layer shapes follow from."""

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    query_width: int
    """Heads times the size of a head: the output of q and the input of o. Not `hidden` in Gemma-7B."""
    kv_width: int
    """Key-value heads times the size of a head: the output of k and of v. Small in Mistral-7B."""
    positions: int = 0
    """Learned position embeddings; 0 where positions are rotary."""
    tied_output: bool = True
    """Whether the output layer is the input embedding (or, for RoBERTa, is not part of the model)."""

    def shapes(self, targets: str) -> list[LayerShape]:
        """The layers that `targets` adapts, named as in transformers, block after block.

        "qv": query and value. "all": every linear layer but the output layer; GPT-2's c_attn is one layer
        of width 3 x hidden. "all, qkv apart": the same with c_attn taken as three layers.
        """
        if targets not in TARGETS:
            raise ValueError(f"unknown targets {targets!r}: known are {', '.join(map(repr, TARGETS))}")
        block = {"roberta": self._roberta_block, "gpt2": self._gpt2_block, "llama": self._llama_block}
        return [
            LayerShape(name.format(layer), in_features, out_features)
            for layer in range(self.layers)
            for name, in_features, out_features in block[self.family](targets)
        ]

    def _roberta_block(self, targets: str) -> Iterator[tuple[str, int, int]]:
        prefix, hidden = "roberta.encoder.layer.{}.", self.hidden
        yield prefix + "attention.self.query", hidden, hidden
        if targets != "qv":
            yield prefix + "attention.self.key", hidden, hidden
        yield prefix + "attention.self.value", hidden, hidden
        if targets != "qv":
            yield prefix + "attention.output.dense", hidden, hidden
            yield prefix + "intermediate.dense", hidden, self.intermediate
            yield prefix + "output.dense", self.intermediate, hidden

    def _gpt2_block(self, targets: str) -> Iterator[tuple[str, int, int]]:
        prefix, hidden = "transformer.h.{}.", self.hidden
        if targets == "all":
            yield prefix + "attn.c_attn", hidden, 3 * hidden
        else:
            for part in "qv" if targets == "qv" else "qkv":
                yield prefix + f"attn.c_attn.{part}", hidden, hidden
        if targets != "qv":
            yield prefix + "attn.c_proj", hidden, hidden
            yield prefix + "mlp.c_fc", hidden, self.intermediate
            yield prefix + "mlp.c_proj", self.intermediate, hidden

    def _llama_block(self, targets: str) -> Iterator[tuple[str, int, int]]:
        prefix, hidden = "model.layers.{}.", self.hidden
        yield prefix + "self_attn.q_proj", hidden, self.query_width
        if targets != "qv":
            yield prefix + "self_attn.k_proj", hidden, self.kv_width
        yield prefix + "self_attn.v_proj", hidden, self.kv_width
        if targets != "qv":
            yield prefix + "self_attn.o_proj", self.query_width, hidden
            yield prefix + "mlp.gate_proj", hidden, self.intermediate
            yield prefix + "mlp.up_proj", hidden, self.intermediate
            yield prefix + "mlp.down_proj", self.intermediate, hidden

    @property
    def parameters(self) -> int:
        """All parameters of the model: embeddings, linear layers with their biases, norms, output layer.

        RoBERTa is counted with its pooler and without a task head.
        """
        linear = self.shapes("all")
        weights = sum(shape.in_features * shape.out_features for shape in linear)
        embeddings = (self.vocabulary + self.positions) * self.hidden
        output = 0 if self.tied_output else self.vocabulary * self.hidden
        if self.family == "llama":
            # RMSNorm has a weight alone; two in a block and one at the end. No layer has a bias.
            return embeddings + weights + (2 * self.layers + 1) * self.hidden + output
        # LayerNorm has a weight and a bias; two in a block and one more, after the embeddings or at the end.
        norms = (2 * self.layers + 1) * 2 * self.hidden
        biases = sum(shape.out_features for shape in linear)
        rest = 0
        if self.family == "roberta":
            token_types, pooler = self.hidden, self.hidden * (self.hidden + 1)
            rest = token_types + pooler
        return embeddings + weights + biases + norms + output + rest


TARGETS = ("qv", "all", "all, qkv apart")


def _roberta(name: str, layers: int, hidden: int) -> Model:
    return Model(name, "roberta", layers, hidden, 4 * hidden, 50265, hidden, hidden, positions=514)


def _gpt2(name: str, layers: int, hidden: int) -> Model:
    return Model(name, "gpt2", layers, hidden, 4 * hidden, 50257, hidden, hidden, positions=1024)


def _llama(
    name: str,
    layers: int,
    hidden: int,
    intermediate: int,
    *,
    heads: int,
    kv_heads: int,
    head_size: int = 128,
    vocabulary: int = 32000,
    tied_output: bool = False,
) -> Model:
    return Model(
        name,
        "llama",
        layers,
        hidden,
        intermediate,
        vocabulary,
        query_width=heads * head_size,
        kv_width=kv_heads * head_size,
        tied_output=tied_output,
    )


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _roberta("RoBERTa-base", 12, 768),
        _roberta("RoBERTa-large", 24, 1024),
        _gpt2("GPT-2-Medium", 24, 1024),
        _gpt2("GPT-2-Large", 36, 1280),
        _llama("Llama2-7B", 32, 4096, 11008, heads=32, kv_heads=32),
        _llama("Llama2-13B", 40, 5120, 13824, heads=40, kv_heads=40),
        _llama("Mistral-7B", 32, 4096, 14336, heads=32, kv_heads=8),
        _llama(
            "Gemma-7B",
            28,
            3072,
            24576,
            heads=16,
            kv_heads=16,
            head_size=256,
            vocabulary=256000,
            tied_output=True,
        ),
    )
}

# --- The printed column -----------------------------------------------------------------------------

TABLE_TITLES = {
    1: "GLUE",
    2: "E2E",
    3: "MT-Bench, instruction tuning",
    4: "GSM8K and MATH",
}

METHOD_NAMES = {
    "full": "full",
    "lora": "LoRA",
    "dora": "DoRA",  # in no table of the paper
    "vera": "VeRA",
    "tied_lora": "Tied-LoRA",
    "lora_xs": "LoRA-XS",
    "vblora": "VB-LoRA",
}


class Row(NamedTuple):
    """One printed figure and the settings it is computed with.

    A figure that can be read in two ways (two settings, or c_attn as one layer or three) has two rows.
    """

    table: int
    model: str
    method: str
    targets: str
    settings: Mapping[str, int]
    printed: str
    note: str = ""

    def counts(self) -> Count:
        """The counts of this row, computed from the model's layer shapes."""
        model = MODELS[self.model]
        if self.method == "full":
            return count_full(model.parameters)
        return METHODS[self.method](model.shapes(self.targets), **self.settings)


def _vb(r: int, num_vectors: int) -> dict[str, int]:
    return {"r": r, "num_vectors": num_vectors, "vector_length": 256, "topk": 2}


_LORA_GPT2_NOTE = "r 4 on q and v is the setting of LoRA's own paper."

ROWS: tuple[Row, ...] = (
    Row(1, "RoBERTa-base", "full", "", {}, "125M"),
    Row(1, "RoBERTa-base", "lora", "qv", {"r": 8}, "0.295M"),
    Row(1, "RoBERTa-base", "vera", "qv", {"r": 1024}, "0.043M"),
    Row(1, "RoBERTa-base", "tied_lora", "qv", {"r": 8}, "0.043M"),
    Row(1, "RoBERTa-base", "vblora", "qv", _vb(4, 90), "0.023M"),
    Row(1, "RoBERTa-base", "vera", "all", {"r": 1024}, "0.157M"),
    Row(
        1,
        "RoBERTa-base",
        "tied_lora",
        "all",
        {"r": 2},
        "0.109M",
        "r 2 is the whole rank that comes nearest.",
    ),
    Row(1, "RoBERTa-base", "vblora", "all", _vb(4, 90), "0.027M"),
    Row(1, "RoBERTa-large", "lora", "qv", {"r": 8}, "0.786M"),
    Row(1, "RoBERTa-large", "vera", "qv", {"r": 256}, "0.061M"),
    Row(1, "RoBERTa-large", "tied_lora", "qv", {"r": 4}, "0.066M"),
    Row(1, "RoBERTa-large", "vblora", "qv", _vb(4, 90), "0.024M"),
    Row(1, "RoBERTa-large", "vera", "all", {"r": 256}, "0.258M"),
    Row(1, "RoBERTa-large", "tied_lora", "all", {"r": 1}, "0.239M"),
    Row(1, "RoBERTa-large", "vblora", "all", _vb(4, 90), "0.033M"),
    Row(2, "GPT-2-Medium", "full", "", {}, "354.92M"),
    Row(2, "GPT-2-Medium", "lora", "qv", {"r": 4}, "0.35M", _LORA_GPT2_NOTE),
    Row(2, "GPT-2-Medium", "vera", "qv", {"r": 1024}, "0.098M"),
    Row(2, "GPT-2-Medium", "vblora", "all", _vb(4, 256), "0.076M"),
    Row(2, "GPT-2-Medium", "vblora", "all, qkv apart", _vb(4, 256), "0.076M"),
    Row(2, "GPT-2-Large", "full", "", {}, "774.03M"),
    Row(2, "GPT-2-Large", "lora", "qv", {"r": 4}, "0.77M", _LORA_GPT2_NOTE),
    Row(2, "GPT-2-Large", "vera", "qv", {"r": 1024}, "0.17M"),
    Row(2, "GPT-2-Large", "vblora", "all", _vb(4, 350), "0.13M"),
    Row(2, "GPT-2-Large", "vblora", "all, qkv apart", _vb(4, 350), "0.13M"),
    Row(3, "Llama2-7B", "lora", "all", {"r": 64}, "159.9M"),
    Row(3, "Llama2-7B", "vera", "all", {"r": 1024}, "1.6M"),
    Row(3, "Llama2-7B", "vblora", "all", _vb(4, 2048), "0.8M"),
    Row(3, "Llama2-13B", "lora", "all", {"r": 64}, "250.3M"),
    Row(3, "Llama2-13B", "vera", "all", {"r": 1024}, "2.4M"),
    Row(3, "Llama2-13B", "vblora", "all", _vb(6, 2048), "1.1M", "The settings of Table 9."),
    Row(
        3,
        "Llama2-13B",
        "vblora",
        "all",
        _vb(4, 4096),
        "1.1M",
        "The settings of the authors' public script, which are not those of Table 9.",
    ),
    Row(4, "Mistral-7B", "full", "", {}, "7242M"),
    Row(4, "Mistral-7B", "lora", "all", {"r": 64}, "168M"),
    Row(4, "Mistral-7B", "lora_xs", "all", {"r": 64}, "0.92M"),
    Row(4, "Mistral-7B", "vblora", "all", _vb(4, 2048), "0.65M"),
    Row(4, "Gemma-7B", "full", "", {}, "8538M"),
    Row(4, "Gemma-7B", "lora", "all", {"r": 64}, "200M"),
    Row(4, "Gemma-7B", "lora_xs", "all", {"r": 64}, "0.80M"),
    Row(4, "Gemma-7B", "vblora", "all", _vb(4, 2048), "0.67M"),
)

# --- The comparison ---------------------------------------------------------------------------------

RULES = {
    "parameters": "byte",
    "with_index_bytes": "sized",
    "authors_code": "float",
}
"""The counting rules, by their field of `Count`, with the short name used in the printed table."""


class Comparison(NamedTuple):
    """A row, its counts, and which of the rules reproduce the printed figure.

    `reproduced_by` maps the field of `Count` to the ways in which it becomes the printed figure:
    "rounded", "truncated", or both. It is empty where no rule gives the figure.
    """

    row: Row
    counts: Count
    reproduced_by: dict[str, tuple[str, ...]]

    @property
    def verdict(self) -> str:
        """`reproduced_by` in a few words: "byte/sized, truncated"; "both" is rounded and truncated alike."""
        if not self.reproduced_by:
            return "none"
        rules_by_ways: dict[tuple[str, ...], list[str]] = {}
        for rule, ways in self.reproduced_by.items():
            rules_by_ways.setdefault(ways, []).append(RULES[rule])
        # Where nothing is an index the rules are one and the same, and naming all three says nothing.
        one_rule = len(set(self.counts[:3])) == 1
        return "; ".join(
            _in_a_word(ways) if one_rule else f"{'/'.join(rules)}, {_in_a_word(ways)}"
            for ways, rules in rules_by_ways.items()
        )


def _in_a_word(ways: tuple[str, ...]) -> str:
    return ways[0] if len(ways) == 1 else "both"


def ways_to_print(count: int, printed: str) -> tuple[str, ...]:
    """How `count` becomes `printed`, a figure in millions such as "0.295M": "rounded", "truncated".

    The count is taken to as many digits as the printed figure has, once half up and once towards zero.
    """
    figure = Decimal(printed.removesuffix("M"))
    millions = Decimal(count) / 1_000_000
    ways = {"rounded": ROUND_HALF_UP, "truncated": ROUND_DOWN}
    return tuple(way for way, mode in ways.items() if millions.quantize(figure, rounding=mode) == figure)


def compare(row: Row) -> Comparison:
    """Count one row by every rule and hold each against the printed figure."""
    counts = row.counts()
    ways = {rule: ways_to_print(getattr(counts, rule), row.printed) for rule in RULES}
    return Comparison(row, counts, {rule: found for rule, found in ways.items() if found})


def select_rows(table: int | None = None, model: str | None = None, method: str | None = None) -> Sequence[Row]:
    """The rows of one table, model and method (keys of TABLE_TITLES, MODELS, METHOD_NAMES); None: any."""
    wanted = {"table": table, "model": model, "method": method}
    return [row for row in ROWS if all(value is None or getattr(row, name) == value for name, value in wanted.items())]
