"""What each method stores for Whisper's sizes, held against models that are built from a configuration."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from vblora import VBLoRAConfig
from vblora.cli import main
from vblora.switch import apply_method
from vblora.targets import find_targets, layer_shapes
from vblora_experiments.whisper_counts import SETTINGS, SIZES, TARGETS, parameters, shapes, stored

# The parameters that OpenAI's README prints, in millions.
LARGE = {"large": 1550, "large-v2": 1550, "large-v3": 1550, "large-v3-turbo": 809}
PRINTED = {"tiny": 39, "base": 74, "small": 244, "medium": 769, **LARGE}
METHODS = [(method, targets) for method in SETTINGS for targets in ("decoder", "cross")] + [("lora", "both")]


def build(name, device="meta"):
    size = SIZES[name]
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in of_a_side(size, side).items()}
    config = WhisperConfig(vocab_size=size.vocabulary, num_mel_bins=size.mels, d_model=size.width, **sides)
    with torch.device(device):
        return WhisperForConditionalGeneration(config)


def of_a_side(size, side):
    return {"layers": size.layers_of(side), "attention_heads": size.width // 64, "ffn_dim": 4 * size.width}


on_meta = cache(build)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_the_model_of_its_configuration(name):
    model = on_meta(name)
    assert parameters(name) == sum(p.numel() for p in model.parameters())
    for targets, pattern in TARGETS.items():
        config = VBLoRAConfig(target_modules=pattern)
        assert sorted(shapes(name, targets)) == sorted(layer_shapes(find_targets(model, config), config))
    plain = name.removeprefix("whisper-").removesuffix(".en")
    assert parameters(name) == pytest.approx(PRINTED[plain] * 1e6, rel=0.04)


@pytest.mark.parametrize(("method", "targets"), METHODS)
def test_a_count_is_what_the_adapted_model_stores(method, targets):
    settings = {**SETTINGS[method], "target_modules": TARGETS[targets]}
    if method == "vera":  # whose shared matrices can be drawn again
        settings["save_projection"] = False
    adapted = apply_method(build("whisper-tiny.en", "cpu"), method, settings)
    (one,) = stored(["whisper-tiny.en"], [targets], [method])
    own = adapted.adapter.stored_parameters()
    assert one.counts.parameters == own.parameters and one.counts.bytes == own.bytes


def run(capsys, *flags):
    assert main(["count", *flags]) == 0
    return capsys.readouterr().out


def test_lora_of_rank_64_on_the_decoder_of_large_v2(capsys):
    flags = ["--model", "openai/whisper-large-v2", "--method", "lora", "--targets", "decoder", "--rank", "64"]
    (one,) = json.loads(run(capsys, *flags, "--json"))
    assert one["counts"]["parameters"] == 68_157_440 and one["settings"] == {"r": 64}
    line = run(capsys, *flags).splitlines()[-1].split()
    assert line == ["whisper-large-v2", "LoRA", "decoder", "r", "64", "68,157,440", "273", "MB"]


def test_all_sizes_and_sets_of_layers(capsys):
    lines = run(capsys, "--model", "whisper").splitlines()
    assert len([line for line in lines if line.startswith("whisper-")]) == len(SIZES) * (
        1 + len(TARGETS) * len(SETTINGS)
    )
    (line,) = [line for line in lines if line.split()[:3] == ["whisper-large-v3", "VB-LoRA", "both"]]
    # 256 * 256 + 1.5 * 4 * sub-vectors of 256: 12 * 2 * 5 and 2 * (5 + 20) * 2 for 32 layers.
    assert line.split()[3:-3] == ["r", "4", "h", "256", "b", "256", "k", "2"]
    assert line.split()[-3] == f"{256 * 256 + 6 * 32 * (12 * 10 + 4 * 25):,}"
