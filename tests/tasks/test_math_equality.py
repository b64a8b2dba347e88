"""Which answers are equal: a table of pairs, each kind of mistake by itself, and every published reference against its spellings."""

import itertools
import threading

import pytest
from math_answers import EQUAL, UNEQUAL

from diffpo.tasks.math_equivalence import MathEquivalence
from diffpo.tasks.mathematics import decide
from diffpo.tasks.mathematics.expression import parse
from diffpo.tasks.mathematics.plain import plain
from diffpo.tasks.mathematics.values import equal_functions, equal_numbers

PAIRS = [
    (gold, answer, verdict)
    for verdict, table in ((True, EQUAL), (False, UNEQUAL))
    for gold in table
    for answer in table[gold]
]


@pytest.fixture(scope="module")
def equal() -> MathEquivalence:
    return MathEquivalence()


@pytest.mark.parametrize(("gold", "answer", "verdict"), PAIRS)
def test_pairs(equal, gold, answer, verdict):
    assert equal(gold, answer) is verdict


@pytest.mark.parametrize("gold", EQUAL)
def test_every_answer_equals_itself_in_other_clothes(gold):
    for answer in (
        f" {gold} ",
        f"${gold}$",
        rf"\({gold}\)",
        rf"\boxed{{{gold}}}",
        rf"\displaystyle {gold}",
        f"**{gold}**",
    ):
        assert decide(gold, answer) is True, answer
    for old, new in (
        ("\\frac", "\\dfrac"),
        ("-", "\N{MINUS SIGN}"),
        ("\\pi", "\N{GREEK SMALL LETTER PI}"),
        ("(", "\\left("),
        (")", "\\right)"),
    ):
        if "\\left" not in gold and "\\right" not in gold and "\\text{" not in gold:
            assert decide(gold, gold.replace(old, new)) is True, new


def test_different_golds_of_one_kind_are_unequal():
    golds = [
        r"\frac{1}{2}",
        "0.6",
        r"\sqrt{2}",
        r"\pi",
        "3 - 2i",
        "x + 1",
        "(1, 2)",
        "1, 2",
        "[1, 2]",
        "52_8",
        r"\text{east}",
        "y = 2x",
        "-x",
    ]
    for gold, answer in itertools.permutations(golds, 2):
        if "1, 2" not in (gold, answer) or not {gold, answer} & {"(1, 2)", "[1, 2]"}:  # brackets may be left out
            assert decide(gold, answer) is False, (gold, answer)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2^{5000}", "1/2^{5001}"),
        (r"\sqrt2+10^{-300}", r"\sqrt2"),
        (r"e^{-10^4}", "0"),
        (r"\pi^{100}+1", r"\pi^{100}"),
    ],
)
def test_close_numbers_are_told_apart(a, b):
    assert equal_numbers(parse(plain(a)), parse(plain(b))) is False


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\sqrt{2}\sqrt{3}-\sqrt{6}", "0"),
        (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
        (r"\sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5}", "1"),
        (r"4\arctan\frac15-\arctan\frac{1}{239}", r"\frac{\pi}{4}"),
        (r"e^{i\pi}+1", "0"),
    ],
)
def test_equal_numbers_of_different_form(a, b):
    assert equal_numbers(parse(plain(a)), parse(plain(b))) is True


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ("(x+1)^3", "x^3+3x^2+3x+1", True),
        (r"\sqrt{x^2}", "|x|", True),
        (r"\sqrt{x^2}", "x", False),
        (r"\ln x^2", r"2\ln x", True),  # where both are real
        (r"\frac{\sin 2x}{2\sin x}", r"\cos x", True),
        ("x^{100}", "x^{99}", False),
        ("x!", "x", False),
        (r"\sqrt{-1-x^2}", r"\sqrt{-1-x^2}+1", None),  # nowhere real
    ],
)
def test_functions_are_compared_at_points(a, b, verdict):
    assert equal_functions(parse(plain(a)), parse(plain(b))) is verdict


def test_verdicts_do_not_depend_on_threads():
    pairs = [(r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt6}"), (r"\pi", "3.14"), (r"\sin^2 x", r"1-\cos^2 x")] * 5
    results = []
    threads = [threading.Thread(target=lambda: results.append([decide(*pair) for pair in pairs])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True, False, True] * 5] * 4
