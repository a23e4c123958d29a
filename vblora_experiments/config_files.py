"""Files of settings, in YAML or JSON."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from vblora_experiments.text_files import once

SUFFIXES = (".yaml", ".yml", ".json")


def read_config(path: Path, names: list[str], flag: str = "--config") -> dict[str, Any]:
    """The values in a file of settings, which this flag names.

    Raises:
        ValueError: no such file, it is no YAML or JSON, or a key in it is twice there or none of `names`.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{flag} {path}: its name must end with {', '.join(SUFFIXES)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = _from_json(text) if path.suffix.lower() == ".json" else _from_yaml(text)
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{flag} {path} is nested too deeply") from None
    except ValueError as error:  # also of UTF-8 and JSON
        raise ValueError(f"{flag} {path}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{flag} {path} holds no map of flags to values")
    check_keys(values, [name for name in names if name != "config"], f"{flag} {path}")
    return values


def check_keys(values: dict[str, Any], names: list[str], where: str) -> None:
    """Raise ValueError for the first key that is none of `names`, with those near it."""
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 3)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; near it: {', '.join(near)}" if near else ""))


def _from_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=once)


def _from_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return once([(self.construct_object(k, True), self.construct_object(v, True)) for k, v in node.value])

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.construct_mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from None
