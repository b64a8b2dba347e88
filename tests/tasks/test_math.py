"""MATH: which answer a text gives, rows, rewards, and what d1's scripts make of both."""

import time

import pytest

import diffpo
from diffpo.tasks import Math500
from diffpo.tasks.math import final_answer, format_reward
from diffpo.tasks.math_equivalence import MathEquivalence
from diffpo.tasks.mathematics import d1, decide
from diffpo.tasks.task import Grade


@pytest.fixture(scope="module")
def task() -> Math500:
    return Math500()


def test_rows_hold_the_answer_or_a_solution(task):
    assert task.problem_from_row({"problem": "q", "answer": "3", "solution": r"\boxed{4}"}).answer == "3"
    assert task.problem_from_row({"problem": "q", "solution": r"so \boxed{\frac{1}{2}}."}).answer == r"\frac{1}{2}"
    assert task.problem_from_row({"problem": "q", "solution": r"so $\boxed 2$."}).answer == "2"
    assert task.problem_from_row({"problem": "q", "answer": "", "solution": r"\fbox{x}"}).answer == "x"
    with pytest.raises(ValueError, match=r"answer.*columns: problem, level"):
        task.problem_from_row({"problem": "q", "level": 3})


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (0, "0"),
        (0.0, "0.0"),
        (-3, "-3"),
        (2.5, "2.5"),
        (["1", "2"], "1, 2"),
        ([3, r"\frac12"], r"3, \frac12"),
        ("$\\boxed{7}$", "7"),
    ],
)
def test_numbers_and_lists_are_answers(task, answer, gold):
    assert task.problem_from_row({"problem": "q", "answer": answer}).answer == gold


@pytest.mark.parametrize(
    "answer", [True, False, float("nan"), float("inf"), [], [None], ["1", True], {}, " ", "NaN", object()]
)
def test_what_is_no_answer_is_refused(task, answer):
    with pytest.raises(ValueError, match="answer"):
        task.problem_from_row({"problem": "q", "answer": answer})


def test_a_row_without_a_problem_is_refused():
    with pytest.raises(ValueError, match="problem"):
        diffpo.grade("math500", {"answer": "2"}, r"\boxed{2}")


@pytest.mark.parametrize("row", [None, "row", 5, [("problem", "p")]])
def test_a_row_that_is_no_object_is_refused(task, row):
    with pytest.raises(ValueError, match="object with the columns problem and answer"):
        task.problem_from_row(row)


def test_a_list_is_right_in_any_order():
    row = {"problem": "p", "answer": ["1", "2"]}
    assert diffpo.grade("math500", row, r"\boxed{2, 1}").correct is True
    assert diffpo.grade("math500", row, r"\boxed{12}").correct is False


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} no, \boxed{0.5}", "0.5"),  # the last box
        (r"<reasoning>\boxed{3}</reasoning><answer>\boxed{6}</answer> \boxed{7}", "6"),  # in the answer
        (r"<reasoning>\boxed{3}</reasoning><answer>\boxed{6}", "6"),  # cut off
        (r"<reasoning>\boxed{3}</reasoning><answer>6</answer>", "6"),  # the final answer beats a box in the reasoning
        (r"<reasoning>\boxed{3}</reasoning><answer>as above</answer>", "3"),
        (r"<reasoning>x</reasoning><answer>$\frac{1}{2}$</answer>", r"$\frac{1}{2}$"),
        (r"<answer>The area is $5\pi$ square units.</answer>", r"5\pi"),
        (r"<answer>Evelyn</answer>", "Evelyn"),
        ("our answer is $\\boxed 2$.", "2"),
        (r"\fbox{2}", "2"),
        (r"<answer>\boxed {2}</answer>", "2"),
        (r"\boxed{}", ""),
        ("no box", None),
        ("", None),
    ],
)
def test_the_final_answer(text, answer):
    assert final_answer(text) == answer


def test_a_right_answer_without_a_box_is_right(task):
    problem = task.problem_from_row({"problem": "q", "answer": r"\frac{1}{2}"})
    assert task.grade(problem, "<answer>\n0.5\n</answer>") == Grade(2.75, True)
    assert task.grade(problem, r"\boxed{0.5} no, \boxed{1}").correct is False
    assert task.grade(problem, r"\boxed{}").correct is False
    assert "\\boxed{your answer}" in task.prompt(problem)[0]["content"]


@pytest.mark.parametrize("text", [None, 5, b"\\boxed{1}", ["\\boxed{1}"]])
@pytest.mark.parametrize("protocol", ["strict", "d1"])
def test_what_is_no_text_has_no_grade(text, protocol):
    assert diffpo.grade("math500", {"problem": "p", "answer": "1"}, text, protocol) == Grade(None, None)


@pytest.mark.parametrize("protocol", ["strict", "d1"])
@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "\ud800",
            "\x00",
            "<answer>" * 50_000,
            "\\boxed{" * 50_000,
            r"\boxed " * 20_000,
            "$" * 10**5,
            "{" * 10**5,
        ),
        *(
            rf"\boxed{{{content}}}"
            for content in ("(" * 10_000, "9" * 10**5, "1," * 1000, r"\frac" * 300, r"\pm 1" * 300, "-" * 1900)
        ),
        *(
            rf"\boxed{{{content}}}"
            for content in ("1/(" * 600, r"\text{" * 300 + "}" * 300, r"\sqrt " * 300, "x^" * 900, "[1," * 600)
        ),
    ],
    ids=lambda text: f"{text[:12]!r}..{len(text)}",
)
def test_hostile_texts_are_graded_at_once(protocol, text):
    started = time.monotonic()
    assert diffpo.grade("math500", {"problem": "p", "answer": "17"}, text, protocol).correct is not True
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"<answer>\boxed{1}</answer>", 1.0),
        ("<reasoning>\na\nb\n</reasoning>\n<answer>\n\\boxed{1}\n</answer>\n", 1.0),
        (r"\boxed{1} <answer>1</answer>", 0.75),
        (r"\boxed{1}", 0.5),
        (r"\boxed{1} <answer>1", 0.5),
        ("1", 0.25),
    ],
)
def test_format_reward(task, text, reward):
    assert format_reward(text) == reward
    problem = task.problem_from_row({"problem": "q", "answer": "1"})
    assert task.grade(problem, text).reward == reward + 2.0 * (text != "1")


def test_an_undecided_answer_has_no_reward():
    class Undecided(MathEquivalence):
        def many(self, pairs):
            return [None for _ in pairs]

    task = Math500(Undecided())
    problem = task.problem_from_row({"problem": "q", "answer": "1"})
    assert task.grade(problem, r"\boxed{2}") == Grade(None, None)
    assert task.grade(problem, "no box") == Grade(0.25, False)


def test_many_are_graded_together(task):
    golds, texts = ["1", "2", "3", "4"], [r"\boxed{1}", "nothing", r"\boxed{\sum_{k=1}^2 k}", None]
    problems = [task.problem_from_row({"problem": "q", "answer": gold}) for gold in golds]
    assert task.grade_many(problems, texts) == [
        Grade(2.5, True),
        Grade(0.25, False),
        Grade(2.5, True),
        Grade(None, None),
    ]
    assert task.grade_many([], []) == []


# d1: strings are compared


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{4}", "0.25", False),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{3}{56}", r"\tfrac{3}{56}", True),
        ("5", "x=5", True),
        ("5", "abc=5", False),
        (r"90^\circ", "90", True),
        (r"90^\circ", r"90^{\circ}", True),
        (r"10,\!080", "10,080", True),
        (r"10,\!080", "10080", False),
        (r"\$36", "36", True),
        (r"3\sqrt{13}", r"3\sqrt 13", False),
        (r"11\sqrt2", r"11\sqrt{2}", True),
        (r"\left( 3, 4 \right)", "(3,4)", True),
        ("p - q", "-q + p", False),
        (".5", r"\frac{1}{2}", True),
        (r"5.4 \text{ cents}", "5.4", True),
        ("1,2", "2,1", False),
        (r"a/\pi", r"a/\pi", True),  # cannot be normalised, so compared as it stands
        (r"a/\pi", r"a / \pi", False),
        (r"\frac", r"\frac", True),
        (r"\text{ a} \text{ b}", r"\text{ a} \text{ b}", True),
    ],
)
def test_d1_compares_strings(gold, answer, verdict):
    assert d1.equivalent(answer, gold) is verdict


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed 3$ and so on", "3"),
        (r"\boxed {3} more", "{3} more"),
        (r"\fbox{2}", r"\fbox{2}"),
        ("just text", "just text"),
        (r"\boxed{1 <answer>7</answer>", "7"),  # never closed
        (r"\boxed{1", None),
        (r"\boxed{} <answer> 8 </answer> <answer>9</answer>", "8"),
        (r"<answer>\boxed{1}</answer> \boxed{2}", "2"),
    ],
)
def test_d1_reads_the_last_box(text, answer):
    assert d1.final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<reasoning>\na\nb\n</reasoning>\n<answer>\n\\boxed{1}\n</answer>\n", 3.0),
        ("<answer>\\boxed{2}</answer>", 1.0),
        ("\\boxed{1} <answer>1</answer>", 2.75),
        ("\\boxed{1} <answer>\\boxed{1}", 3.0),  # need not be closed
        ("<answer>1</answer> <answer>\\boxed{1}</answer>", 2.75),  # the first counts
        ("\\boxed{1}", 2.5),
        ("1", 2.25),  # without a box, the whole text is the answer
        ("<answer>1</answer>", 0.75),
        ("\\boxed{1", 0.5),
    ],
)
def test_d1_rewards(text, reward):
    assert d1.reward("1", text) == reward
    assert diffpo.grade("math500", {"problem": "p", "answer": "1"}, text, "d1").reward == reward


def test_protocols_differ_in_what_is_right():
    row, text = {"problem": "p", "answer": r"\frac{1}{4}"}, r"<answer>\boxed{0.25}</answer>"
    assert diffpo.grade("math500", row, text) == Grade(3.0, True)
    assert diffpo.grade("math500", row, text, "d1") == Grade(1.0, False)


def test_only_the_strict_verdict_needs_math_verify():
    assert Math500().packages == ("math_verify",)
    assert Math500(protocol="d1").packages == ()


def test_a_congruence_stays_one():
    assert decide(r"x \equiv 3 \pmod 8", r"x \equiv 3 \pmod{8}") is not False
    assert decide("3", r"x \equiv 3 \pmod 8") is None
