"""Texts of models that think aloud, without the thoughts."""

from __future__ import annotations

import re

_NAMES = r"(?:seed:)?(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)"
_THOUGHT = re.compile(
    rf"(?P<open><{_NAMES}(?:\s[^<>]*)?>|\[think\]|◁think▷|<\|begin_of_thought\|>)"
    rf"|</{_NAMES}\s*>|\[/think\]|◁/think▷|<\|end_of_thought\|>",
    re.IGNORECASE,
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(?:analysis|commentary).*?(?:<\|end\|>|(?=<\|channel\|>)|\Z)", re.DOTALL)


def without_thoughts(text: str) -> str:
    """A model's text without what it thought aloud, in the forms that models have for that.

    The opening mark may be missing, as chat templates give it with the prompt: then all before the closing one goes.
    Thoughts that were cut off go to the end, where their mark begins a line; elsewhere it is a word of the text.
    """
    text = _CHANNEL.sub("", text)
    kept: list[str] = []
    start, opened = 0, None
    for mark in _THOUGHT.finditer(text):
        if mark["open"]:
            opened = mark if opened is None else opened
            continue
        kept = [*kept, text[start : opened.start()]] if opened else []
        start, opened = mark.end(), None
    begins_line = opened is not None and not text[start : opened.start()].rpartition("\n")[2].strip()
    kept.append(text[start : opened.start()] if opened and begins_line else text[start:])
    return "".join(kept)
