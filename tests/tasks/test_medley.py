"""The medley: every kind's solutions are right, its wrong answers are not, splits and levels are apart."""

import itertools
from collections import Counter

import numpy as np
import pytest

from diffpo.tasks import Medley, get_task
from diffpo.tasks.medley.kinds import DRAWN, KINDS, LENGTH

SEEDED = np.random.default_rng(0)
HAND_WRITTEN = [
    ("independent", (11, 4, 9), "4 9 4 4 9 9 4 4 4 4 4", 1.0),
    ("independent", (11, 4, 9), "4 9 4 4 9 9 4 4 4 4 5", 0.0),
    ("independent", (11, 4, 9), "4 9 4 4 9 9 4 4 4 4", 0.0),
    ("independent", (11, 4, 9), "4 9 4 4 9 9 4 4 4 4 4 4", 0.0),
    ("distinct", (1, *range(20, 32)), "20 21 22 23 24 25 26 27 28 29 31", 1.0),
    ("distinct", (1, *range(20, 32)), "20 21 22 23 24 25 26 27 28 29 29", 0.1),
    ("distinct", (1, *range(20, 32)), "20 21 22 23 24 25 26 27 28 29 32", 0.0),
    ("copy", (5, 81, 2, 5), "5 81 2 5", 1.0),
    ("copy", (5, 81, 2, 5), "5 2 81 5", 0.1),
    ("copy", (5, 81, 2, 5), "5 81 2", 0.0),
    ("copy", (5, 81, 2, 5), "5 81 2 05", 0.0),
    ("reverse", (5, 81, 2, 60), "60 2 81 5", 1.0),
    ("reverse", (5, 81, 2, 60), "5 81 2 60", 0.1),
    ("add", (4, 7, 3, 9), "0 8 6", 1.0),
    ("add", (4, 7, 3, 9), "8 6", 0.0),
    ("add", (4, 7, 3, 9), "0 7 6", 0.1),
    ("add", (9, 7, 3, 9), "1 3 6", 1.0),
    ("add", (4, 7, 3, 9), "0 8 16", 0.0),
    ("countdown", (32, 7, 3, 11), "7 * 3 = 21 , 21 + 11 = 32", 1.0),
    ("countdown", (32, 7, 3, 11), "7 * 3 = 21 , 21 + 3 = 24", 0.1),
    ("countdown", (32, 7, 3, 11), "7 * 3 = 21", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "numbers", "text", "reward"), HAND_WRITTEN)
def test_answers_written_by_hand(kind: str, numbers: tuple, text: str, reward: float) -> None:
    grade = Medley().grade(problem(kind, numbers), text)
    assert (grade.reward, grade.correct) == (reward, reward == 1)


def problem(kind: str, numbers: tuple):
    from diffpo.tasks import MedleyProblem

    return MedleyProblem(kind, 0, numbers)


@pytest.mark.parametrize("levels", ["trained", "unseen"])
def test_solutions_are_right_and_fit(levels: str) -> None:
    task = Medley(levels=levels)
    for each in task.problems("train", 300, seed=1):
        solution = task.solution(each, SEEDED)
        assert task.grade(each, solution).correct, (each, solution)
        assert len(solution.split()) < LENGTH
        assert set(f"{task.prompt(each)} {solution}".split()) <= set(task.vocabulary)


@pytest.mark.parametrize(
    "text", ["", " ", "4", "x", "draw 11 : 4", "-1 2 3", "1 " * 40, "7 / 0 = 3 , 3 + 4 = 7", "\uff14 \uff19", "\u00b2"]
)
def test_no_text_raises(text: str) -> None:
    for each in Medley().problems("test", 24, seed=0):
        assert Medley().grade(each, text).correct is False


def test_only_the_number_tells_independent_from_distinct() -> None:
    same = range(20, 31)
    first, second = (
        Medley().prompt(problem(kind, (most, *same))) for kind, most in (("independent", DRAWN), ("distinct", 1))
    )
    assert first.replace("draw 11", "draw 1") == second


def test_solutions_of_a_set_are_uniform() -> None:
    drawn = [KINDS["distinct"].solution((1, *range(11)), SEEDED) for _ in range(2000)]
    counts = Counter(solution[0] for solution in drawn)
    assert max(abs(counts[number] - 2000 / 11) for number in range(11)) < 5 * (2000 / 11) ** 0.5
    assert all(len(set(solution)) == DRAWN for solution in drawn)


def test_splits_share_no_problem_and_every_kind_and_level_is_there() -> None:
    task = Medley()
    splits = {split: task.problems(split, 3000, seed=0) for split in ("train", "validation", "test")}
    keys = {
        split: {(p.kind, KINDS[p.kind].identity(p.numbers)) for p in problems} for split, problems in splits.items()
    }
    for one, other in itertools.combinations(keys.values(), 2):
        assert not one & other
    for problems in splits.values():
        assert len(set(problems)) == 3000
        kinds = Counter(p.kind for p in problems)
        assert min(kinds.values()) > 0.9 * max(kinds.values())
        for kind in KINDS.values():
            levels = Counter(p.level for p in problems if p.kind == kind.name)
            assert set(levels) == set(kind.trained)
            assert min(levels.values()) > 0.75 * max(levels.values())
    assert task.problems("test", 50, seed=3) == task.problems("test", 50, seed=3) != task.problems("test", 50, seed=4)


def test_examples_are_never_of_the_test_split() -> None:
    task = Medley()
    tested = {task.prompt(p) for p in task.problems("test", 3000, seed=0)}
    prompts = {prompt for prompt, _ in task.examples(6000, seed=0)}
    assert not prompts & tested


def test_unseen_levels_are_not_trained_on() -> None:
    unseen = Medley(levels="unseen")
    kinds = Counter(p.kind for p in unseen.problems("test", 500, seed=0))
    assert set(kinds) == set(KINDS) - {"countdown"}
    assert all(not set(kind.trained) & set(kind.unseen) for kind in KINDS.values())


def test_some_kinds() -> None:
    task = Medley(kinds=("copy", "add"))
    assert {p.kind for p in task.problems("train", 20, seed=0)} == {"copy", "add"}
    assert len(task.problems("train", 0, seed=0)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_kind_has_its_share_and_no_more(kind: str) -> None:
    """More might not exist, and would be looked for without end."""
    task = Medley(kinds=(kind,))
    assert len(set(task.problems("test", 1666, seed=0))) == 1666
    with pytest.raises(ValueError, match="holds 1666 problems"):
        task.problems("test", 1667, seed=0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="levels must be"):
        Medley(levels="hard")
    with pytest.raises(ValueError, match="copying"):
        Medley(kinds=("copying",))
    with pytest.raises(ValueError, match="none"):
        Medley(kinds=())
    with pytest.raises(ValueError, match="countdown has none"):
        Medley(levels="unseen", kinds=("countdown",))
    with pytest.raises(ValueError, match="holds 10000 problems"):
        Medley().problems("test", 10_001, seed=0)
    assert len(Medley().problems("test", 10_000, seed=0)) == 10_000
    assert isinstance(get_task("medley"), Medley)
