"""Which layers an adapter goes to, against what PEFT picks; and settings that cannot work."""

from __future__ import annotations

import math

import peft
import pytest
from core_helpers import assert_unchanged, build, snapshot
from peft.tuners.vblora.layer import VBLoRALayer

import vblora
from vblora.targets import find_saved, find_targets

CASES = [
    ("bert", {"target_modules": ["query", "value"]}),
    ("bert", {"target_modules": ["dense"]}),
    ("bert", {"target_modules": ["output.dense"]}),
    ("bert", {"target_modules": r".*attention\.self\.(query|key)"}),
    ("bert", {"target_modules": r"bert\.encoder\.layer\.1\..*dense"}),
    ("bert", {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense", "output.dense"]}),
    ("bert", {"target_modules": ["query"], "exclude_modules": r".*layer\.0\..*"}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": 1}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": [0, 2]}),
    ("bert", {"target_modules": ["query", "pooler.dense"], "layers_to_transform": [2], "layers_pattern": "layer"}),
    ("bert", {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": ["h", "layer"]}),
    ("bert", {"target_modules": ["bert.encoder.layer.0.attention.self.query"], "layers_to_transform": [2]}),
    ("bert", {"target_modules": ["dense", "classifier"], "modules_to_save": ["classifier"]}),
    ("bert", {"target_modules": ["dense"], "modules_to_save": ["classifier", "pooler"]}),
    ("bert", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear", "exclude_modules": ["key"]}),
    ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    ("gpt2", {"target_modules": ["c_attn"]}),
    ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"]}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0, 2], "layers_pattern": "h"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": r".*\.(up|down)_proj"}),
    ("llama", {"target_modules": ["lm_head"]}),
    ("llama", {"target_modules": "all-linear"}),
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_the_same_layers_as_peft(kind, settings):
    ours = set(find_targets(build(kind, layers=3), vblora.VBLoRAConfig(**settings)))
    # PEFT leaves a classifier out of "all-linear" only if it is told the task, and then saves it.
    task = {"task_type": "SEQ_CLS"} if kind == "bert" and settings["target_modules"] == "all-linear" else {}
    config = peft.VBLoRAConfig(vector_length=2, num_vectors=8, **task, **settings)
    wrapped = peft.get_peft_model(build(kind, layers=3), config)
    theirs = {
        name.removeprefix("base_model.model.") for name, m in wrapped.named_modules() if isinstance(m, VBLoRALayer)
    }
    assert ours == theirs
    assert ours


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_all_linear_leaves_the_output_layer_out(kind):
    targets = find_targets(build(kind), vblora.VBLoRAConfig(target_modules="all-linear"))
    assert targets
    assert not {"lm_head", "classifier"} & set(targets)


def test_a_second_adapter_finds_the_same_layers():
    model = build("bert")
    config = vblora.VBLoRAConfig(target_modules="all-linear", vector_length=4)
    first = vblora.attach(model, config, name="first")
    second = vblora.attach(model, config, name="second")
    assert list(first.targets) == list(second.targets)


def test_saved_modules_are_the_outermost_matches():
    model = build("bert")
    config = vblora.VBLoRAConfig(target_modules=["query"], modules_to_save=["pooler", "dense", "score"])
    saved = find_saved(model, config)
    assert "bert.pooler" in saved and "bert.pooler.dense" not in saved
    assert "bert.encoder.layer.0.output.dense" in saved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["nowhere"]}, "match no layer of BertForSequenceClassification.*dense.*query"),
        ({"target_modules": "query"}, "match no layer"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, "match no layer"),
        ({"target_modules": ["query"], "layers_to_transform": [7]}, "match no layer"),
        ({"target_modules": ["query", "word_embeddings"]}, "bert.embeddings.word_embeddings is a Embedding"),
        ({"target_modules": ".*attention.*"}, "is a BertAttention"),
        ({"target_modules": ["query"], "modules_to_save": ["head"]}, r"\['head'\] name no module.*classifier"),
    ],
    ids=str,
)
def test_what_matches_nothing_or_no_linear_layer_is_refused_and_the_model_unchanged(settings, message):
    model = build("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        vblora.attach(model, vblora.VBLoRAConfig(**settings))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk": 9, "num_vectors": 8}, "topk 9 is more than the 8"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": 2.0}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": "4"}, "r must be a whole number"),
        ({"num_vectors": -1}, "num_vectors must be"),
        ({"vector_length": 0}, "vector_length must be"),
        ({"topk": 0}, "topk must be"),
        ({"vblora_dropout": 1}, "vblora_dropout must be"),
        ({"vblora_dropout": -0.1}, "vblora_dropout must be"),
        ({"vblora_dropout": math.nan}, "vblora_dropout must be"),
        ({"vblora_dropout": "much"}, "vblora_dropout must be"),
        ({"init_logits_std": -1.0}, "init_logits_std must"),
        ({"init_logits_std": math.nan}, "init_logits_std must"),
        ({"init_vector_bank_bound": math.inf}, "init_vector_bank_bound must"),
        ({"init_vector_bank_bound": "wide"}, "init_vector_bank_bound must"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": []}, "target_modules is missing"),
        ({"target_modules": 5}, "target_modules must be"),
        ({"target_modules": [1, 2]}, "target_modules must be"),
        ({"target_modules": {"query": 1}}, "target_modules must be"),
        ({"target_modules": "(query"}, "target_modules.*regular expression"),
        ({"exclude_modules": "(query"}, "exclude_modules.*regular expression"),
        ({"exclude_modules": 5}, "exclude_modules must be"),
        ({"modules_to_save": "classifier"}, "modules_to_save takes a list"),
        ({"modules_to_save": [3]}, "modules_to_save takes a list"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be"),
        ({"layers_to_transform": [1.5]}, "layers_to_transform must be"),
        ({"layers_to_transform": 1, "target_modules": ".*query"}, "layers_to_transform needs"),
        ({"layers_pattern": "layer"}, "layers_pattern does nothing"),
        ({"layers_pattern": "(layer", "layers_to_transform": 1}, "layers_pattern.*regular expression"),
        ({"layers_pattern": ["h", "(layer"], "layers_to_transform": 1}, "layers_pattern.*regular expression"),
        ({"layers_pattern": 3, "layers_to_transform": 1}, "layers_pattern must be"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        vblora.VBLoRAConfig(**{"target_modules": ["query"], **settings})


@pytest.mark.parametrize("config_class", [vblora.TiedLoRAConfig, vblora.LoRAXSConfig])
@pytest.mark.parametrize("settings", [{"r": 0}, {"lora_dropout": 1.0}, {"lora_alpha": "x"}, {"lora_alpha": math.nan}])
def test_bad_settings_of_the_other_methods_are_refused_by_name(config_class, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        config_class(target_modules=["query"], **settings)


def test_an_unknown_key_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown key for VBLoRAConfig: rank \(known: .*vector_length"):
        vblora.VBLoRAConfig.from_dict({"target_modules": ["query"], "rank": 4})


@pytest.mark.parametrize("config_class", [vblora.VBLoRAConfig, vblora.TiedLoRAConfig, vblora.LoRAXSConfig])
def test_a_configuration_survives_the_way_through_a_dictionary(config_class):
    config = config_class(r=3, target_modules={"b", "a"}, layers_to_transform=(2, 1), layers_pattern=["h"])
    assert config.target_modules == ["a", "b"] and config.layers_to_transform == [1, 2]
    assert config_class.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_name_that_matches_nothing_beside_others_is_warned_of(field):
    names = {"target_modules": ["query", "value"]}
    names[field] = ["query", "vaule"] if field == "target_modules" else ["vaule"]
    with pytest.warns(UserWarning, match=f"{field}: no module is called vaule"):
        vblora.attach(build("bert"), vblora.VBLoRAConfig(r=4, num_vectors=8, vector_length=16, **names))
