"""\\boxed{} in texts of a model."""

import pytest

from diffpo.tasks.boxed import boxed_spans, last_boxed


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("no box", None),
        (r"\boxed{7}", "7"),
        (r"so \boxed{ \frac{1}{2} } then", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2", "1"),  # cut off by the length of the generation
        (r"\boxed {3}", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \\ {b}}", r"a \\ {b}"),
        (r"} } \boxed{4} }", "4"),
        (r"{\boxed{5}}", "5"),
        (r"\boxed{outer \boxed{inner} end}", "inner"),
        (r"\boxed{}", ""),
        (r"our answer is $\boxed 2$.", "2"),  # without braces: a number, a command with its arguments, a letter
        (r"\boxed 12, so", "12"),
        (r"\boxed 1,234.5.", "1,234.5"),
        (r"\boxed -3$", "-3"),
        (r"\boxed\frac12$", r"\frac12"),
        (r"\boxed\dfrac{1}{2}.", r"\dfrac{1}{2}"),
        (r"\boxed\frac{\sqrt{3}}{2}x", r"\frac{\sqrt{3}}{2}"),
        (r"\boxed\sqrt[3]{2}$", r"\sqrt[3]{2}"),
        (r"\boxed\text{Yes}.", r"\text{Yes}"),
        (r"$\boxed\pi$", r"\pi"),
        (r"\boxed x$", "x"),
        (r"\boxed (1, 2)$", "(1, 2)"),
        (r"\boxed{3} inside \boxed.", "3"),  # talks about a box
        (r"\fbox{2}", "2"),
        (r"\fbox 2", "2"),
        (r"\\boxed{5}", "5"),  # a text that was escaped twice
        (r"x \\\boxed{6}", "6"),  # after a line break
        (r"\boxedx{7}", None),
        (r"write \boxed around it", None),
    ],
)
def test_the_last_box(text, last):
    assert last_boxed(text) == last


def test_spans_are_in_order_and_nested_ones_stand_behind_their_outer_one():
    text = r"\boxed{a\boxed{b}} \boxed{c}"
    assert [text[slice(*span)] for span in boxed_spans(text)] == [r"a\boxed{b}", "b", "c"]


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 50_000,
        "\\boxed\\frac{" * 20_000,
        "\\boxed(" * 20_000,
        "\\boxed{" * 30_000 + "}" * 30_000,
        "{" * 10**6,
        "\\" * 10**6,
    ],
)
def test_hostile_texts_are_read_at_once(text):
    assert len(boxed_spans(text)) <= 30_000
