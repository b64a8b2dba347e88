"""The evaluator of model-written expressions: exact, bounded, and closed to everything else."""

import operator
import re
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffpo.tasks.arithmetic import MAX_DEPTH, MAX_LENGTH, evaluate

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def combine(children):
    """(text, value or None if undefined, numbers) of a parenthesised binary operation."""

    def build(left, sign, right):
        undefined = left[1] is None or right[1] is None or (sign == "/" and right[1] == 0)
        value = None if undefined else OPERATIONS[sign](left[1], right[1])
        return f"({left[0]} {sign} {right[0]})", value, left[2] + right[2]

    return st.builds(build, children, st.sampled_from("+-*/"), children)


LEAVES = st.integers(0, 30).map(lambda number: (str(number), Fraction(number), [number]))
EXPRESSIONS = st.recursive(LEAVES, combine, max_leaves=10).filter(lambda e: len(e[0]) <= MAX_LENGTH)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS)
def test_agrees_with_fractions_on_random_trees(expression):
    text, value, numbers = expression
    if value is None:
        with pytest.raises(ZeroDivisionError):
            evaluate(text)
    else:
        assert evaluate(text) == (value, numbers)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of Python, about the same texts
@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["1", "2", "30", "+", "-", "*", "/", "(", ")", " "]), max_size=9).map("".join))
def test_accepts_what_python_accepts(text):
    assume(not re.search("[0-9]{10}", text))
    expected = None
    if "**" not in text and "//" not in text:  # Python's, but not ours; and a power could run for ever
        with suppress(SyntaxError, TypeError, ZeroDivisionError):
            expected = eval(re.sub("([0-9]+)", r"F(\1)", text).strip(), {"F": Fraction})
    if isinstance(expected, Fraction):  # () is a tuple to Python
        assert evaluate(text)[0] == expected
    else:
        with pytest.raises((ValueError, ZeroDivisionError)):
            evaluate(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 - 2 - 3", -4),
        ("12 / 3 / 2", 2),
        ("2 + 3 * 4", 14),
        ("-(2 - 5) * --2", 6),
        ("8 / (3 - 8 / 3)", 24),
        ("1 / 3", Fraction(1, 3)),
    ],
)
def test_precedence_and_associativity(text, value):
    assert evaluate(text)[0] == value


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "1 +", "* 1", "1 2", "()", "(1", "1)", "2 ** 3", "7 // 2", "1.5", "07", "1e3", "1_000", "0x1"),
        *("abs(1)", "__import__('os')", "x", "\u0663 + 1", "\u00b2", "1 \u00d7 2", "\x00", "1,2", "1 = 1"),
        "1" * 10,
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "(" * 10_000 + "1" + ")" * 10_000,
        "1" + "+1" * MAX_LENGTH,
    ],
)
def test_rejects_everything_else(text):
    with pytest.raises(ValueError, match=r"unexpected|missing|at most"):
        evaluate(text)


def test_bounds_are_inclusive():
    assert evaluate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH)[0] == 1
    assert evaluate("-" * (MAX_LENGTH - 1) + "1")[0] == -1
    assert evaluate("999999999" + "*999999999" * 24)[0] == 999999999**25
