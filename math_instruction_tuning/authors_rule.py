r"""Right or wrong as the published scripts of VB-LoRA judge it, so that figures compare with the paper's.

The rule was read in github.com/leo-yangli/VB-LoRA, math_instruction_tuning/instruction_tuning_eval: gsm8k_eval.py,
MATH_eval.py, utils.py, grader.py. These came by way of LoRA-XS from MetaMath (eval_gsm8k.py, eval_math.py) and
hendrycks/math (math_equivalence.py), with an equality helper from ProphetNet's CRITIC. This module gives the same
verdicts in other words, defects included. The defects, each with an example that tests/mathematics keeps:

- An answer off by a factor of 100 is right, on GSM8K too: 1800 and 0.18 for 18.
- So is one that is off by a part in ten thousand: 10001 for 10000.
- GSM8K's number ends at its second comma or point (1,234,567 is 1234) and rounded, half to even: 3.5 is 4, 1/3 is 0.
- Braces and parentheses are dropped before texts are compared: \frac{12}{3} is \frac{1}{23}, and (1,2) is (1,2].
- Where tidying either text fails, the answer is compared with itself, so anything not empty is right. It fails on
  "\sqrt" or "\frac" with nothing after, on two units "\text{ ...}", and on one slash without whole numbers around it:
  "\sqrt", "x/2" and "1.5/2" are right for any reference. (A reference of such a form would accept any answer; MATH's
  test set has none.)
- An answer that repeats GSM8K's one reference with two commas, 1,450,000, is wrong.
- "The answer is: " counts only so, with its colon and space; an answer in a \boxed{} alone is unparsed, thus wrong.
- What is left is read as a Python expression: 2^3 is "2 exclusive-or 3", 1.

Three things differ, none of them a verdict on a usual answer:

- The scripts would also read LaTeX, by SymPy's parse_latex. With the versions their requirements.txt asks for it
  never does: omegaconf 2.3.0 needs antlr4 4.9, and SymPy 1.12 refuses all but 4.11. So LaTeX is not read here either.
- Reading an expression runs it. Answers are not to be trusted, so one with quotation marks, attributes, or names that
  do more than mathematics is left as text.
- Where the scripts stop with an error (a fraction with denominator 00, a GSM8K reference that is no whole number),
  this module calls the answer unparsed, and takes the reference as it is.

The scripts end a generated text before the first "Instruction" or "Response", and so is a text cut here. SymPy's own
rules may shift between 1.12 and the version installed.
"""

from __future__ import annotations

import builtins
import functools
import math
import re
import types
import unicodedata
from typing import Any

MARKER = "The answer is: "
STOPS = re.compile("Instruction|Response")
CLOSE = 1e-4  # relative difference of numbers that still counts as equal
CLOSE_EXPRESSIONS = 1e-3
TIDIED_FIRST = (
    ("\n", ""),
    ("\\!", ""),
    ("\\\\", "\\"),
    ("tfrac", "frac"),
    ("dfrac", "frac"),
    ("\\left", ""),
    ("\\right", ""),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\$", ""),
)
TIDIED_AFTER_UNITS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))


def extract(text: str, kind: str) -> str | None:
    """The answer that the scripts see in an output; None where they call the output invalid."""
    text = STOPS.split(text, maxsplit=1)[0]
    if kind == "math":
        return _math_answer(text)
    number = _gsm8k_number(text)
    return None if number is None else str(number)


def is_correct(text: str, reference: str, kind: str) -> bool:
    """Whether the scripts count an output as right.

    Of MATH's answers some take SymPy for ever, as they did in the scripts: see judge_workers for limits.

    Raises:
        ValueError: a GSM8K reference that is no number.
    """
    answer = extract(text, kind)
    if answer is None:
        return False
    if kind == "math":
        return same_math(answer, reference)
    wanted = reference.replace(",", "")
    if _as_float(wanted) is None:
        raise ValueError(f"reference {reference!r}: the published rule for GSM8K needs a number")
    return float(answer) == float(wanted) or equal(answer, wanted)


# --------------------------------------------------------------------------------------- what the answer is


def _gsm8k_number(text: str) -> int | None:
    """The first number after the last marker, at most one comma, point or slash in it, rounded to a whole one."""
    parts = text.split(MARKER)
    found = re.search(r"[-+]?\d*[.,/]?\d+", parts[-1].strip())
    if len(parts) < 2 or not found:
        return None
    above, slash, below = found.group().replace(",", "").partition("/")
    if slash and _as_float(above) is None:  # "/5"
        return None
    try:
        value = float(above)
        if slash and below != "0":  # 5/0 is 5
            value /= float(below)
        return round(value)
    except (OverflowError, ValueError, ZeroDivisionError):
        return None


def _math_answer(text: str) -> str | None:
    """All after the last marker, up to a point at a line's end; one last point is dropped."""
    parts = text.split(MARKER)
    if len(parts) < 2:
        return None
    return parts[-1].split(".\n")[0].strip().removesuffix(".").strip()


# --------------------------------------------------------------------------------------- tidying


def same_math(answer: str, reference: str) -> bool:
    """Whether two MATH answers are the same; where tidying fails, whether the answer equals itself."""
    try:
        tidied = tidy(answer), tidy(reference)
    except (ValueError, IndexError):
        return equal(answer, answer) or answer == reference
    return equal(*tidied) or tidied[0] == tidied[1]


def tidy(text: str) -> str:
    """The normal form of hendrycks/math.

    Raises:
        ValueError, IndexError: the forms named at the top of this module.
    """
    text = _replaced(text, TIDIED_FIRST)
    before, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    text = _replaced(before, TIDIED_AFTER_UNITS)
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _slash_to_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _replaced(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def _braced_roots(text: str) -> str:
    r"""\sqrt3 as \sqrt{3}; spaces are still there, and one may be what gets the braces."""
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (p if p[0] == "{" else f"{{{p[0]}}}{p[1:]}") for p in rest)


def _braced_fractions(text: str) -> str:
    r"""\frac12 and \frac1{2} as \frac{1}{2}; with one character after a \frac, the whole text as it was."""
    result, *rest = text.split("\\frac")
    for part in rest:
        if part[0] != "{":
            if len(part) < 2:
                return text
            part = f"{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
        result += "\\frac" + part
    return result


def _slash_to_fraction(text: str) -> str:
    r"""1/2 as \frac{1}{2}. With one slash and anything but whole numbers, int() fails, and so does the tidying."""
    if text.count("/") != 1:
        return text
    above, below = (int(part) for part in text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


# --------------------------------------------------------------------------------------- equality


def equal(answer: str, reference: str) -> bool:
    """As numbers, up to a factor of 100; else as texts without braces, element by element, or as expressions."""
    numbers = _as_float(answer), _as_float(reference)
    if numbers[0] is not None and numbers[1] is not None:
        return any(math.isclose(item, numbers[0], rel_tol=CLOSE) for item in _hundredfold(numbers[1]))
    if not answer:
        return False
    answer, reference = answer.strip(), reference.strip()
    return _same_but_brackets(answer, reference) or _same_elements(answer, reference) or _same_value(answer, reference)


def _hundredfold(number: float) -> tuple[float, float, float]:
    return number / 100, number, number * 100


def _as_float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _same_but_brackets(answer: str, reference: str) -> bool:
    enclosed, other = _enclosed_by(answer), {"[]": "(", "()": "["}
    if enclosed and not reference.startswith(other[enclosed]):
        answer, reference = answer.strip("[]()"), reference.strip("[]()")
    dropped = str.maketrans("", "", "{}()")
    return answer.translate(dropped) == reference.translate(dropped)


def _same_elements(answer: str, reference: str) -> bool:
    if not _enclosed_by(answer) or _enclosed_by(answer) != _enclosed_by(reference):
        return False
    left, right = answer[1:-1].split(","), reference[1:-1].split(",")
    return len(left) == len(right) and all(equal(*pair) for pair in zip(left, right, strict=True))


def _enclosed_by(text: str) -> str:
    ends = text[:1] + text[-1:]
    return ends if ends in ("[]", "()") else ""


def _same_value(answer: str, reference: str) -> bool:
    """As SymPy expressions: their difference is nothing, or their values are close."""
    from sympy import simplify

    left, right = _read(answer), _read(reference)
    try:
        if simplify(left - right) == 0:
            return True
    except MemoryError:
        raise
    except Exception:
        pass
    try:
        return math.isclose(_value(left), _value(right), rel_tol=CLOSE_EXPRESSIONS)
    except MemoryError:
        raise
    except Exception:
        return False


def _read(text: str) -> Any:
    """The expression, or the text where it is none."""
    from sympy.parsing.sympy_parser import parse_expr

    try:
        return parse_expr(text) if _harmless(text) else text
    except MemoryError:  # here and below: the scripts' machine may have had it
        raise
    except Exception:
        return text


def _value(expression: Any) -> Any:
    """SymPy's N(); of a text, it reads the text once more, with ^ for a power."""
    from sympy import N

    if isinstance(expression, str) and not _harmless(expression):
        raise ValueError("not read")
    return N(expression)


def _harmless(text: str) -> bool:
    r"""Whether reading a text, which evaluates it, can do no more than mathematics.

    A backslash is refused with the rest: nothing with one could be read anyway.
    """
    text = unicodedata.normalize("NFKC", text)  # as Python does with names
    if re.search(r"""['"`#@\\\r\n\f;]|__|\.\s*[^\W\d]""", text):
        return False
    return not _doing_names().intersection(re.findall(r"[^\W\d]\w*", text))


@functools.cache
def _doing_names() -> frozenset[str]:
    """Functions that SymPy's reader would find, but for those that are known to compute only."""
    import sympy

    def is_object(value: Any) -> bool:
        return isinstance(value, sympy.Basic) or (isinstance(value, type) and issubclass(value, sympy.Basic))

    names = {name for name in sympy.__all__ if not is_object(getattr(sympy, name))}
    names |= {name for name, value in vars(builtins).items() if isinstance(value, types.BuiltinFunctionType)}
    return frozenset(names - {"sqrt", "cbrt", "root", "abs", "pow", "round", "sum", "max", "min", "gcd", "lcm"})
