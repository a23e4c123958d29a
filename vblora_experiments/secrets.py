"""What must not be written: values whose name says token, key, password or secret."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# The last word of the name counts: hub_token is a secret, max_new_tokens and pad_token_id are none.
_SECRET = re.compile(r"(^|[_-])(token|key|password|passwd|secret|credentials?)$", re.IGNORECASE)
SHORTEST = 4  # characters of a value that is looked for in a text


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
    """The text with "***" for every secret of a command line; this process's unless given."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parts = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--") else [a])]
    for flag, value in itertools.pairwise(parts):
        if flag.startswith("--") and is_secret(flag) and len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return text
