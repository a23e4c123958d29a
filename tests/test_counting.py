"""The counting rules and the paper's "# params" column, against figures worked out apart and real models."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import cache

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from vblora import counts
from vblora.shapes import LayerShape, sub_vectors
from vblora_experiments.paper_counts import (
    METHOD_NAMES,
    MODELS,
    ROWS,
    TABLE_TITLES,
    compare,
    select_rows,
    ways_to_print,
)

BLOCK = [LayerShape("model.layers.0.up", 12, 20), LayerShape("model.layers.1.up", 12, 20)]

# --- The rules --------------------------------------------------------------------------------------


def test_kind_replaces_whole_numbers_only():
    assert (
        LayerShape("roberta.encoder.layer.11.attention.self.query", 8, 8).kind
        == "roberta.encoder.layer.*.attention.self.query"
    )
    assert LayerShape("block.3.fc1", 8, 8).kind == "block.*.fc1"


@pytest.mark.parametrize(
    ("vector_length", "expected"),
    [(4, 2 * 3 * (3 + 5)), (8, 2 * 3 * (2 + 3)), (5, 2 * 3 * (3 + 4)), (64, 2 * 3 * 2)],
)
def test_sub_vectors_where_the_length_divides_and_where_it_does_not(vector_length, expected):
    assert sub_vectors(BLOCK, r=3, vector_length=vector_length) == expected


@pytest.mark.parametrize("topk", [1, 2, 3, 6])
def test_vblora_for_any_topk(topk):
    selections = 2 * 3 * (3 + 5)
    count = counts.count_vblora(BLOCK, r=3, num_vectors=300, vector_length=4, topk=topk)
    weights = 300 * 4 + selections * (topk - 1)
    assert count.parameters == weights + selections * topk / 4
    assert count.with_index_bytes == weights + selections * topk / 2
    assert count.authors_code == weights + selections * topk
    assert count.bytes == 4 * weights + 2 * selections * topk


def test_a_part_of_a_parameter_counts_as_one():
    # One layer of one sub-vector each way and topk 1: two one-byte indices, half a float32.
    count = counts.count_vblora([LayerShape("up", 4, 4)], r=1, num_vectors=8, vector_length=4, topk=1)
    assert count.parameters == 8 * 4 + 1
    assert count.bytes == 8 * 4 * 4 + 2


@pytest.mark.parametrize(
    ("num_vectors", "smallest", "peft"),
    [(1, 1, 1), (255, 1, 1), (256, 1, 2), (257, 2, 2), (2**15 - 1, 2, 2), (2**15, 2, 4), (2**16 + 1, 4, 4)],
)
def test_bytes_of_an_index(num_vectors, smallest, peft):
    assert counts.index_bytes(num_vectors) == smallest
    assert counts.peft_index_bytes(num_vectors) == peft


@pytest.mark.parametrize(("num_vectors", "topk"), [(255, 2), (256, 2), (300, 3), (40, 1)])
def test_bytes_are_those_of_the_tensors_peft_saves(num_vectors, topk):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 8))
    config = peft.VBLoRAConfig(
        r=2,
        num_vectors=num_vectors,
        vector_length=8,
        topk=topk,
        target_modules=["0", "1"],
        save_only_topk_weights=True,
    )
    adapted = peft.get_peft_model(model, config)
    saved = peft.get_peft_model_state_dict(adapted)
    shapes = [LayerShape("0", 16, 32), LayerShape("1", 32, 8)]
    count = counts.count_vblora(shapes, r=2, num_vectors=num_vectors, vector_length=8, topk=topk)
    assert count.bytes == sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    assert count.bytes // 4 == adapted.base_model.get_nb_savable_parameters()[0]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", 2 * 3 * (12 + 20)),
        ("vera", 2 * (3 + 20)),
        ("tied_lora", 3 * (12 + 20) + 2 * (3 + 20)),
        ("lora_xs", 2 * 3 * 3),
    ],
)
def test_baselines_on_two_small_layers(method, expected):
    assert counts.METHODS[method](BLOCK, r=3) == (expected, expected, expected, 4 * expected)


def test_tied_lora_ties_by_kind():
    query, key = LayerShape("layers.0.query", 8, 8), LayerShape("layers.0.key", 8, 8)
    apart = counts.count_tied_lora([query, key], r=2).parameters
    tied = counts.count_tied_lora([query, query._replace(name="layers.1.query")], r=2).parameters
    assert apart - tied == 2 * (8 + 8)


def test_tied_lora_refuses_one_kind_of_two_shapes():
    with pytest.raises(ValueError, match=r"layers\.0\.up \(8 -> 8\) to layers\.1\.up \(8 -> 12\)"):
        counts.count_tied_lora([LayerShape("layers.0.up", 8, 8), LayerShape("layers.1.up", 8, 12)], r=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a positive whole number, not 0"),
        ({"vector_length": -4}, "vector_length must be a positive whole number, not -4"),
        ({"num_vectors": 0}, "num_vectors must be"),
        ({"topk": 0}, "topk must be"),
        ({"topk": 9}, r"topk \(9\) is larger than num_vectors \(8\)"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        counts.count_vblora(BLOCK, **{"r": 2, "num_vectors": 8, "vector_length": 4, **settings})


# --- The model shapes, against transformers ---------------------------------------------------------


def real_model(name: str) -> torch.nn.Module:
    """The transformers model on the meta device, from its published configuration."""
    llama2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
    build = {
        "RoBERTa-base": lambda: transformers.RobertaModel(roberta_config(12, 768, 12)),
        "RoBERTa-large": lambda: transformers.RobertaModel(roberta_config(24, 1024, 16)),
        "GPT-2-Medium": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
        ),
        "GPT-2-Large": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20)
        ),
        "Llama2-7B": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=32,
                **llama2,
            )
        ),
        "Llama2-13B": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=5120,
                intermediate_size=13824,
                num_hidden_layers=40,
                num_attention_heads=40,
                num_key_value_heads=40,
                **llama2,
            )
        ),
        "Mistral-7B": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        ),
        "Gemma-7B": lambda: transformers.GemmaForCausalLM(
            transformers.GemmaConfig(
                vocab_size=256000,
                hidden_size=3072,
                intermediate_size=24576,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=16,
                head_dim=256,
            )
        ),
    }
    with torch.device("meta"):
        return build[name]()


def roberta_config(layers: int, hidden: int, heads: int) -> transformers.RobertaConfig:
    return transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=514,
        type_vocab_size=1,
    )


@cache
def real_layers(name: str) -> tuple[tuple[LayerShape, ...], int]:
    """Every linear layer of the real model but its output layer and pooler; and all its parameters."""
    model = real_model(name)
    prefix = "roberta." if name.startswith("RoBERTa") else ""
    layers = []
    for module_name, module in model.named_modules():
        if module_name in ("lm_head", "pooler.dense"):
            continue
        if isinstance(module, torch.nn.Linear):
            layers.append(LayerShape(prefix + module_name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            layers.append(LayerShape(prefix + module_name, *module.weight.shape))
    return tuple(layers), sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_are_those_of_the_real_model(name):
    assert sorted(MODELS[name].shapes("all")) == sorted(real_layers(name)[0])


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_model(name):
    assert MODELS[name].parameters == real_layers(name)[1]


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("GPT-2")])
def test_query_and_value_are_those_of_the_real_model(name):
    names = ("query", "value", "q_proj", "v_proj")
    real = [shape for shape in real_layers(name)[0] if shape.name.endswith(names)]
    assert len(real) == 2 * MODELS[name].layers
    assert sorted(MODELS[name].shapes("qv")) == sorted(real)


@pytest.mark.parametrize("name", ["GPT-2-Medium", "GPT-2-Large"])
def test_q_k_v_apart_make_up_c_attn(name):
    whole = {shape.name: shape for shape in MODELS[name].shapes("all")}
    width: dict[str, int] = {}
    for shape in MODELS[name].shapes("all, qkv apart"):
        layer = shape.name if shape.name in whole else shape.name.rpartition(".")[0]
        assert shape.in_features == whole[layer].in_features
        width[layer] = width.get(layer, 0) + shape.out_features
    assert width == {layer: shape.out_features for layer, shape in whole.items()}
    assert {shape.name[-8:] for shape in MODELS[name].shapes("qv")} == {"c_attn.q", "c_attn.v"}


def test_unknown_targets():
    with pytest.raises(ValueError, match="unknown targets 'kv': known are 'qv', 'all', 'all, qkv apart'"):
        MODELS["Llama2-7B"].shapes("kv")


# --- The printed column -----------------------------------------------------------------------------


def row(model, method, targets="", **settings):
    """The one row of the table with this model, method, targets and (some) settings."""
    (found,) = [
        row
        for row in select_rows(model=model, method=method)
        if row.targets == targets and settings.items() <= row.settings.items()
    ]
    return found


VBLORA_FIGURES = [
    # model, targets, settings, sub-vectors, one byte, sized, three each
    ("RoBERTa-base", "qv", {}, 576, 23_904, 23_904, 24_768),
    ("RoBERTa-base", "all", {}, 2_592, 26_928, 26_928, 30_816),
    ("RoBERTa-large", "qv", {}, 1_536, 25_344, 25_344, 27_648),
    ("RoBERTa-large", "all", {}, 6_912, 33_408, 33_408, 43_776),
    ("GPT-2-Medium", "all", {}, 6_144, 74_752, 74_752, 83_968),
    ("GPT-2-Medium", "all, qkv apart", {}, 6_912, 75_904, 75_904, 86_272),
    ("GPT-2-Large", "all", {}, 11_520, 106_880, 112_640, 124_160),
    ("GPT-2-Large", "all, qkv apart", {}, 12_960, 109_040, 115_520, 128_480),
    ("Llama2-7B", "all", {}, 39_040, 582_848, 602_368, 641_408),
    ("Llama2-13B", "all", {"r": 6, "num_vectors": 2048}, 91_680, 661_808, 707_648, 799_328),
    ("Llama2-13B", "all", {"r": 4, "num_vectors": 4096}, 61_120, 1_140_256, 1_170_816, 1_231_936),
    ("Mistral-7B", "all", {}, 40_960, 585_728, 606_208, 647_168),
    ("Gemma-7B", "all", {}, 48_832, 597_536, 621_952, 670_784),
]


@pytest.mark.parametrize(("model", "targets", "settings", "selections", "byte", "sized", "whole"), VBLORA_FIGURES)
def test_vblora_counts(model, targets, settings, selections, byte, sized, whole):
    found = row(model, "vblora", targets, **settings)
    shapes = MODELS[model].shapes(targets)
    assert sub_vectors(shapes, found.settings["r"], found.settings["vector_length"]) == selections
    assert found.counts()[:3] == (byte, sized, whole)


def test_every_vblora_row_is_checked():
    assert len(VBLORA_FIGURES) == len(select_rows(method="vblora"))


@pytest.mark.parametrize(
    ("model", "method", "targets", "settings", "expected"),
    [
        ("RoBERTa-base", "lora", "qv", {"r": 8}, 294_912),
        ("RoBERTa-large", "lora", "qv", {"r": 8}, 786_432),
        ("Llama2-7B", "lora", "all", {"r": 64}, 159_907_840),
        ("Llama2-13B", "lora", "all", {"r": 64}, 250_347_520),
        ("Mistral-7B", "lora", "all", {"r": 64}, 167_772_160),
        ("Gemma-7B", "lora", "all", {"r": 64}, 200_015_872),
        ("Mistral-7B", "lora_xs", "all", {"r": 64}, 917_504),
        ("Gemma-7B", "lora_xs", "all", {"r": 64}, 802_816),
        ("RoBERTa-base", "vera", "qv", {"r": 1024}, 43_008),
        ("RoBERTa-base", "vera", "all", {"r": 1024}, 156_672),
        ("RoBERTa-large", "vera", "qv", {"r": 256}, 61_440),
        ("RoBERTa-large", "vera", "all", {"r": 256}, 258_048),
        ("GPT-2-Medium", "vera", "qv", {"r": 1024}, 98_304),
        ("GPT-2-Large", "vera", "qv", {"r": 1024}, 165_888),
        ("Llama2-7B", "vera", "all", {"r": 1024}, 1_589_248),
        ("Llama2-13B", "vera", "all", {"r": 1024}, 2_416_640),
        ("RoBERTa-base", "tied_lora", "qv", {"r": 8}, 43_200),
        ("RoBERTa-large", "tied_lora", "qv", {"r": 4}, 65_728),
        ("RoBERTa-large", "tied_lora", "all", {"r": 1}, 239_760),
    ],
)
def test_baseline_counts_agree_with_the_printed_figure(model, method, targets, settings, expected):
    comparison = compare(row(model, method, targets, **settings))
    assert comparison.counts.parameters == expected
    assert comparison.reproduced_by


def test_no_whole_rank_of_tied_lora_gives_the_printed_base_all():
    printed = row("RoBERTa-base", "tied_lora", "all").printed
    shapes = MODELS["RoBERTa-base"].shapes("all")
    by_rank = {r: counts.count_tied_lora(shapes, r=r).parameters for r in range(1, 17)}
    assert not any(ways_to_print(count, printed) for count in by_rank.values())
    nearest = min(by_rank, key=lambda r: abs(by_rank[r] - 109_000))
    assert nearest == row("RoBERTa-base", "tied_lora", "all").settings["r"]


@pytest.mark.parametrize(
    ("count", "printed", "ways"),
    [
        (294_912, "0.295M", ("rounded",)),
        (23_904, "0.023M", ("truncated",)),
        (33_408, "0.033M", ("rounded", "truncated")),
        (25_344, "0.024M", ()),
        (124_500_000, "125M", ("rounded",)),
        (802_816, "0.80M", ("rounded", "truncated")),
    ],
)
def test_ways_to_print(count, printed, ways):
    assert ways_to_print(count, printed) == ways


def test_printed_figures_that_no_row_reproduces():
    """The disagreements, as the computation finds them, for a figure with two readings in neither."""
    reproduced = {(c.row.model, c.row.method, c.row.printed, c.row.targets[:3]) for c in map(compare, ROWS) if c[2]}
    every = {(row.model, row.method, row.printed, row.targets[:3]) for row in ROWS}
    assert every - reproduced == {
        ("RoBERTa-base", "tied_lora", "0.109M", "all"),
        ("RoBERTa-large", "vblora", "0.024M", "qv"),
        ("GPT-2-Medium", "full", "354.92M", ""),
        ("GPT-2-Medium", "lora", "0.35M", "qv"),
        ("GPT-2-Large", "lora", "0.77M", "qv"),
        ("Llama2-7B", "vblora", "0.8M", "all"),
    }


@pytest.mark.parametrize(
    ("model", "targets", "settings", "rules"),
    [
        ("RoBERTa-base", "qv", {}, {"parameters", "with_index_bytes"}),
        ("RoBERTa-base", "all", {}, {"parameters", "with_index_bytes"}),
        ("RoBERTa-large", "all", {}, {"parameters", "with_index_bytes"}),
        ("GPT-2-Medium", "all", {}, set()),
        ("GPT-2-Medium", "all, qkv apart", {}, {"parameters", "with_index_bytes"}),
        ("GPT-2-Large", "all", {}, set()),
        ("GPT-2-Large", "all, qkv apart", {}, {"authors_code"}),
        ("Llama2-13B", "all", {"r": 6}, set()),
        ("Llama2-13B", "all", {"r": 4}, {"parameters", "with_index_bytes"}),
        ("Mistral-7B", "all", {}, {"authors_code"}),
        ("Gemma-7B", "all", {}, {"authors_code"}),
    ],
)
def test_rules_that_reproduce_a_vblora_figure(model, targets, settings, rules):
    assert set(compare(row(model, "vblora", targets, **settings)).reproduced_by) == rules


@pytest.mark.parametrize(
    ("model", "method", "targets", "settings", "verdict"),
    [
        ("RoBERTa-base", "vblora", "qv", {}, "byte/sized, truncated"),
        ("Llama2-13B", "vblora", "all", {"r": 4}, "byte, both; sized, truncated"),
        ("Llama2-13B", "vblora", "all", {"r": 6}, "none"),
        ("RoBERTa-base", "vera", "qv", {}, "both"),
    ],
)
def test_verdict_in_words(model, method, targets, settings, verdict):
    assert compare(row(model, method, targets, **settings)).verdict == verdict


def test_every_row_names_known_things():
    for found in ROWS:
        assert found.table in TABLE_TITLES
        assert found.model in MODELS
        assert found.method in METHOD_NAMES
        assert math.isfinite(float(found.printed.removesuffix("M")))


def test_counting_needs_no_torch():
    code = "import sys; from vblora.cli import main; assert main(['count']) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
