"""Sudoku 4x4: grids, uniqueness, split, rewards by hand, and an independent solver."""

import random
from collections import Counter

import numpy as np
import pytest

from diffpo.tasks import Grade, Sudoku, SudokuProblem

TASK = Sudoku()
PROBLEM = TASK.problem("1030340021004020")
UNITS = [
    *([4 * i + j for j in range(4)] for i in range(4)),
    *([4 * j + i for j in range(4)] for i in range(4)),
    *([8 * (i // 2) + 2 * (i % 2) + j for j in (0, 1, 4, 5)] for i in range(4)),
]


def solve(puzzle):
    """All solutions of a puzzle by backtracking."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    seen = {puzzle[other] for unit in UNITS if cell in unit for other in unit}
    return [grid for digit in "1234" if digit not in seen for grid in solve(puzzle[:cell] + digit + puzzle[cell + 1 :])]


def test_grids_are_all_grids_and_split_by_solution():
    easy = Sudoku(clues=(15, 15))  # one cell to fill: every grid turns up 16 times
    sizes = {"train": 201, "validation": 29, "test": 58}
    train, validation, test = (
        Counter(problem.solution for problem in easy.problems(split, size * 16, seed=0))
        for split, size in sizes.items()
    )
    assert set(train.values()) == set(validation.values()) == set(test.values()) == {16}
    assert (len(train), len(validation), len(test)) == tuple(sizes.values())
    assert set(train) | set(validation) | set(test) == set(solve("0" * 16))  # 288: so they are disjoint
    seen = {completion.replace(" ", "") for _, completion in TASK.examples(5000, seed=0)}
    assert seen == set(train) | set(validation)  # pretraining


def test_split_is_frozen():
    """Checkpoints are trained on this split: in every process and release it must be the same."""
    test = {problem.solution for problem in Sudoku(clues=(15, 15)).problems("test", 58 * 16, seed=0)}
    assert sum(map(int, test)) == 154910644835319538


def test_puzzles_have_one_solution_and_the_asked_number_of_clues():
    for clues in ((4, 8), (4, 4), (6, 6), (12, 15)):
        counts = Counter()
        for problem in Sudoku(clues).problems("train", 150, seed=2):
            assert solve(problem.puzzle) == [problem.solution]
            counts[16 - problem.puzzle.count("0")] += 1
        assert set(counts) == set(range(clues[0], clues[1] + 1))


def test_four_clue_puzzles_are_all_found():
    """25,728 four-clue puzzles have one solution, a known count; the splits share them out."""
    task = Sudoku(clues=(4, 4))
    totals = []
    for split in ("train", "validation", "test"):
        with pytest.raises(ValueError, match="holds") as error:
            task.problems(split, 10**6, seed=0)
        totals.append(int(str(error.value).split("holds ")[1].split()[0]))
    assert sum(totals) == 25728
    assert len(set(task.problems("test", totals[2], seed=0))) == totals[2]


def test_examples_are_train_puzzles_with_their_solutions():
    for prompt, completion in TASK.examples(200, seed=0):
        problem = TASK.problem(prompt.replace("_", "0").replace(" ", ""))
        assert TASK.prompt(problem) == prompt
        assert completion.replace(" ", "") == problem.solution


@pytest.mark.parametrize("clues", [(3, 8), (8, 16), (9, 8)])
def test_difficulty_is_checked(clues):
    with pytest.raises(ValueError, match="clues"):
        Sudoku(clues)


@pytest.mark.parametrize("puzzle", ["", "0" * 15, "0" * 17, "5" + "0" * 15, "x" + "0" * 15, "1234341221434321"])
def test_malformed_puzzles(puzzle):
    with pytest.raises(ValueError, match="16 digits"):
        TASK.problem(puzzle)


def test_own_problems():
    with pytest.raises(ValueError, match="has 288"):
        TASK.problem("0" * 16)
    with pytest.raises(ValueError, match="has 0"):
        TASK.problem("11" + "0" * 14)
    with pytest.raises(ValueError, match="complete"):
        SudokuProblem("0" * 16, "1" * 16)
    with pytest.raises(ValueError, match="does not solve"):
        SudokuProblem("2" + PROBLEM.puzzle[1:], PROBLEM.solution)


def test_prompts():
    assert TASK.prompt(PROBLEM) == "1 _ 3 _ 3 4 _ _ 2 1 _ _ 4 _ 2 _"
    assert PROBLEM.puzzle in TASK.asked("chat").prompt(PROBLEM)[0]["content"]


@pytest.mark.parametrize(
    ("text", "reward", "correct"),
    [
        ("1234341221434321", 1, True),
        ("1234 3412\n2143 4321", 1, True),
        ("12343412214343211111", 0, False),  # no grid, whatever its first 16 digits
        ("1234341221434321 1234341221434321", 0, False),
        ("12343412214343214", 0, False),
        ("2234341221434321", 1, False),  # a given cell changed: all empty cells are right all the same
        ("1234341221434322", 7 / 8, False),
        ("123434122143432", 7 / 8, False),  # padded to 16
        ("1030340021004020", 0, False),
        ("1_3_34__21__4_2_", 0, False),
        ("2121212121212121", 1 / 8, False),
        ("", 0, False),
    ],
)
@pytest.mark.parametrize("form", ["compact", "chat"])
def test_rewards(text, reward, correct, form):
    words = " ".join("".join(text.split()).replace("0", "_"))  # as a tokenizer of words writes them
    text = words if form == "compact" else f"easy</reasoning>\n<answer>\n{text}\n</answer>"
    assert TASK.grade(PROBLEM, text) == Grade(reward, correct)


@pytest.mark.parametrize(
    "text", ["1234341221434321", "1234\n3412\n2143\n4321", "1 2 3 4  3 4 1 2 2 1 4 3 4 3 2 1", "1 2 3"]
)
def test_digits_alone_are_no_answer_of_a_chat(text):
    compact = text == "1 2 3"
    assert TASK.grade(PROBLEM, text) == Grade(1 / 8 if compact else 0.0, False)


PUBLISHED = TASK.problem_from_row({"Puzzle": "0302201030204030", "Solution": "1342241331244231"})
RIGHT = [
    "1342241331244231",
    "```\n1342241331244231\n```",
    "```text\n1342241331244231\n```",
    "```\n1342\n2413\n3124\n4231\n```",
    '"1342241331244231"',
    "'1342241331244231'",
    "`1342241331244231`",
    "**1342241331244231**",
    "1,3,4,2,2,4,1,3,3,1,2,4,4,2,3,1",
    "1, 3, 4, 2, 2, 4, 1, 3, 3, 1, 2, 4, 4, 2, 3, 1.",
    "1342\n2413\n3124\n4231",
    "1 3 4 2\n2 4 1 3\n3 1 2 4\n4 2 3 1",
    "| 1 | 3 | 4 | 2 |\n| 2 | 4 | 1 | 3 |\n| 3 | 1 | 2 | 4 |\n| 4 | 2 | 3 | 1 |",
    "+---+---+\n|1 3|4 2|\n|2 4|1 3|\n|3 1|2 4|\n|4 2|3 1|\n+---+---+",
    "[[1,3,4,2],[2,4,1,3],[3,1,2,4],[4,2,3,1]]",
    r"\boxed{1342241331244231}",
    r"$\boxed{1342241331244231}$",
    r"\[1342241331244231\]",
    "The solution is: 1342241331244231",
    "The solution is 1342241331244231.",
    "Here is the completed 4x4 grid:\n1 3 4 2\n2 4 1 3\n3 1 2 4\n4 2 3 1",
    "Row 1: 1 3 4 2\nRow 2: 2 4 1 3\nRow 3: 3 1 2 4\nRow 4: 4 2 3 1",
    "R1: 1 3 4 2\nR2: 2 4 1 3\nR3: 3 1 2 4\nR4: 4 2 3 1",
    "1. 1 3 4 2\n2. 2 4 1 3\n3. 3 1 2 4\n4. 4 2 3 1",
    "Answer (16 digits): 1342241331244231",
    r"\begin{bmatrix}1 & 3 & 4 & 2\\2 & 4 & 1 & 3\\3 & 1 & 2 & 4\\4 & 2 & 3 & 1\end{bmatrix}",
    r"\boxed{\begin{array}{|c|c|c|c|}\hline 1 & 3 & 4 & 2\\ \hline 2 & 4 & 1 & 3\\ \hline 3 & 1 & 2 & 4\\ \hline 4 & 2 & 3 & 1\\ \hline\end{array}}",
    r"\boxed{\text{1342241331244231}}",
    "1342-2413-3124-4231",
    "1342 2413 3124 4231",
    "1342/2413/3124/4231",
    "1342;2413;3124;4231",
    "1342 | 2413 | 3124 | 4231",
    "**Solution:**\n\n1342241331244231",
    "\uff11\uff13\uff14\uff12\uff12\uff14\uff11\uff13\uff13\uff11\uff12\uff14\uff14\uff12\uff13\uff11",
    r"\boxed{1342} \boxed{2413} \boxed{3124} \boxed{4231}",
    r"\mathbf{1342241331244231}",
    "<b>1342241331244231</b>",
    "| 1 | 3 | 4 | 2 |\n|---|---|---|---|\n| 2 | 4 | 1 | 3 |\n| 3 | 1 | 2 | 4 |\n| 4 | 2 | 3 | 1 |",
    "('1342', '2413', '3124', '4231')",
    "\u2502 1 \u2502 3 \u2502 4 2 2 4 1 3 3 1 2 4 4 2 3 1",
    "1342,2413,3124,4231",
    r"1342\ 2413\ 3124\ 4231",
    r"1342\\2413\\3124\\4231",
    "Grid: {1,3,4,2},{2,4,1,3},{3,1,2,4},{4,2,3,1}",
    "1342 2413\n\n3124 4231",
]
WRONG = [
    "13422413312442314",
    "134224133124423",
    "1342241331244231 1234",
    "2342241331244231",
    "11342241331244231",
    "1342241331244232",
    "0302201030204030",
    "I do not know",
    "",
    "3142241331244231",
    "1324421331422431",
    "01342241331244231",
    "13422413312442311342241331244231",
    "134224133124423",
    r"\boxed{134224133124423}",
    "1342413331244231",
    "342243324423",
    "134224133124423\u0661",  # a digit, but not an ASCII one
]


@pytest.mark.parametrize("end", ["\n</answer>", "", "\n</ans"], ids=["closed", "open", "cut off"])
@pytest.mark.parametrize("answer", RIGHT)
def test_a_right_grid_is_right_whatever_is_around_it(answer, end):
    grade = TASK.grade(PUBLISHED, f"<reasoning>\nok\n</reasoning>\n<answer>\n{answer}{end}")
    assert (grade.reward, grade.correct) == (1.0, True)


@pytest.mark.parametrize("answer", WRONG)
def test_another_grid_is_wrong(answer):
    assert not TASK.grade(PUBLISHED, f"<reasoning>\nok\n</reasoning>\n<answer>\n{answer}\n</answer>").correct


def test_a_cut_off_answer_is_worth_its_cells():
    grade = TASK.grade(PUBLISHED, "<reasoning>\nok\n</reasoning>\n<answer>\n1302201030204031")
    assert (grade.reward, grade.correct) == (2 / 8, False)
    assert TASK.grade(PUBLISHED, "<reasoning>ok</reasoning><answer>134224").reward == 3 / 8


@pytest.mark.parametrize(
    "text",
    [
        "{} is the grid", "The grid is {}", "<reasoning>\n{}", "<reasoning>\n{}\n</reasoning>", r"\boxed{{{}}}", "```\n{}\n```",
        "{}\n</answer>", "|{}|", "{}.", "{}\u0661",
    ],
)  # fmt: skip
def test_a_chat_without_an_answer_earns_nothing(text):
    grade = TASK.grade(PUBLISHED, text.format(PUBLISHED.solution))
    assert (grade.reward, grade.correct) == (0, False)


def test_words_of_a_tiny_model_are_worth_their_cells():
    """Whatever it samples: too few words, empty cells, wrong clues."""
    words = random.Random(1)
    for problem in TASK.problems("train", 200, seed=3):
        sample = words.choices(TASK.vocabulary, k=words.choice((16, 16, 15, 9, 0)))
        cells = zip(problem.puzzle, problem.solution, sample, strict=False)
        right = sum(clue == "0" and digit == word for clue, digit, word in cells)
        grade = TASK.grade(problem, " ".join(sample))
        assert grade.reward == right / problem.puzzle.count("0")
        assert grade.correct == ("".join(sample) == problem.solution)


def test_agrees_with_the_rules_on_mutated_solutions():
    """An answer is right exactly if it keeps the clues and satisfies the rules."""
    random_cells = random.Random(0)
    verdicts = []
    for problem in TASK.problems("test", 500, seed=7):
        cells = list(problem.solution)
        for _ in range(random_cells.randrange(3)):
            cells[random_cells.randrange(16)] = random_cells.choice("01234")
        keeps = all(clue in ("0", cell) for clue, cell in zip(problem.puzzle, cells, strict=True))
        legal = all(sorted(cells[i] for i in unit) == list("1234") for unit in UNITS)
        verdicts.append(TASK.grade(problem, " ".join(cells)).correct)
        assert verdicts[-1] == (keeps and legal)
    assert 0.2 < np.mean(verdicts) < 0.8
