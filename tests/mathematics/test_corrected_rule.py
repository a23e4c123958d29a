"""The corrected rule: GSM8K's numbers, exactly, and MATH's answers on hard pairs, some made from MATH's references."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

import corrected_rule
import judge_workers
import math_references
from judge_workers import Pair, Verdict

# ---------------------------------------------------------------------------------------------- GSM8K

NUMBERS = {
    "5 apples": 5,
    "5.": 5,
    "(5)": 5,
    "**5**": 5,
    "5.0 cm": 5,
    "+7": 7,
    ".5": Fraction(1, 2),
    "$1,234.50": Fraction(2469, 2),
    "\\$1,\\!234": 1234,
    "1{,}234": 1234,
    "1,234,567": 1234567,
    "1,00,000": 100000,
    "1 234": 1234,
    "10\u202f000\u00a0000 people": 10**7,
    "1\\,000.5": Fraction(2001, 2),
    "€ 3.50": Fraction(7, 2),
    "£2": 2,
    "12.5%": Fraction(25, 2),
    "50\\%": 50,
    "90^\\circ": 90,
    "−5": -5,
    "-$5": -5,
    "$-5": -5,
    "- 5": -5,
    "COVID-19": 19,
    "5-6": 5,
    "1/3": Fraction(1, 3),
    "1 / 3 of it": Fraction(1, 3),
    "\\frac{1}{3}": Fraction(1, 3),
    "-\\dfrac12": Fraction(-1, 2),
    "2 1/2 hours": Fraction(5, 2),
    "3\\frac{1}{2}": Fraction(7, 2),
    "1.5e3": 1500,
    "2E-2": Fraction(1, 50),
    "1.5 x 10^3": 1500,
    "2 \\times 10^{-1}": Fraction(1, 5),
    "x = 5": 5,
    "3 + 4 = 7": 7,
    "3 million": 3,
    "five": None,
    "": None,
    "1,23": None,
    "1,23 and 5": None,
    "1.2.3": None,
    "1/2/3": None,
    "1/0": None,
    "5^2": None,
    "10**3": None,
    "1e999999999": None,
    "9" * 5000: None,
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items(), ids=lambda value: str(value)[:20])
def test_a_number_is_read_exactly(text, value):
    assert corrected_rule.number(text) == value


@pytest.mark.parametrize(
    ("text", "answer", "place"),
    [
        ("3 + 4 = 7\n#### 7\nThe answer is: 8", "8", "marker"),
        ("The answer is 3. No: the final answer is 4 apples.\nBye 5", "4 apples", "marker"),
        ("**The answer is:** $18$.", "18", "marker"),
        ("The answer is:\n\n\\[ \\boxed{18} \\]", "18", "marker"),
        ("So.\n#### 1,234\n", "1,234", "####"),
        ("The answer is: unknown\n#### 12", "12", "####"),
        ("It is $\\boxed{12}$, not 13.", "12", "box"),
        ("It is 12.", None, "no answer"),
        # what stands last counts
        ("So the answer is 3 for one day, and there are 6.\n3 * 6 = 18\n#### 18", "18", "####"),
        ("The answer is 3 for one.\nIn all it is \\boxed{18}.", "18", "marker"),
        ("#### 3 a day\nIn all $\\boxed{18}$.", "18", "box"),
        ("It is \\boxed{3} a day.\n#### 18", "18", "####"),
        ("#### 18\nSo the answer is correct.", "18", "####"),
        ("The answer is: 18\nI hope the answer is of help.", "18", "marker"),
        ("The answer is: 18. Check: 20 - 2 = 20 - 1 - 1", "18", "marker"),
        # thoughts
        ("<think>maybe the answer is 5? No.</think>She has 18.\n#### 18", "18", "####"),
        ("<think>maybe the answer is 5?</think>She has 18.", None, "no answer"),
        ("maybe the answer is 5?\n</think>\nThe answer is 18.", "18", "marker"),
        ("<think>\nThe answer is 5, or", None, "no answer"),
        ("#### 18\n<reasoning>or #### 5</reasoning>", "18", "####"),
        (
            "<|channel|>analysis<|message|>The answer is 5<|end|><|channel|>final<|message|>The answer is 18",
            "18",
            "marker",
        ),
        # a text that runs on
        ("The answer is: 18\n\n### Instruction:\nTom has 1.\n\n### Response:\nThe answer is: 2", "18", "marker"),
        ("#### 18\n\nQuestion: Tom has 1.\nAnswer: #### 2", "18", "####"),
        ("\\boxed{18}\n\nQ: Tom has 1.\nA: The answer is 2.", "18", "box"),
        ("The answer is 18.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\nThe answer is 2.", "18", "marker"),
        ("The answer is 18.</s> [INST] 1 + 1? [/INST] The answer is 2.", "18", "marker"),
        ("#### 18\nBelow is an instruction that describes a task.\n#### 2", "18", "####"),
        ("### Response:\nThe answer is: 18", "18", "marker"),
        ("Question 1: a day? The answer is 3.\nQuestion 2: six days? The answer is 18.", "18", "marker"),
        ("", None, "no answer"),
    ],
)
def test_the_final_answer_of_gsm8k_is_found(text, answer, place):
    assert corrected_rule.extract(text, "gsm8k") == (answer, place)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("18", "18", True),
        ("$18.00", "18", True),
        ("1234567", "1,234,567", True),
        ("36/2", "18", True),
        ("50%", "50", True),
        ("1800", "18", False),
        ("0.18", "18", False),
        ("0.5", "50", False),
        ("50%", "0.5", False),
        ("17.9999", "18", False),
        ("10001", "10000", False),
        ("-18", "18", False),
        ("3.5", "4", False),
        ("0.333333", "1/3", False),
    ],
)
def test_gsm8k_is_judged_exactly(answer, reference, right):
    assert corrected_rule.is_correct_gsm8k(f"The answer is: {answer}", reference) is right


def test_a_gsm8k_reference_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="no number"):
        corrected_rule.is_correct_gsm8k("The answer is: 5", "five")


# ----------------------------------------------------------------------------------------------- MATH


@pytest.mark.parametrize(
    ("text", "answer", "place"),
    [
        ("The answer is: $\\frac{1}{2}$.", "\\frac{1}{2}", "marker"),
        ("The answer is: (1, 2). Done", "(1, 2)", "marker"),
        ("The answer is: $\\text{Dr. Who}$. Done", "\\text{Dr. Who}", "marker"),
        ("The answer is: $\\$40$. So it is.", "$\\$40$", "marker"),
        ("So $\\boxed{2}$. The answer is positive, because both of them are.", "2", "box"),
        ("The answer is neither one nor the other.", "neither one nor the other", "marker"),
        ("The answer is: \\text{St. Ives}", "\\text{St. Ives}", "marker"),
        ("The answer is 3 for one.\nSo $\\boxed{\\frac12}$.\n### Instruction: $\\boxed{2}$", "\\frac12", "marker"),
        (
            "The answer is \\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}.\nDone",
            "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
            "marker",
        ),
        ("The answer is: $x$ or $y$", "$x$ or $y$", "marker"),
        ("so \\boxed{\\text{east}} and", "\\text{east}", "box"),
        ("The answer is: ", None, "no answer"),
    ],
)
def test_the_final_answer_of_math_is_found(text, answer, place):
    assert corrected_rule.extract(text, "math") == (answer, place)


FIXED = [  # answer, reference, right
    ("1/2", "\\frac{1}{2}", True),
    ("0.5", "\\frac{1}{2}", True),
    (".5", "\\frac12", True),
    ("\\frac{2}{4}", "\\frac{1}{2}", True),
    ("\\dfrac{3}{4}", "\\tfrac34", True),
    ("\\frac{-1}{2}", "-\\frac{1}{2}", True),
    ("\\frac72", "3\\frac12", True),
    ("1234", "1,234", True),
    ("10000", "10,\\!000", True),
    ("7.0", "7", True),
    ("$7$", "7", True),
    ("x=5", "5", True),
    ("50", "50\\%", True),
    ("90", "90^\\circ", True),
    ("5", "5\\text{ cm}", True),
    ("5.5", "\\$5.50", True),
    ("Monday", "\\text{Monday}", True),
    ("A", "\\text{(A)}", True),
    ("\\sqrt{12}", "2\\sqrt{3}", True),
    ("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt3}{3}", True),
    ("(x+1)^2", "x^2+2x+1", True),
    ("4i+3", "3+4i", True),
    ("1024", "2^{10}", True),
    ("2,1", "1,2", True),
    ("\\{2,1\\}", "\\{1,2\\}", True),
    ("(3, 4)", "\\left(3,4\\right)", True),
    ("(3,\\pi/2)", "(3,\\frac{\\pi}{2})", True),
    ("2,-2", "\\pm 2", True),
    ("(3,\\infty)\\cup(-\\infty,2)", "(-\\infty,2)\\cup(3,\\infty)", True),
    ("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", True),
    ("2x+1=y", "y=2x+1", True),
    ("\\frac{1}{\\tan x}", "\\cot x", True),
    ("2/1", "\\frac{1}{2}", False),
    ("0.05", "\\frac{1}{2}", False),
    ("50", "0.5", False),
    ("0.18", "18", False),
    ("1800", "18", False),
    ("10001", "10000", False),
    ("\\sqrt", "42", False),
    ("x/2", "42", False),
    ("\\frac{12}{3}", "\\frac{1}{23}", False),
    ("(1,2)", "(1,2]", False),
    ("[1,2]", "(1,2)", False),
    ("(1,2]", "[1,2)", False),
    ("(2,1)", "(1,2)", False),
    ("1,2,3", "1,2", False),
    ("1,2", "1,2,3", False),
    ("12", "1,2", False),
    ("2:1", "1:2", False),
    ("\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", False),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", False),
    ("\\text{west}", "\\text{east}", False),
    ("Tuesday", "\\text{Monday}", False),
    ("x^3", "x^2", False),
    ("2\\sqrt{3}", "3\\sqrt{2}", False),
    ("3.14", "\\pi", False),
    ("\\frac{22}{7}", "\\pi", False),
    ("31/2", "3\\frac12", False),
    ("3 1/2", "\\frac{31}{2}", False),
    ("-(x+1)", "x+1", False),
    ("x > 5", "x \\ge 5", False),
    ("4", "\\sqrt{4}+i", False),
    ("506_8", "506_7", False),
    ("101_2", "101_{2}", True),
    ("", "5", False),
]


def test_fixed_hard_pairs():
    pytest.importorskip("math_verify")
    verdicts = judge_workers.judge([Pair("corrected", answer, reference) for answer, reference, _ in FIXED])
    wrong = [pair for pair, verdict in zip(FIXED, verdicts, strict=True) if verdict != (pair[2], "")]
    assert wrong == []


# -------------------------------------------------------------------------- pairs made from MATH's own answers

WHOLE, FRACTION = r"(-?)(\d+)", r"(-?)\\frac\{(\d+)\}\{(\d+)\}"
POLYNOMIAL = r"(?=.*x)-?[0-9]*x?(?:\^[2-5])?(?:[+-][0-9]*x?(?:\^[2-5])?)+"
NUMBER = rf"(?:{WHOLE}|{FRACTION})"


def _decimal(found):
    value = Fraction(int(found[2]), int(found[3]))
    places = next((places for places in range(1, 5) if (value * 10**places).denominator == 1), None)
    return places and f"{found[1]}{float(value):.{places}f}"


def _factored(found):
    import sympy

    expanded = sympy.sympify(re.sub(r"(\d)x", r"\1*x", found[0]).replace("^", "**"))
    return sympy.latex(sympy.factor(expanded)) if sympy.factor(expanded) != expanded else None


def _terms(found):
    return "+".join(reversed(re.findall(r"[+-]?[^+-]+", found[0]))).replace("+-", "-").replace("++", "+")


def _elements(found, keep=slice(None, None, -1), opening="", closing=""):
    return opening + ",".join(found[0].removeprefix(opening).removesuffix(closing).split(",")[keep]) + closing


def _matrix(found):
    rows = [row.split("&") for row in found[1].split("\\\\")]
    turned = [list(row) for row in zip(*rows, strict=True)]
    return turned != rows and "\\begin{pmatrix}" + "\\\\".join("&".join(row) for row in turned) + "\\end{pmatrix}"


def _roots_of_square(found):
    return f"{found[1]}\\sqrt{{{int(found[2]) ** 2 * int(found[3])}}}"


LIST = rf"(?!\d{{1,3}}(?:,\d{{3}})+$){NUMBER}(?:,\s*{NUMBER})+"
ROOTS = r"(-?)(\d+)\\sqrt\{(\d+)\}"
MATRIX = r"\\begin\{pmatrix\}((?:(?!begin).)*)\\end\{pmatrix\}"
UNION = r"([^\\]*(?:\\infty|\\frac\{\d+\}\{\d+\})?[^\\]*)\\cup([^\\]*(?:\\infty)?[^\\]*)"
# A name to the form of a reference (spaces left out) and what becomes of it; None or False: no pair.
EQUAL = {
    "dfrac": (r".*\\frac.*", lambda m: m[0].replace("\\frac", "\\dfrac")),
    "slash": (FRACTION, lambda m: f"{m[1]}{m[2]}/{m[3]}"),
    "decimal": (FRACTION, _decimal),
    "tripled fraction": (FRACTION, lambda m: f"{m[1]}\\frac{{{3 * int(m[2])}}}{{{3 * int(m[3])}}}"),
    "minus inside": (FRACTION, lambda m: m[1] and f"\\frac{{-{m[2]}}}{{{m[3]}}}"),
    "point zero": (WHOLE, lambda m: f"{m[0]}.0"),
    "as a fraction": (WHOLE, lambda m: f"\\frac{{{2 * int(m[0])}}}{{2}}"),
    "commas": (WHOLE, lambda m: int(m[2]) > 999 and f"{int(m[0]):,}"),
    "no commas": (r"-?\d{1,3}(?:,(?:\\!)?\d{3})+", lambda m: re.sub(r"\D", "", m[0])),
    "degrees": (NUMBER, lambda m: f"{m[0]}^\\circ"),
    "no degrees": (r"(\d+)\^\\circ", lambda m: m[1]),
    "a unit": (WHOLE, lambda m: f"{m[0]}\\text{{ cm}}"),
    "percent": (r"(\d+)\\%", lambda m: m[1]),
    "dollars": (r".*\\.*", lambda m: f"${m[0]}$"),
    "spaces": (r"[^\\]*[,+=][^\\]*", lambda m: re.sub("([,+=])", r" \1 ", m[0])),
    "left and right": (r"[^\\]*\(.*\)", lambda m: m[0].replace("(", "\\left( ").replace(")", "\\right)")),
    "no left and right": (r".*\\left\(.*", lambda m: m[0].replace("\\left", "").replace("\\right", "")),
    "x =": (NUMBER, lambda m: f"x = {m[0]}"),
    "no text": (r"\\text\{([A-Za-z]+)\}", lambda m: m[1]),
    "one root": (ROOTS, _roots_of_square),
    "root below": (r"\\sqrt\{(\d+)\}", lambda m: f"\\frac{{{m[1]}}}{{\\sqrt{{{m[1]}}}}}"),
    "terms reversed": (POLYNOMIAL, _terms),
    "factored": (POLYNOMIAL, _factored),
    "list reversed": (LIST, _elements),
    "brackets of a matrix": (MATRIX, lambda m: m[0].replace("pmatrix", "bmatrix")),
    "union reversed": (UNION, lambda m: f"{m[2]}\\cup{m[1]}"),
}
UNEQUAL = {
    "other sign": (NUMBER, lambda m: m[0].lstrip("-") if m[0][0] == "-" else m[0] != "0" and f"-{m[0]}"),
    "other sign of all": (POLYNOMIAL, lambda m: f"-({m[0]})"),
    "other digit": (r"(.*)(\d)([^\d]*)", lambda m: f"{m[1]}{(int(m[2]) + 1) % 10}{m[3]}"),
    "upside down": (FRACTION, lambda m: m[2] != m[3] and f"{m[1]}\\frac{{{m[3]}}}{{{m[2]}}}"),
    "times a hundred": (WHOLE, lambda m: m[0] != "0" and f"{m[0]}00"),
    "by a hundred": (WHOLE, lambda m: m[0] != "0" and str(int(m[0]) / 100)),
    "times ten": (FRACTION, lambda m: f"{m[1]}\\frac{{{m[2]}0}}{{{m[3]}}}"),
    "element missing": (LIST, lambda m: _elements(m, slice(1, None))),
    "pair swapped": (
        r"\(([^,()]+),([^,()]+)\)",
        lambda m: m[1] != m[2] and "infty" not in m[0] and f"({m[2]},{m[1]})",
    ),
    "ends swapped": (
        r"([\[(])(-?\d+|-?\\frac\{\d+\}\{\d+\}),(-?\d+|-?\\frac\{\d+\}\{\d+\})([\])])",
        lambda m: m[1] + m[4] != "()" and f"{'(['[m[1] == '(']}{m[2]},{m[3]}{')]'[m[4] == ')']}",
    ),
    "transposed": (MATRIX, _matrix),
    "next root": (r"(.*)\\sqrt\{(\d+)\}(.*)", lambda m: f"{m[1]}\\sqrt{{{int(m[2]) + 1}}}{m[3]}"),
    "higher power": (r"(.*x)\^2(.*)", lambda m: f"{m[1]}^3{m[2]}"),
    "no pi": (r"(\d+)\\pi", lambda m: m[1]),
    "other word": (r"\\text\{([A-Za-z]{3,})\}", lambda m: "\\text{other}"),
    "half of a union": (UNION, lambda m: m[1]),
}
PER_RULE = 12
# What math-verify is known to take for the same, as (answer, reference); a reader may see it otherwise.
LENIENT = [
    ("0.333333", "\\frac{1}{3}"),  # six decimals
    ("3.141593", "\\pi"),
    ("0.5", "50\\%"),
    ("101", "101_2"),  # a base left out
    ("f(x)=x", "x"),
    ("2,3", "(2,3)"),
    ("yes", "\\text{Yes}"),
]


def made_pairs(references):
    """(rule, reference, answer, equal): for each rule, PER_RULE of the references of its form, spread over all."""
    pairs = []
    for rules, equal in ((EQUAL, True), (UNEQUAL, False)):
        for rule, (form, change) in rules.items():
            found = [re.fullmatch(form, reference.replace(" ", "")) for reference in references]
            made = [(rule, match[0], other, equal) for match in found if match and (other := change(match))]
            made = list(dict.fromkeys(made))
            pairs += made[:: -(-len(made) // PER_RULE)]
    return pairs


def test_hard_pairs_made_from_the_references_of_math(real_data):
    pytest.importorskip("math_verify")
    problems = math_references.read(real_data("math") / "MATH_test.jsonl")
    pairs = made_pairs([problem.reference for problem in problems])
    assert len(pairs) >= 300
    verdicts = judge_workers.judge([Pair("corrected", answer, reference) for _, reference, answer, _ in pairs])
    errors = {
        pair[:3] for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.correct != pair[3] or verdict.problem
    }
    print(f"{len(pairs) - len(errors)} of {len(pairs)} pairs judged as meant")
    assert errors == set()


def test_known_leniencies():
    pytest.importorskip("math_verify")
    verdicts = judge_workers.judge([Pair("corrected", answer, reference) for answer, reference in LENIENT])
    assert [verdict.correct for verdict in verdicts] == [True] * len(LENIENT)


# -------------------------------------------------------------------------------------------- workers


def test_a_pair_that_takes_too_long_is_wrong_and_the_next_ones_are_judged():
    pytest.importorskip("math_verify")
    endless = Pair("corrected", "2^{2^{2^{2^{2^{2}}}}} + 1", "(3^{3^{3^{3^{3}}}})!")
    pairs = [Pair("corrected", "1/2", "0.5"), endless, Pair("corrected", "1/3", "0.5")]
    assert judge_workers.judge(pairs, workers=1, time_limit=2.0) == [
        Verdict(True),
        Verdict(False, judge_workers.TIMED_OUT),
        Verdict(False),
    ]


@pytest.mark.parametrize("rule", ["authors", "corrected"])
def test_a_pair_that_takes_too_much_memory_is_wrong_and_the_next_ones_are_judged(rule):
    pytest.importorskip("math_verify")
    pytest.importorskip("resource")
    large = [Pair("authors", text, "5") for text in ("[0]*8*10**8", "(0,)*8*10**8", "[1,2]*8*10**8")]
    right = Pair(rule, "1/2", "\\frac{1}{2}")
    assert judge_workers.judge([right, *large, right], workers=1) == [
        Verdict(True),
        *[Verdict(False, "needed more than 1024 MiB of memory")] * 3,
        Verdict(True),
    ]


def test_a_pair_short_of_memory_in_a_used_worker_is_judged_in_a_new_one(monkeypatch):
    replies = iter([Verdict(True), Verdict(False, judge_workers.OUT_OF_MEMORY), Verdict(True), Verdict(True)])

    def judged(self, pair, time_limit):
        self._process = object()
        return next(replies)

    monkeypatch.setattr(judge_workers._Worker, "_judged", judged)
    monkeypatch.setattr(judge_workers._Worker, "end", lambda self: None)
    pairs = [Pair("authors", str(n), "5") for n in range(3)]
    assert judge_workers.judge(pairs, workers=1) == [Verdict(True)] * 3


def test_without_math_verify_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(corrected_rule.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        corrected_rule.require_math_verify()


@pytest.mark.parametrize(("workers", "time_limit"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_workers_and_time_limit_must_be_above_0(workers, time_limit):
    with pytest.raises(ValueError, match="at least 1 worker"):
        judge_workers.judge([], workers, time_limit)
