"""Protocol "d1": what d1's own scripts say, worked out by hand from them."""

import pytest

from diffpo import grade
from diffpo.tasks import Task, get_task
from diffpo.tasks.d1 import countdown_expression, gsm8k_number, sudoku_cells, xml_count

GSM8K = {"question": "q", "answer": "x\n#### 1,234"}
COUNTDOWN = {"input": "30,100,93", "output": "23"}
SUDOKU = {"Puzzle": "0302201030204030", "Solution": "1342241331244231"}
CHAT = "<reasoning>\nwhy\nand how\n</reasoning>\n<answer>\n{}\n</answer>\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{5} <answer>\boxed{72}</answer>", 5),  # the first box, wherever it stands
        (r"\boxed{...} \boxed{} \boxed{x} \boxed{6}", 6),
        (r"\boxed{\text{about} 72 of 100}", None),  # a box ends at the first brace
        (r"\boxed{9{,}500}", 9),
        (r"\boxed{1,234}", 1),
        (r"\boxed{1e3}", 1000),
        ("\\boxed{7\n2} <answer>3 and 72</answer>", 72),  # a box stays on its line
        ("<answer>5</answer> <answer>72</answer>", 5),
        ("<answer>72", None),
        ("72", None),
    ],
)
def test_gsm8k_numbers(text, number):
    assert gsm8k_number(text) == number


def test_gsm8k_rewards():
    perfect = CHAT.format("1,234")
    assert grade("gsm8k", GSM8K, perfect, "d1").reward == pytest.approx(0.5 + 0.5 + 0.5 + 2.0)  # no integer: a comma
    assert grade("gsm8k", GSM8K, CHAT.format("1234"), "d1").reward == pytest.approx(2.0)  # another string
    assert grade("gsm8k", GSM8K, CHAT.format("1234"), "d1").correct
    assert not grade("gsm8k", GSM8K, perfect, "d1").correct  # the last number after the comma, 234
    assert grade("gsm8k", GSM8K, CHAT.format(r"\boxed{1234}"), "d1").reward == pytest.approx(1.5)
    assert grade("gsm8k", GSM8K, perfect + "\n", "d1").reward == pytest.approx(3.5 - 0.002)  # the pattern's $


def test_gsm8k_counts_the_whole_text_where_the_last_line_does_not_end():
    text = CHAT.format("5").removesuffix("\n")
    assert xml_count(text) == pytest.approx(0.5 - 0.001 * len(text) + 0.001)


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (r"\boxed{1+2} <answer>3+4</answer> \boxed{5 \times 6}", "5 * 6"),  # the last box, wherever it stands
        ("<answer>1+2</answer> <answer>3+4</answer>", "1+2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1+2 <answer>3+4</answer>", "3+4"),  # never closed
        (r"\boxed 1+2$ is", "1+2"),
        ("<answer>it is 1+2 = 3</answer>", "1+2"),
        ("<answer>3 = 1+2</answer>", "3"),
        ("1+2", "1+2"),
    ],
)
def test_countdown_expressions(text, expression):
    assert countdown_expression(text).strip() == expression


@pytest.mark.parametrize(
    ("answer", "reward", "correct"),
    [
        ("30+93-100", 1, True),
        (r"\boxed{30+93-100}", 0.1, True),  # the training code reads no box
        ("30+93-100 = 24", 0.1, True),  # and no equation; the evaluation strips what follows
        (r"93 - (100 \times 1 - 30)", 0.1, False),
        ("30 + 93 \u2212 100", 0.1, False),
        ("93//(100-30)", 0.1, False),
        ("30**93**100", 0.1, False),
        ("", 0.1, False),
    ],
)
def test_countdown(answer, reward, correct):
    verdict = grade("countdown", COUNTDOWN, CHAT.format(answer), "d1")
    assert (verdict.reward, verdict.correct) == (reward, correct)


def test_countdown_within_a_tolerance_and_with_pythons_operators():
    assert grade("countdown", {"input": "1,999999,3", "output": "3"}, "<answer>1/999999+3</answer>", "d1").correct
    assert grade("countdown", {"input": "7,2,3", "output": "6"}, "<answer>7//2+3</answer>", "d1").correct
    assert grade("countdown", {"input": "2,3,1", "output": "9"}, "<answer>2**3+1</answer>", "d1").correct
    assert grade("countdown", COUNTDOWN, "30+93-100", "d1") == grade(
        "countdown", COUNTDOWN, "x<answer>", "d1"
    ).__class__(0, True)


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        (CHAT.format("1342 2413\n3124 4231"), "1342241331244231"),
        ("<answer>\n1302201030204031", "1302201030204031"),
        (CHAT.format("see\n```\n1342241331244231\n```"), "1342241331244231"),
        (CHAT.format('"1342241331244231"'), '"134224133124423'),  # every character takes a cell
        ("<answer></answer> 1342", "1342000000000000"),
        ("1342241331244231\n</answer>", "1342241331244231"),
        ("the grid 1342241331244231 it is", "1342241331244231"),
        ("13422413312442311", "0000000000000000"),
    ],
)
def test_sudoku_cells(text, cells):
    assert sudoku_cells(text) == cells


def test_sudoku_counts_empty_cells_alone():
    cut_off = grade("sudoku", SUDOKU, "<reasoning>\nok\n</reasoning>\n<answer>\n1302201030204031", "d1")
    assert (cut_off.reward, cut_off.correct) == (2 / 8, False)
    changed_clue = grade("sudoku", SUDOKU, CHAT.format("1442241331244231"), "d1")
    assert (changed_clue.reward, changed_clue.correct) == (1.0, True)
    assert not grade("sudoku", SUDOKU, CHAT.format("1442241331244231")).correct


def test_an_unknown_protocol_is_refused():
    for task in ("gsm8k", "countdown", "sudoku"):
        assert isinstance(get_task(task, protocol="d1"), Task)
        with pytest.raises(ValueError, match="'strict', 'd1'"):
            get_task(task, protocol="d2")
