"""What must not be written: values whose name says token, key, password or secret."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# The last word of the name counts: hub_token is a secret, max_new_tokens and pad_token_id are none.
_SECRET = re.compile(r"(^|[_-])(token|key|password|passwd|secret|credentials?)$", re.IGNORECASE)
SHORTEST, LONG = 4, 8  # characters of a value that is looked for in a text: as a word of its own, or anywhere


def is_secret(name: str) -> bool:
    """Whether a setting of this name is a secret."""
    return _SECRET.search(name) is not None


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are none, also within settings and lists of them."""
    return {name: _cleared(value) for name, value in values.items() if not is_secret(str(name))}


def _cleared(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    return [_cleared(one) for one in value] if isinstance(value, list) else value


def masked(text: str, arguments: Sequence[str] | None = None) -> str:
    """The text with "***" for every secret of a command line (this process's unless given) and of the environment.

    A value of fewer than eight characters is masked as a word of its own alone, and of fewer than four only behind its
    flag: elsewhere the same letters are other words as a rule.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parts = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]
    for flag, value in itertools.pairwise(parts):
        if flag.startswith("--") and is_secret(flag) and value:
            text = re.sub(rf"({re.escape(flag)}[= ]){re.escape(value)}(?!\w)", r"\1***", text)
            text = _without(text, value)
    for name, value in os.environ.items():
        if is_secret(name):
            text = _without(text, value)
    return text


def _without(text: str, value: str) -> str:
    if len(value) >= LONG:
        return text.replace(value, "***")
    return re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "***", text) if len(value) >= SHORTEST else text
