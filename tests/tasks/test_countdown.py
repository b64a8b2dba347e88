"""Countdown: split, rewards by hand, and an independent checker."""

import random
import re
from itertools import permutations

import numpy as np
import pytest

from diffpo.tasks import Countdown

TASK = Countdown()
PROBLEM = TASK.problem((7, 3, 11), 32)


def key(problem):
    return tuple(sorted(problem.numbers)), problem.target


def read(prompt):
    numbers, target = prompt.split(" -> ")
    return TASK.problem(map(int, numbers.split()), int(target))


def test_splits_are_disjoint_and_pretraining_sees_all_but_test():
    sizes = {"train": 12797, "validation": 1585, "test": 1622}  # the whole splits
    train, validation, test = ({key(p) for p in TASK.problems(split, n, seed=0)} for split, n in sizes.items())
    examples = {key(read(prompt)) for prompt, _ in TASK.examples(20_000, seed=0)}
    assert (len(train), len(validation), len(test)) == tuple(sizes.values())
    assert len(train | validation | test) == sum(sizes.values())
    assert examples <= train | validation
    assert examples & validation


def test_split_is_frozen():
    """Checkpoints are trained on this split: in every process and release it must be the same."""
    problems = TASK.problems("test", 1622, seed=0)
    assert sum(problem.target for problem in problems) == 49989
    assert sum(sum(problem.numbers) ** 2 for problem in problems) == 1537641


def test_examples_are_correct_and_varied():
    examples = TASK.examples(5000, seed=0)
    assert all(TASK.grade(read(prompt), completion).correct for prompt, completion in examples)
    assert {sign for _, completion in examples for sign in "+-*/" if sign in completion} == set("+-*/")
    second_steps = [completion.split(" , ")[1].split()[0] == completion.split()[4] for _, completion in examples]
    assert 0.2 < np.mean(second_steps) < 0.8  # the first result stands on either side
    first_operands = [prompt.split().index(completion.split()[0]) for prompt, completion in examples]
    assert set(first_operands) == {0, 1, 2}


def test_a_question_without_a_compact_form_has_no_solution():
    question = TASK.problem_from_row({"nums": [1, 2, 3, 4], "target": 6})
    with pytest.raises(ValueError, match="no compact form"):
        TASK.solution(question, np.random.default_rng(0))


def test_solutions_cover_every_way():
    rng = np.random.default_rng(0)
    found = {TASK.solution(TASK.problem((1, 2, 3), 6), rng) for _ in range(500)}
    assert {"1 + 2 = 3 , 3 + 3 = 6", "2 * 3 = 6 , 6 / 1 = 6", "1 * 2 = 2 , 3 * 2 = 6"} <= found


def test_own_problems():
    assert key(TASK.problem(np.array([20, 1, 20]), np.int64(99))) == ((1, 20, 20), 99)
    unsolvable = TASK.problem([1, 1, 1], 99)
    assert TASK.grade(unsolvable, "1 + 1 = 2 , 2 + 1 = 3").reward == 0.1
    with pytest.raises(ValueError, match="1 1 1 -> 99"):
        TASK.solution(unsolvable, np.random.default_rng(0))
    for numbers, target in [((0, 1, 2), 3), ((1, 2, 21), 3), ((1, 2), 3), ((1, 2, 3, 4), 3), ((1, 2, 3), 0)]:
        with pytest.raises(ValueError, match=r"in 1\.\."):
            TASK.problem(numbers, target)
    with pytest.raises(TypeError):
        TASK.problem((1, 2, 3.5), 3)


def test_prompts():
    assert TASK.prompt(PROBLEM) == "7 3 11 -> 32"
    assert "[7, 3, 11]" in TASK.asked("chat").prompt(PROBLEM)[0]["content"]
    assert "32" in TASK.asked("chat").prompt(PROBLEM)[0]["content"]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7 * 3 = 21 , 21 + 11 = 32", 1),
        ("3*7=21,11+21=32", 1),
        ("7 * 3 = 22 , 22 + 11 = 33", 0.1),  # false
        ("7 * 3 = 21 , 21 + 11 = 33", 0.1),  # false
        ("7 + 3 = 10 , 10 + 11 = 21", 0.1),  # true, wrong target
        ("3 + 11 = 14 , 14 + 18 = 32", 0.1),  # a number not given
        ("7 + 14 = 21 , 21 + 11 = 32", 0.1),  # a number not given
        ("11 + 11 = 22 , 22 + 10 = 32", 0.1),  # a number used twice
        ("7 + 7 = 14 , 14 + 18 = 32", 0.1),  # a number used twice
        ("7 * 3 = 21 , 16 + 16 = 32", 0.1),  # the intermediate not used
        ("3 + 7 = 10 , 21 + 11 = 32", 0.1),  # another number instead of the intermediate
        ("7 / 0 = 7 , 7 + 11 = 18", 0.1),
        ("7 / 3 = 2 , 2 + 11 = 13", 0.1),  # not exact
        ("7 * 3 = 21 , 21 + 11 =", 0),
        ("7 * 3 = 21 21 + 11 = 32", 0),
        ("7 * 3 = 21 , 21 + 11 = 32 , 32", 0),
        ("7 * 3 + 11 = 32", 0),
        ("3 - 7 = -4 , 11 + -4 = 7", 0),
        ("\u0667 * 3 = 21 , 21 + 11 = 32", 0),  # a digit, but not an ASCII one
        ("9999999999 + 1 = 1 , 1 + 1 = 2", 0),
        ("7 3 11 -> 32", 0),
        ("", 0),
    ],
)
def test_compact_rewards(text, reward):
    assert TASK.grade(PROBLEM, text).reward == reward
    assert TASK.grade(PROBLEM, text).correct == (reward == 1)


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("7 * 3 + 11", 1),
        ("(3*7)+11 = 32", 1),
        ("11 + 7*3 = 5", 1),  # only the expression counts
        ("11 - -(7 * 3)", 1),
        ("7 * 3", 0.1),  # a number missing
        ("7 * 3 + 11 + 11 - 11", 0.1),  # a number reused
        ("73 - 11 - 30", 0.1),  # numbers not given
        ("32", 0.1),
        ("7 / (3 - 3) + 11", 0.1),
        ("3 * 7 ** 1 + 11", 0.1),
        ("\\boxed{7 * 3 + 11}", 1),
        ("7 \u00d7 3 + 11", 1),
        ("\u0667 * 3 + 11", 0.1),
        ("= 32", 0.1),
        ("7 * 3 = 21 , 21 + 11 = 32", 0.1),  # the compact form has no place here
        ("(" * 10_000 + "7 * 3 + 11" + ")" * 10_000, 0.1),
        ("9" * 100_000, 0.1),
        ("  \n", 0),
        ("", 0),
    ],
)
def test_chat_rewards(answer, reward):
    text = f"7 times 3 is 21.\n</reasoning>\n<answer>\n{answer}\n</answer>"
    assert TASK.grade(PROBLEM, text).reward == reward
    assert TASK.grade(PROBLEM, text).correct == (reward == 1)


def test_near_is_not_equal():
    problem = TASK.problem_from_row({"nums": [1, 999999, 3], "target": 3})
    assert not TASK.grade(problem, "<answer>1 / 999999 + 3</answer>").correct


def test_both_published_forms_are_the_same_problem():
    d1, jiayi_pan = {"input": "30,100,93", "output": "23"}, {"nums": [30, 100, 93], "target": 23}
    assert TASK.problem_from_row(d1) == TASK.problem_from_row(jiayi_pan)


@pytest.mark.parametrize(
    "row",
    [
        *({}, {"input": "1,2"}, {"nums": [1, 2]}, {"input": "1", "output": "1"}, {"nums": "123", "target": 1}),
        *({"nums": [1, 2.5], "target": 1}, {"nums": [1, True], "target": 1}, {"nums": [1, [2]], "target": 1}),
        *(
            {"nums": {"1": 2, "2": 3}, "target": 1},
            {"input": "1,2", "output": "nan"},
            {"input": "1,1_0", "output": "1"},
        ),
        {"nums": [1, 10**10], "target": 1},
    ],
    ids=str,
)
def test_other_rows_are_refused(row):
    with pytest.raises(ValueError, match=r"columns|must be numbers"):
        TASK.problem_from_row(row)


def test_first_step_may_not_borrow_its_own_result():
    problem = TASK.problem((1, 3, 11), 33)
    assert TASK.grade(problem, "21 * 1 = 21 , 3 * 11 = 33").reward == 0.1
    assert TASK.grade(problem, "3 * 1 = 3 , 3 * 11 = 33").reward == 1


def test_chat_values_are_exact():
    """12 * 15 / 20 = 9 passes through 180 or a fraction, which only the chat form allows."""
    problem = TASK.problem((12, 15, 20), 9)
    for answer in ("12 * 15 / 20", "12 / 20 * 15", "12 / (20 / 15)"):
        assert TASK.grade(problem, f"<answer>{answer}</answer>").correct


def test_untagged_chat_text_is_no_answer():
    assert TASK.grade(PROBLEM, "The answer is 7 * 3 + 11 = 32").reward == 0
    assert TASK.grade(PROBLEM, "7 * 3 + 11").reward == 0
    assert TASK.grade(PROBLEM, "<answer>7 * 3 + 11").reward == 1  # never closed, but an answer
    assert TASK.grade(PROBLEM, "<answer>7 * 3 + 1").reward == 0.1
    assert TASK.grade(PROBLEM, r"so \boxed{7 * 3 + 11}\n</answer>").reward == 1
    assert TASK.grade(PROBLEM, r"\boxed{7 * 3 + 11} <answer>7 * 3</answer>").reward == 0.1
    assert TASK.grade(PROBLEM, "<answer>7 * 3</answer> no: <answer>7 * 3 + 11</answer>").reward == 1


def accepted_by_definition(problem, text):
    """Tries every order of the numbers, and reads the equations as Python."""
    steps = re.split(r"[=,]", text)
    if len(steps) != 4 or not re.fullmatch(r"[0-9]+ . [0-9]+ = [0-9]+ , [0-9]+ . [0-9]+ = [0-9]+", text):
        return False
    middle, last = int(steps[1]), int(steps[3])
    for a, b, c in permutations(problem.numbers):
        first = {f"{a} {sign} {b} " for sign in "+-*/"}
        second = {f" {x} {sign} {y} " for x, y in ((middle, c), (c, middle)) for sign in "+-*/"}
        try:
            if steps[0] in first and steps[2] in second and eval(steps[0]) == middle and eval(steps[2]) == last:
                return last == problem.target
        except ZeroDivisionError:
            pass
    return False


def with_true_results(text):
    """The words of a completion, with the results that its two left sides really have, where they are whole numbers."""
    text = list(text)
    for i in (0, 6):
        left, sign, right = text[i : i + 3]
        if left.isdigit() and right.isdigit() and sign in "+-*/" and (sign, right) != ("/", "0"):
            value = eval(left + sign + right)
            text[i + 4] = str(int(value)) if value == int(value) >= 0 else text[i + 4]
    return text


def test_agrees_with_an_independent_checker_on_mutated_solutions():
    random_words = random.Random(0)
    words = [*TASK.vocabulary, *("=,+-*/" * 4)]
    verdicts = []
    for prompt, completion in TASK.examples(3000, seed=5):
        problem, text = read(prompt), completion.split()
        for _ in range(random_words.randrange(3)):
            if random_words.random() < 0.5:
                text[random_words.randrange(len(text))] = random_words.choice(words)
            else:  # a swap often keeps the completion right
                i = random_words.choice((0, 6))
                text[i], text[i + 2] = text[i + 2], text[i]
        if random_words.random() < 0.5:  # true equations that reach the target, with the wrong numbers perhaps
            text = with_true_results(text)
            target = int(text[10]) if text[10].isdigit() else 0
            problem = TASK.problem(problem.numbers, target) if 1 <= target <= 99 else problem
        verdicts.append(TASK.grade(problem, " ".join(text)).correct)
        assert verdicts[-1] == accepted_by_definition(problem, " ".join(text)), (prompt, text)
    assert 0.2 < np.mean(verdicts) < 0.8
