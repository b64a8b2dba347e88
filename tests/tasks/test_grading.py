"""`diffpo.grade`: any text has a grade, at once; what is no row or no task is refused."""

import time

import pytest

from diffpo import Grade, grade

ROWS = {
    "gsm8k": {"question": "q", "answer": "x\n#### 9500"},
    "countdown": {"input": "30,100,93", "output": "23"},
    "sudoku": {"Puzzle": "0302201030204030", "Solution": "1342241331244231"},
}
RIGHT = {"gsm8k": r"\boxed{9{,}500}", "countdown": r"\boxed{93 - (100 - 30)}", "sudoku": "1342 2413 3124 4231"}
PIECES = [
    *(
        "",
        "\ud800",
        "\x00",
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "\\boxed{",
        "\\boxed{}",
        "\\boxed ",
        "{",
        "}",
        "\\frac{",
    ),
    *(
        "\\frac{1}{2}",
        "\\text{",
        "1",
        "1 ",
        "9,",
        "1 + ",
        "1.",
        "(",
        ")",
        "2^",
        "=",
        "1=",
        "```",
        "``` ",
        "**",
        "- ",
        "$",
        "\\,",
        "{,}",
    ),
    *(
        "<<",
        "<b",
        "\\\\",
        "\\",
        "\u00b2",
        "\u00bd",
        "1 1/2 ",
        "a",
        "five ",
        "answer: 1 ",
        "\n",
        "1_",
        "1:1 ",
        "1e9",
        "x",
        "\u0301",
    ),
    *("\uff11", "<|", "</", "</reasoning> ", "1 of ", "| 1 ", " (a)", "\t", "1'000", "- 1\n", "1\u2009", "a1"),
]


@pytest.mark.parametrize("task", ROWS)
def test_a_right_answer_is_right_under_its_name(task):
    text = f"<reasoning>\nok\n</reasoning>\n<answer>\n{RIGHT[task]}\n</answer>"
    assert grade(task, ROWS[task], text).correct is True


@pytest.mark.parametrize("protocol", ["strict", "d1"])
@pytest.mark.parametrize("task", ROWS)
def test_any_text_is_wrong_at_once(task, protocol):
    """9,000 characters are read, more are too many to read; either way a quadratic search would take far longer than this."""
    for piece in PIECES:
        for form in (
            "{}",
            "<answer>{}</answer>",
            "<answer>{}",
            "<answer>\\boxed{{{}}}</answer>",
            "{}<answer>5</answer>",
        ):
            for length in (9_000, 100_000):
                started = time.process_time()
                verdict = grade(task, ROWS[task], form.format(piece * (length // max(len(piece), 1))), protocol)
                assert verdict.correct is False
                assert verdict.reward <= 1.5
                assert time.process_time() - started < 1.5, (piece, form, length)


@pytest.mark.parametrize("text", [None, 5, b"<answer>9500</answer>", ["9500"], {}])
@pytest.mark.parametrize("task", ROWS)
def test_what_is_no_text_is_undecided(task, text):
    assert grade(task, ROWS[task], text) == Grade(None, None)


def test_an_unknown_task_is_refused():
    for task, message in (
        ("gsm9k", "did you mean 'gsm8k'"),
        (None, "a name or a task"),
        (["gsm8k"], "a name or a task"),
    ):
        with pytest.raises(ValueError, match=message):
            grade(task, ROWS["gsm8k"], "")


@pytest.mark.parametrize("task", ROWS)
def test_what_is_no_row_of_the_task_is_refused(task):
    others = [row for name, row in ROWS.items() if name != task]
    for row in (None, [], "row", {}, *others, dict.fromkeys(ROWS[task]), dict.fromkeys(ROWS[task], ())):
        with pytest.raises(ValueError, match=r"\w"):
            grade(task, row, "")


@pytest.mark.parametrize("text", ["1 3 4 2 2 4 1 3 3 1 2 4 4 2 3 1", "1342241331244231", "1 3 4 2 is the first row"])
def test_digits_of_a_published_row_without_an_answer_earn_nothing(text):
    assert grade("sudoku", {"Puzzle": "0302201030204030", "Solution": "1342241331244231"}, text) == Grade(0.0, False)


@pytest.mark.parametrize("token", ["<|eot_id|>", "<|endoftext|>", "</s>"])
@pytest.mark.parametrize("task", ROWS)
def test_special_tokens_in_an_answer_do_not_matter(task, token):
    assert grade(task, ROWS[task], f"<reasoning>\nok</reasoning>\n<answer>{RIGHT[task]}{token}</answer>").correct
