"""Regular expressions for the names of layers, matched in a time that no pattern can make long.

They come in files from anybody, and Python's `re` tries one way after the other: `(?:[a-z.]+)+!` takes it longer than
anybody waits. Here all ways are followed at once. A set of positions in the name is a number with a bit for each, and a
part of a pattern makes of the positions where it may begin those where it may end, each once (Thompson, "Regular
Expression Search Algorithm", 1968). Whether a whole name matches is all that is asked. What would need a memory of
which way was taken, references to groups and atomic groups, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser

MOST_CHARACTERS = 10_000  # of a pattern
MOST_STEPS = 10_000  # for one name; some hundred are usual
FLAGS = re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE | re.UNICODE  # without newlines, only the first says much
CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda character: character.isalnum() or character == "_",
}


def matches(pattern: str, name: str) -> bool:
    """Whether the pattern matches the whole name, as `re.fullmatch`.

    Raises:
        ValueError: as `compiled`, or it takes more than `MOST_STEPS`.
    """
    try:
        return bool(compiled(pattern)(_Name(name), 1) >> len(name))
    except (_TooLong, RecursionError) as error:
        raise ValueError(f"the regular expression {pattern!r:.200} is too involved: give a list of names") from error


class _TooLong(Exception):
    pass


class _Name:
    """The name of a layer, with what has been found out about it."""

    def __init__(self, text: str) -> None:
        self.end = 1 << len(text)
        self.characters: dict[str, int] = {}  # where each stands
        for at, character in enumerate(text):
            self.characters[character] = self.characters.get(character, 0) | 1 << at
        words = sum(1 << at for at, character in enumerate(text) if CATEGORIES["CATEGORY_WORD"](character))
        self.boundaries = words ^ words << 1
        self.known: dict[tuple[int, int], int] = {}
        self.steps = 0


Step = Callable[[_Name, int], int]  # the positions after a part of a pattern, from those before it


@lru_cache(maxsize=64)
def compiled(pattern: str, setting: str = "pattern") -> Step:
    """The pattern, ready to be matched.

    Raises:
        ValueError: it is no regular expression, too long, or has what is not matched here; it names the setting.
    """
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"{setting} is a regular expression of {len(pattern):,} characters: give a list of names")
    try:
        parsed = _parser.parse(pattern)
        return _sequence(parsed, _folds(False, parsed.state.flags, 0))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{setting} {pattern!r:.200} is no regular expression that is taken here: {error}") from error


def _sequence(parsed: Any, fold: bool) -> Step:
    """Parts one after the other; `fold`: upper and lower case are the same."""
    steps = [_step(operation.name, value, fold) for operation, value in parsed]

    def run(name: _Name, at: int) -> int:
        key = (id(run), at)
        if key not in name.known:
            for step in steps:
                name.steps += 1
                if name.steps > MOST_STEPS:
                    raise _TooLong
                at = step(name, at) if at else 0
            name.known[key] = at
        return name.known[key]

    return run


def _step(operation: str, value: Any, fold: bool) -> Step:
    """One part of a pattern, by its name in Python's own parser."""
    if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
        return _one_of(_test_of(operation, value, fold))
    if operation in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, inner = value
        return _repeat(int(least), int(most), _sequence(inner, fold))
    if operation == "BRANCH":
        ways = [_sequence(way, fold) for way in value[1]]
        return lambda name, at: _union(way(name, at) for way in ways)
    if operation == "SUBPATTERN":
        _, added, removed, inner = value
        return _sequence(inner, _folds(fold, added, removed))
    if operation in ("ASSERT", "ASSERT_NOT"):
        return _look(value[0] > 0, operation == "ASSERT", value[1], fold)
    if operation == "AT":
        return _place(value.name)
    if operation == "FAILURE":
        return lambda name, at: 0
    raise ValueError(f"{operation.lower().replace('_', ' ')} is not known here")


def _folds(fold: bool, added: int, removed: int) -> bool:
    if added & ~FLAGS:
        raise ValueError("only the flags i, m, s and x are known here")
    return bool(fold or added & re.IGNORECASE) and not removed & re.IGNORECASE


def _test_of(operation: str, value: Any, fold: bool) -> Callable[[str], bool]:
    """Whether a character is one of those that a part stands for."""
    if operation == "LITERAL":
        return lambda character: any(ord(case) == value for case in _cases(character, fold))
    if operation == "NOT_LITERAL":
        return lambda character: all(ord(case) != value for case in _cases(character, fold))
    if operation == "ANY":
        return lambda character: character != "\n"
    if operation == "RANGE":
        return lambda character: any(value[0] <= ord(case) <= value[1] for case in _cases(character, fold))
    if operation == "CATEGORY":
        test = CATEGORIES[value.name.replace("_NOT_", "_")]
        return (lambda character: not test(character)) if "_NOT_" in value.name else test
    others = value[0][0].name == "NEGATE"
    tests = [_test_of(inner.name, what, fold) for inner, what in value[others:]]
    return lambda character: any(test(character) for test in tests) != others


def _cases(character: str, fold: bool) -> str:
    return character + character.lower()[0] + character.upper()[0] if fold else character


def _one_of(test: Callable[[str], bool]) -> Step:
    """Any character of which this holds."""

    def run(name: _Name, at: int) -> int:
        key = (id(run), -1)
        if key not in name.known:
            name.known[key] = _union(where for character, where in name.characters.items() if test(character))
        return (at & name.known[key]) << 1

    return run


def _repeat(least: int, most: int, inner: Step) -> Step:
    def run(name: _Name, at: int) -> int:
        for _ in range(least):
            before, at = at, inner(name, at)
            if at == before:  # so it stays
                break
        found = new = at
        for _ in range(min(most - least, name.end.bit_length())):  # each brings a further position, or there is an end
            new = inner(name, new) & ~found
            if not new:
                break
            found |= new
        return found

    return run


def _look(ahead: bool, wanted: bool, parsed: Any, fold: bool) -> Step:
    """What must, or must not, come next or have come before."""
    inner, (least, most) = _sequence(parsed, fold), parsed.getwidth()
    if not ahead and least != most:
        raise ValueError("what is looked for behind a place must have one length")

    def run(name: _Name, at: int) -> int:
        def holds(place: int) -> bool:
            if ahead:
                return bool(inner(name, place)) == wanted
            return bool(inner(name, place >> most) & place) == wanted

        return _union(place for place in (1 << bit for bit in range(at.bit_length())) if at & place and holds(place))

    return run


def _place(what: str) -> Step:
    if what.startswith("AT_BEGINNING"):
        return lambda name, at: at & 1
    if what.startswith("AT_END"):
        return lambda name, at: at & name.end
    if what == "AT_BOUNDARY":
        return lambda name, at: at & name.boundaries
    return lambda name, at: at & ~name.boundaries


def _union(sets: Any) -> int:
    found = 0
    for one in sets:
        found |= one
    return found
