r"""Right or wrong by what the answer is worth: exactly, and with no factor of 100.

The final answer of an output is what it ends with, of these:

    "The answer is" (in any case, with or without "final" and a colon) and what follows on its line, up to the end of
        the sentence, or the \boxed{} in what follows
    "#### " and what follows on its line
    the last \boxed{} or \fbox{}

The one that stands last counts, for GSM8K the last one with a number in it, and where there is none the output is
unparsed, thus wrong. Thoughts (<think>...</think>) do not count. Neither does what follows where an output runs on into
a new instruction ("### Instruction:", "Question:", a chat template's marks), unless no answer stands before that.

GSM8K's answers are compared as exact fractions (see ``number``). MATH's are compared as texts without what only
changes their looks (see ``plain``), then by math-verify, which reads LaTeX into SymPy. math-verify takes 50% for 50 and
for 0.5, numbers with a decimal point as equal when their sixth decimals are, and some pairs for minutes, so that it
runs in processes with a time limit: see judge_workers.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import math_references
from vblora_experiments.thoughts import without_thoughts

MARKER = re.compile(
    r"\bthe\s+(?:final\s+)?answer\s+is\b\s*:?"
    # but not where a text looks back at its answer
    r"(?!\s*(?:indeed\s+|thus\s+)?(?:correct|incorrect|right|wrong|reasonable|clear|verified|consistent|unique)\b)",
    re.IGNORECASE,
)
RUNS_ON = re.compile(
    r"^[ \t]*\#{2,}\s*(?i:instruction|input|response|question|problem|exercise|example)\b"
    r"|^[ \t]*(?:\*\*)?(?:Instruction|Response|Question|Problem|Q|Human|User)(?:\*\*)?\s*:"
    r"|Below is an instruction that describes a task"
    r"|<\|[^|<>\n]{1,40}\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>",
    re.MULTILINE,
)
NO_ANSWER = "no answer"
LONGEST_ANSWER = 5000  # characters
LONGEST_NUMBER, LARGEST_EXPONENT = 1000, 1000  # beyond, a number in an output is a slip, and costs memory


class Answer(NamedTuple):
    """The final answer of an output, or None, and the place it was taken from: marker, ####, box or no answer."""

    text: str | None
    place: str


def extract(text: str, kind: str) -> Answer:
    """The final answer in an output; for "gsm8k" the last place with a number in it counts."""
    for part in RUNS_ON.split(without_thoughts(text)):
        answers = [answer for answer in _candidates(part) if answer.text]
        if kind == "math":  # "The answer is positive, because ..." looks back, where there is another answer
            answers = [answer for answer in answers if not _is_prose(answer)] or answers
        else:
            answers = [answer for answer in answers if number(str(answer.text)) is not None]
        if answers:
            return answers[0]
    return Answer(None, NO_ANSWER)


def _is_prose(answer: Answer) -> bool:
    return (
        answer.place == "marker" and len(str(answer.text).split()) > 4 and not re.search(r"[\d\\$]", str(answer.text))
    )


def _candidates(text: str) -> Iterator[Answer]:
    """All that may be the answer, the last one first."""
    markers = [found.span() for found in MARKER.finditer(text)]
    places = [(*span, "marker") for span in markers] + [(*found.span(), "####") for found in re.finditer("####", text)]
    box = math_references.find_last_box(text)
    if box is not None:
        places.append((box[0], box[0], "box"))
    for start, end, place in sorted(places, reverse=True):
        if box is not None and place == "box":
            yield Answer(box[1], "marker" if markers and markers[0][0] < start else "box")
        else:
            yield Answer(_first_line(text[end : end + LONGEST_ANSWER]), place)


def _first_line(text: str) -> str:
    r"""The first sentence of the first line with something in it; more lines as long as a \begin or a brace is open."""
    taken = ""
    for line in text.strip().splitlines():
        taken = f"{taken} {line.strip()}".strip()
        opened = taken.count("\\begin{") - taken.count("\\end{")
        if opened <= 0 and _open_braces(taken) <= 0 and taken not in ("$$", "\\[", "**"):
            break
    for end in re.finditer(r"(?<=[\w$)}\]%*])[.!?]\**\s+(?=[A-Z])", taken):
        sentence = taken[: end.start()]
        if _open_braces(sentence) <= 0 and len(re.findall(r"(?<!\\)\$", sentence)) % 2 == 0:
            return _bare(sentence)
    return _bare(taken)


def _open_braces(text: str) -> int:
    return len(re.findall(r"(?<!\\)\{", text)) - len(re.findall(r"(?<!\\)\}", text))


def _bare(text: str) -> str:
    """Without the marks of mathematics and of bold type around, and without a full stop at the end."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip("*").removesuffix(".").strip()
        for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
            enclosed = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing)
            if enclosed and opening not in text[len(opening) : -len(closing)]:
                text = text[len(opening) : -len(closing)]
    return text


# ---------------------------------------------------------------------------------------------- GSM8K

_REWRITTEN = (  # in this order
    (r"[−–﹣－]", "-"),
    (r"\\!", ""),
    (r"\{,\}", ","),
    (r"\\[,;: ]|~|\s", " "),
    (r"(?<=\d)\s*(?:x|×|\*|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*\{?\s*([-+]?\d+)\s*\}?", r"e\1"),
    (r"(?<!\d)\*\*|\*\*(?!\d)|\\?[$€£]|\^\s*\{?\s*(?:\\circ|°)\s*\}?", ""),
    (r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r" \1\2/\3\4"),
)
_THOUSANDS = (r"(?<![\d.,])\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d|,\d)", r"(?<![\d.,/])\d{1,3}(?:\s\d{3})+(?!\d|\s*/)")
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<sign>[-+])\s*)?(?<![\d.,/])"
    r"(?:(?:(?P<whole>\d+)\s+)?(?P<above>\d+)\s*/\s*(?P<below>\d+)"
    r"|(?P<decimal>\d+(?:\.\d+)?|\.\d+)(?:[eE](?P<power>[-+]?\d+))?)"
    r"(?![.,/]?\d|\s*(?:\^|\*\*))",
    re.ASCII,
)


def number(text: str) -> Fraction | None:
    r"""The number that an answer states, exactly; None where it states none or it is unclear.

    Taken is the first number, after the last "=" if there is one. It may have a sign (− too), $, € or £, commas or
    spaces between thousands, decimals, a power of ten (1.5e3, 1.5 \times 10^3), or be a fraction (1/3, \frac{1}{3}) or
    a mixed number (2 1/2). What follows is a unit: "5 apples"; "12.5%" is 12.5, and "3 million" is 3. Unclear is a
    comma between digits that parts no thousands (1,23), a second point or slash (1.2.3), a power
    (5^2), and a zero below a fraction.
    """
    sides = [side for side in text.split("=") if re.search("[0-9]", side)]
    if not sides:
        return None
    side = sides[-1]
    for old, new in _REWRITTEN:
        side = re.sub(old, new, side)
    for grouped in _THOUSANDS:
        side = re.sub(grouped, lambda found: re.sub(r"[\s,]", "", found.group()), side, flags=re.ASCII)
    found = _NUMBER.search(side)
    if not found or re.search("[0-9]", side[: found.start()]):  # a number before it could not be read
        return None
    value = _value(found)
    return -value if value is not None and found["sign"] == "-" else value


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found.group()) > LONGEST_NUMBER or abs(int(found["power"] or 0)) > LARGEST_EXPONENT:
        return None
    if found["decimal"]:
        return Fraction(Decimal(f"{found['decimal']}e{found['power'] or 0}"))
    if int(found["below"]) == 0:
        return None
    return int(found["whole"] or 0) + Fraction(int(found["above"]), int(found["below"]))


def is_correct_gsm8k(text: str, reference: str) -> bool:
    """Whether an output's number is exactly the reference's.

    Raises:
        ValueError: a reference with no number in it.
    """
    wanted = number(reference)
    if wanted is None:
        raise ValueError(f"reference {reference!r}: no number")
    answer = extract(text, "gsm8k").text
    return answer is not None and number(answer) == wanted


# ----------------------------------------------------------------------------------------------- MATH

_LOOKS = (  # what changes only the looks of an answer; in this order
    (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])\.?", ""),
    (r"\\(?:text|textbf|textit|mbox|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}", r"\1"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)", ""),
    (r"\\!|\{,\}(?=\d{3})", ""),
    (r"\\[,;: ]|\\?\$|~|(?<!\d)\s+|\s+(?!\d)", ""),  # but not in "3 1/2"
)


_BASE = re.compile(r"\d_\{?(\d+)\}?$")  # 101_2


def plain(text: str) -> str:
    r"""An answer of MATH without what only changes its looks: spaces, \left, \right, \text, degrees, dollars."""
    for old, new in _LOOKS:
        text = re.sub(old, new, text)
    return text.removesuffix(".")


def require_math_verify() -> None:
    """Check that math-verify is installed, without importing it.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("MATH answers need math-verify: pip install math-verify")


def is_same_math(answer: str, reference: str) -> bool:
    """Whether math-verify takes two MATH answers for the same; it can go on for minutes, and has no time limit here.

    The reference goes first: math-verify accepts "x = 5" for a reference 5, but not 5 for every equation.
    """
    if plain(answer) == plain(reference):
        return True
    bases = [_BASE.search(plain(text)) for text in (answer, reference)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:  # math-verify would leave them out
        return False
    from math_verify import parse, verify

    gold, given = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer))
    return bool(verify(gold, given, timeout_seconds=None))
