"""Regular expressions for layers: what Python's own say, in a time that no pattern makes long."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
from core_helpers import adapt, build

import vblora
from vblora.patterns import matches

NAME = "model.language_model.layers.11.self_attention.query_key_value"
ENDLESS = [
    r"(?:[a-z0-9_.]+)+!",
    r"(([a-z]|[a-z.0-9])+)+x",
    "(?:(?:a{1000}){1000}){1000}",
    "(?:(?:(?:(?:.?){50}){50}){50}){50}!",
    "(?:(?:.{0,1000}){1000}){1000}!",
    ".*" * 40 + "!",
    "(?:a|a|.)*!",
    "(?:l|l)?" * 60 + ".*!",
    "(.|..|...|....)*" * 50 + "!",
]
REFUSED = [
    "(?:" + "(?=.*)" * 200 + ".)*!",
    "(" * 3000 + ")" * 3000,
    "a" * 10_001,
    "a{99999999999}",
    "(",
    r"(a)\1",
    "(?a:x)",
    "(?<=a*)b",
]


def random_pattern(rng, depth):
    """Any kind of part that patterns have, in any order."""
    leaves = ["a", "b", "c", "_", "1", ".", r"\.", r"\d", r"\W", "[^a]", "[a-c]", r"[^.\d]", "^", "$", r"\b", r"\B"]
    if depth == 0:
        return rng.choice(leaves)
    inner = [random_pattern(rng, depth - 1) for _ in range(2)]
    return rng.choice(
        [
            "".join(inner),
            "".join(inner),
            f"(?:{inner[0]}|{inner[1]})",
            f"({inner[0]}){rng.choice(['*', '+', '?', '*?', '+?', '??', '{2}', '{1,3}', '{2,}'])}",
            f"(?{rng.choice('=!')}{inner[0]})",
            f"(?<{rng.choice('=!')}{rng.choice(['a', 'ab', '[abc]', r'.'])})",
            f"(?i:{inner[0]})",
        ]
    )


def test_they_match_what_pythons_own_do():
    rng, taken = random.Random(0), 0
    for _ in range(3000):
        pattern = random_pattern(rng, rng.randrange(1, 5))
        name = "".join(rng.choice("abcAB._1é") for _ in range(rng.randrange(1, 9)))
        expected = re.compile(pattern).fullmatch(name) is not None
        assert matches(pattern, name) == expected, (pattern, name)
        taken += expected
    assert taken > 50


@pytest.mark.parametrize("pattern", ENDLESS, ids=range(len(ENDLESS)))
def test_no_pattern_takes_long(pattern):
    began = time.perf_counter()
    assert not matches(pattern, NAME)
    assert time.perf_counter() - began < 5  # Python's own: years


@pytest.mark.parametrize("pattern", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_matched_so_is_refused(pattern):
    with pytest.raises(ValueError, match="regular expression"):
        matches(pattern, NAME)


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_directory_with_an_endless_pattern_is_refused(setting, format, tmp_path):
    adapt(build("bert"), kind="bert").save(tmp_path, format=format)
    for name, values in {
        "adapter_model.safetensors": None,
        "adapter_config.json": {setting: [ENDLESS[0]] if setting == "layers_pattern" else ENDLESS[0]},
    }.items():
        path = tmp_path / name
        if values is None:  # without its own settings, as files of version 0.1
            tensors, _ = vblora.io.read_tensors(path)
            vblora.io.write_tensors(path, tensors, {})
            continue
        settings = json.loads(path.read_text(encoding="utf-8")) | values
        if setting == "layers_pattern":
            settings |= {"layers_to_transform": [0, 1]}
        path.write_text(json.dumps(settings), encoding="utf-8")
    if setting == "exclude_modules":  # it excludes nothing
        vblora.load(build("bert"), tmp_path)
    else:
        with pytest.raises(ValueError, match="match no layer"):
            vblora.load(build("bert"), tmp_path)


def test_the_first_number_after_the_pattern_counts():
    model = build("bert", layers=3)
    settings = {"layers_to_transform": [1], "target_modules": ["query"], "vector_length": 16}
    for pattern in (None, "layer", "encoder.layer", ["none", "l.*r"], ".*"):
        adapter = vblora.attach(model, vblora.VBLoRAConfig(**settings, layers_pattern=pattern), seed=0)
        assert list(adapter.targets) == ["bert.encoder.layer.1.attention.self.query"]
        adapter.detach()
    with pytest.raises(ValueError, match="match no layer"):
        vblora.attach(model, vblora.VBLoRAConfig(**settings, layers_pattern="bert"), seed=0)
