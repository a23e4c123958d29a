"""The published rule, with its known defects: each of these is a verdict that the authors' scripts give."""

from __future__ import annotations

import pytest

import authors_rule
import math_references


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: 18", "18"),
        ("#### 17\nThe answer is: $18 in all", "18"),
        ("The answer is: 1. The answer is: 2.", "2"),
        ("The answer is: -3", "-3"),
        ("The answer is: 1,234", "1234"),
        ("The answer is: 1,234,567", "1234"),
        ("The answer is: 2.5", "2"),
        ("The answer is: 3.5", "4"),
        ("The answer is: 1/3", "0"),
        ("The answer is: 5/2", "2"),
        ("The answer is: 7/0", "7"),
        ("The answer is: 7/00", None),
        ("The answer is: /5", None),
        ("The answer is: " + "9" * 400, None),
        ("The answer is: five", None),
        ("The answer is 18", None),
        ("The answer is:18", None),
        ("#### 18", None),
        ("\\boxed{18}", None),
        ("### Response: The answer is: 18", None),
        ("The answer is: 18\n\n### Instruction:\nThe answer is: 19", "18"),
    ],
)
def test_the_number_that_the_scripts_see(text, answer):
    assert authors_rule.extract(text, "gsm8k") == answer


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("18", "18", True),
        ("1,234", "1,234", True),
        ("1800", "18", True),
        ("0.18", "18", False),  # rounded to 0 before
        ("100", "10000", True),
        ("10001", "10000", True),
        ("10002", "10000", False),
        ("1,450,000", "1,450,000", False),
        ("18.4", "18", True),
        ("19", "18", False),
    ],
)
def test_gsm8k(answer, reference, right):
    assert authors_rule.is_correct(f"The answer is: {answer}", reference, "gsm8k") is right


def test_a_gsm8k_reference_must_be_a_number():
    with pytest.raises(ValueError, match="needs a number"):
        authors_rule.is_correct("The answer is: 5", "five", "gsm8k")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: \\frac{1}{2}.", "\\frac{1}{2}"),
        ("The answer is: 3.\nSo it is.", "3"),
        ("The answer is: 3\nSo it is.", "3\nSo it is"),
        ("The answer is: .", ""),
        ("The answer is: 3..", "3."),
        ("The final answer is 3", None),
    ],
)
def test_the_text_that_the_scripts_see(text, answer):
    assert authors_rule.extract(text, "math") == answer


RIGHT = [  # answer, reference
    ("1/2", "\\frac{1}{2}"),
    ("0.5", "\\frac12"),
    (".5", "\\dfrac{1}{2}"),
    ("\\tfrac1{72}", "\\frac{1}{72}"),
    ("x=5", "5"),
    ("5", "5\\text{ cm}"),
    ("90", "90^\\circ"),
    ("10,000", "10000"),
    ("10000", "10,\\!000"),
    ("50", "50\\%"),
    ("\\$5", "5"),
    ("\\sqrt3", "\\sqrt{3}"),
    ("(1, 2)", "\\left(1,2\\right)"),
    ("x+1", "1+x"),
    ("(x-1)*(x+1)", "x**2-1"),
    ("2*sqrt(3)", "sqrt(12)"),
    # defects
    ("\\sqrt", "42"),
    ("\\frac", "42"),
    ("x/2", "42"),
    ("1.5/2", "42"),
    ("1\\text{ a}\\text{ b}", "42"),
    ("42", "x/2"),
    ("1800", "18"),
    ("0.18", "18"),
    ("0.7", "70"),
    ("10001", "10000"),
    ("\\frac{12}{3}", "\\frac{1}{23}"),
    ("x(y+1)", "x(y)+1"),
    ("(1,2)", "(1,2]"),
    ("(100,200)", "(1,2)"),
    ("3.1416", "pi"),
    ("2^3", "1*1"),
]
WRONG = [
    ("", "42"),
    ("3", "4"),
    ("0.5", "50"),  # 0.5, of all decimals, is made a fraction first
    ("2,1", "1,2"),
    ("[1,2]", "(1,2)"),
    ("\\sqrt{12}", "2\\sqrt{3}"),  # LaTeX is not read
    ("\\frac{2}{4}", "\\frac{1}{2}"),
    ("$7x$", "7x"),
    ("\\text{Monday}", "Monday"),
    ("03/4", "\\frac{3}{4}"),
    ("x**2", "x**3"),
]


@pytest.mark.parametrize(("pairs", "right"), [(RIGHT, True), (WRONG, False)])
def test_math(pairs, right):
    for answer, reference in pairs:
        got = authors_rule.is_correct(f"The answer is: {answer}", reference, "math")
        assert got is right, (answer, reference)


@pytest.mark.parametrize(
    "text",
    [
        "open(1)",
        "exec(chr(49))",
        "().__class__",
        "x.name",
        "x . name",
        "'1'",
        "1or input()",
        "ｅxec(1)",
        "preview(x)",
        "f`x`",
        "x\\\n.name",
    ],
)
def test_an_answer_is_never_run_as_a_program(text, monkeypatch):
    from sympy.parsing import sympy_parser

    def refuse(*_, **__):
        raise AssertionError(f"{text} was evaluated")

    monkeypatch.setattr(sympy_parser, "eval_expr", refuse)
    assert authors_rule._read(text) is text
    with pytest.raises(ValueError, match="not read"):
        authors_rule._value(text)


def test_the_references_as_answers(real_data):
    problems = math_references.read(real_data("gsm8k") / "test.jsonl")
    wrong = [p.reference for p in problems if not authors_rule.is_correct(f"The answer is: {p.reference}", *p[2:4])]
    assert wrong == ["1,450,000"]
    problems = math_references.read(real_data("math") / "MATH_test.jsonl")
    wrong = [p.reference for p in problems if not authors_rule.is_correct(f"The answer is: {p.reference}.", *p[2:4])]
    assert wrong == []


def test_no_reference_of_math_accepts_any_answer(real_data):
    for problem in math_references.read(real_data("math") / "MATH_test.jsonl"):
        authors_rule.tidy(problem.reference)  # raises where it would
