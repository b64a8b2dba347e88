"""GSM8K: reading numbers, and the published training reward by hand."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffpo.tasks import GSM8K
from diffpo.tasks.d1 import is_soft_format, is_strict_format
from diffpo.tasks.gsm8k import read_number, tag_reward

TASK = GSM8K()
ROW = {"question": "How many?", "answer": "2 + 70 = <<2+70=72>>72\n#### 72"}
PROBLEM = TASK.problem_from_row(ROW)
PERFECT = "<reasoning>\nwhy\n</reasoning>\n<answer>\n72\n</answer>\n"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### -3", "-3"),
        ("#### $5", "5"),
        ("2#### 0.50", "0.5"),
        ("#### -1,234.5", "-1234.5"),
        ("#### -$1,000", "-1000"),
        ("#### \u22127", "-7"),
        ("#### .25", "0.25"),
    ],
)
def test_the_reference_answer_stands_behind_the_mark(answer, number):
    assert TASK.problem_from_row({"question": "q", "answer": answer}).answer == Decimal(number)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "72",
            "####",
            "#### many",
            "",
            "#### NaN",
            "#### inf",
            "#### -inf",
            "#### sNaN",
            "#### 2,5",
            "#### 1,23",
            "#### 1_000",
        ),
        *("#### 1,2345", "#### --5", "#### 1.2.3", "#### 1e400", "#### \u0667", "#### 3/4", "#### 9" + "9" * 10**5),
    ],
    ids=lambda answer: answer[:12],
)
def test_a_reference_answer_without_a_number_is_an_error(answer):
    with pytest.raises(ValueError, match="####"):
        TASK.problem_from_row({"question": "q", "answer": answer})


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{72}", "72"),
        (r"\boxed{72 of 100}", "72"),  # the first number in a box ...
        (r"<answer>3 and then 72</answer>", "72"),  # ... but the last one in the tags
        (r"\boxed{5} <answer>\boxed{72}</answer>", "72"),  # the final answer beats a box in the reasoning
        (r"\boxed{5} <answer></answer>", "5"),
        (r"\boxed{5} <answer>I do not know</answer>", None),
        (r"\boxed{5} </answer>", "5"),
        (r"<answer>\boxed{72}", "72"),  # never closed
        ("<answer>72\n</ans", "72"),
        (r"<answer>\boxed{72}<answer>", "72"),
        (r"<answer>\boxed{5}</answer> <answer>\boxed{72}</answer>", "72"),
        ("So the answer is 72.", "72"),
        ("<reasoning>\n#### 72", "72"),
        ("<reasoning> 3 * 24 = 72", None),  # a step, not an answer
        (r"\boxed{...} \boxed{72}", "72"),
        (r"\boxed{x \boxed{} y} \boxed{72}", "72"),
        (r"\boxed{none} <answer>72</answer>", "72"),
        (r"\boxed{\$1,234.50}", "1234.50"),
        (r"\boxed{1,2}", None),
        (r"\boxed{12,3456}", None),
        (r"\boxed{-4}", "-4"),
        (r"\boxed{72.0}", "72"),
        ("72", None),
        ("<answer>many</answer>", None),
        (r"\boxed{72", None),
        (r"\boxed{" + "9" * 10**5 + "}", None),
    ],
)
def test_the_number_of_a_text(text, number):
    assert read_number(text) == (None if number is None else Fraction(number))


def test_correct_compares_values():
    assert TASK.grade(PROBLEM, r"\boxed{72.00}").correct
    assert not TASK.grade(PROBLEM, r"\boxed{720}").correct
    assert not TASK.grade(PROBLEM, "nothing").correct


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (PERFECT, 4.0),
        (PERFECT.replace("72", "71"), 2.0),
        (PERFECT.replace("72", "about 72"), 3.5),
        (PERFECT.replace("72", "\\boxed{72}"), 4.0),
        (PERFECT.removesuffix("\n"), 3.5),  # strict format wants the line end
        (PERFECT + "x" * 100, 0.5 - 0.1 + 0.5 + 0.5 + 2.0),  # nothing may follow in the strict format
        ("<reasoning>why</reasoning><answer>72</answer>", 0.5 + 0.5 + 2.0),
        (PERFECT.replace("<reasoning>\n", ""), 0.375 + 0.5 + 2.0),
        (PERFECT + PERFECT, 0.5 + 0.5 + 0.5 + 2.0),  # every tag twice: none counts
        (r"\boxed{72}", 2.0),
        ("", 0.0),
    ],
)
def test_reward_is_the_published_sum(text, reward):
    assert TASK.grade(PROBLEM, text).reward == pytest.approx(reward)


def test_the_perfect_text_has_every_part():
    assert (tag_reward(PERFECT), is_soft_format(PERFECT), is_strict_format(PERFECT)) == (0.5, True, True)
    assert not is_soft_format("</reasoning><answer>1</answer>")
    assert not is_soft_format("<reasoning></reasoning> text <answer>1</answer>")
    assert is_soft_format("<reasoning></reasoning> </reasoning>\n<answer>1</answer> rest")
    assert not is_strict_format(
        "<reasoning>\n</reasoning>\n<answer>\n</answer>\n"
    )  # the lines may not share their ends


@pytest.mark.parametrize(
    ("question", "number"),
    [
        ("How many dozen eggs?", 5),
        ("How many eggs?", 60),
        ("What is it, in dozens?", 5),
        ("A dozen eggs cost $2. How many?", 60),
    ],
)
def test_a_scale_word_that_the_question_counts_in_is_a_unit(question, number):
    problem = TASK.problem_from_row({"question": question, "answer": f"#### {number}"})
    assert TASK.grade(problem, r"<answer>\boxed{5 dozen}</answer>").correct


def test_published_answers_and_their_solutions_are_right():
    solution = "He pays 2 * 3 = $<<2*3=6>>6.\nThe change is $10 - $6 = $<<10-6=4>>4 in 2 coins.\n#### 4"
    problem = TASK.problem_from_row({"question": "q", "answer": solution})
    assert TASK.grade(problem, solution).correct
    assert TASK.grade(problem, f"<answer>{solution}</answer>").correct
    assert TASK.grade(problem, f"<answer>{solution.rpartition('####')[0]}</answer>").correct


PIECES = [
    "<reasoning>",
    "</reasoning>",
    "<answer>",
    "</answer>",
    "\n",
    "\\boxed{",
    "}",
    "72",
    ",",
    ".",
    " ",
    "\u0664",
    "\ud800",
]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_text_has_a_reward(text):
    reward = TASK.grade(PROBLEM, text).reward
    assert reward <= 4
    assert (reward >= 2 - 0.001 * len(text)) if TASK.grade(PROBLEM, text).correct else reward <= 2


@pytest.mark.parametrize(
    "text", ["<reasoning>" + "</reasoning> " * 10**5, "\\boxed{" * 10**5, "<answer>" + "1," * 10**5]
)
def test_hostile_texts_are_wrong_at_once(text):
    assert not TASK.grade(PROBLEM, text).correct
    assert TASK.grade(PROBLEM, text).reward < 1


def test_chat_asks_for_a_box_after_the_format():
    turn, _ = TASK.prompt(PROBLEM)
    assert turn["role"] == "user"
    assert turn["content"].endswith("How many?")
    assert "\\boxed{your answer}\n</answer>" in turn["content"]
