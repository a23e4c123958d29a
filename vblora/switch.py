"""One switch over all methods, for training scripts: a name and its settings in, an adapted model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import nn

from vblora.adapter import Adapter, attach
from vblora.config import AdapterConfig
from vblora.counts import count_full
from vblora.io import read_json, read_tensors
from vblora.methods.through_peft import PeftAdapter, peft_config, peft_config_class, peft_config_from_dict
from vblora.recipes import Recipe, recipe
from vblora.shapes import Count

HEADS = ("classifier.", "score.")  # where transformers' models keep a task's head
RECIPE = "recipe"  # the key of settings that are to be chosen by `vblora.recipe`
OWN_METHODS = {config.method: config for config in Adapter.methods}


class AnyAdapter(Protocol):
    """What training scripts ask of an adapter, whichever method made it."""

    def save(self, directory: str, *, form: str = "topk") -> None: ...

    def start_from(self, directory: str) -> None: ...

    def stored_parameters(self) -> Count: ...

    def head_parameters(self) -> int: ...


class Adapted(NamedTuple):
    """The model to train (for PEFT's methods a wrapper around the one given) and its adapter."""

    model: nn.Module
    adapter: AnyAdapter
    recipe: Recipe | None = None
    """Where the settings come from, if they were asked for as `RECIPE`."""


class FullFineTuning:
    """No adapter: every parameter of the model is trained and stored."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def save(self, directory: str, *, form: str = "topk") -> None:
        self.model.save_pretrained(directory)  # type: ignore[operator]  # a transformers model

    def start_from(self, directory: str) -> None:
        """Take over a saved model's values where name and shape agree: all but the head of a task of other labels."""
        tensors, _ = read_tensors(Path(directory) / "model.safetensors")
        own = self.model.state_dict()
        head = {name for name in own if name not in tensors or own[name].shape != tensors[name].shape}
        if unknown := sorted(tensors.keys() - own.keys()):
            raise ValueError(f"{directory}: tensors that belong to no layer of this model: {', '.join(unknown[:5])}")
        if any(not name.startswith(HEADS) for name in head):
            raise ValueError(f"{directory}: another model; {', '.join(sorted(head)[:5])} do not fit")
        self.model.load_state_dict({name: t for name, t in tensors.items() if not name.startswith(HEADS)}, strict=False)

    def stored_parameters(self) -> Count:
        return count_full(sum(p.numel() for p in self.model.parameters()))

    def head_parameters(self) -> int:
        return 0  # counted with the rest


def apply_method(model: nn.Module, method: str, settings: dict[str, Any]) -> Adapted:
    """Make a model trainable by a method.

    Args:
        model: the base model; adapted in place.
        method: "full", "vblora", "tied_lora", "lora_xs", any method of PEFT by name ("lora", "vera", "dora",
            "olora", ...), or the path of a PEFT configuration as JSON.
        settings: the method's settings by their configuration's field names; they override a JSON file's.

    Raises:
        ValueError: an unknown method or setting, or one that does not fit the model.
    """
    if method == "full":
        if settings.keys() - {"modules_to_save", "target_modules"}:
            raise ValueError(f"full fine-tuning has no settings; got {', '.join(sorted(settings))}")
        return Adapted(model, FullFineTuning(model))
    if method in OWN_METHODS:
        config, chosen = own_config(model, method, settings)
        return Adapted(model, attach(model, config), chosen)
    if method.endswith(".json"):
        bridge = PeftAdapter(model, peft_config_from_dict({**read_config_file(method), **settings}))
    else:
        bridge = PeftAdapter(model, peft_config(method, settings))
    return Adapted(bridge.model, bridge)


def own_config(model: nn.Module, method: str, settings: dict[str, Any]) -> tuple[AdapterConfig, Recipe | None]:
    """The configuration of one of our methods for this model, and the recipe it comes from, if `settings` ask for one.

    `settings[RECIPE]` holds what else `vblora.recipe` takes; the other settings go before what it chooses.

    Raises:
        ValueError: as `vblora.recipe`, a recipe for another method than VB-LoRA, or unknown settings.
    """
    if RECIPE not in settings:
        return OWN_METHODS[method].from_dict(settings), None
    if method != "vblora":
        raise ValueError(f"the recipe is for VB-LoRA alone, not for {method}")
    settings = {**settings}
    more = settings.pop(RECIPE)
    if unknown := sorted(set(settings) - set(OWN_METHODS[method].__dataclass_fields__)):
        raise ValueError(f"unknown setting of vblora: {', '.join(unknown)}")
    chosen = recipe(model, settings.pop("target_modules"), **more, **settings)
    return chosen.config, chosen


def field_names(method: str) -> set[str]:
    """The settings a method has, by their names; none for full fine-tuning and for a JSON file."""
    if method == "full" or method.endswith(".json"):
        return set()
    if method in OWN_METHODS:
        return set(OWN_METHODS[method].__dataclass_fields__)
    return set(peft_config_class(method).__dataclass_fields__)


def read_config_file(path: str) -> dict[str, Any]:
    """The settings that a PEFT configuration in JSON gives; a null gives none."""
    return {key: value for key, value in read_json(Path(path)).items() if value is not None}


def parse_settings(text: str) -> dict[str, Any]:
    """Settings given on a command line, as a JSON object.

    Raises:
        ValueError: no JSON object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"settings are JSON, and {text!r} is not: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f'settings are a JSON object such as {{"lora_alpha": 16}}, not {text!r}')
    return values
