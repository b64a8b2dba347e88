"""Four numbers: which keys are solvable by brute force, splits, examples, rewards by hand."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from diffpo.tasks import Countdown4
from diffpo.tasks.countdown4 import _keys, _solvable

TASK = Countdown4()
SIZES = {"train": 291075, "validation": 36440, "test": 36224}  # the whole splits


def key(problem):
    return (*sorted(problem.numbers), problem.target)


def read(prompt):
    numbers, target = prompt.split(" -> ")
    return TASK.problem(map(int, numbers.split()), int(target))


def reachable(values: tuple) -> set[int]:
    """Every value that combining two at a time can end with, all results whole and in 1..99."""
    if len(values) == 1:
        return {int(values[0])}
    found = set()
    for i, j in combinations(range(len(values)), 2):
        x, y = Fraction(values[i]), Fraction(values[j])
        rest = tuple(value for k, value in enumerate(values) if k not in (i, j))
        for result in {x + y, x - y, y - x, x * y, x / y, y / x}:
            if result.denominator == 1 and 1 <= result <= 99:
                found |= reachable((*rest, result))
    return found


def test_solvable_keys_agree_with_brute_force():
    keys, rng = _solvable(), np.random.default_rng(0)
    special = [(1, 1, 1, 1), (20, 20, 20, 20), (1, 2, 3, 4), (7, 7, 13, 19)]
    for numbers in special + [tuple(sorted(row)) for row in rng.integers(1, 21, size=(8, 4)).tolist()]:
        mine = keys[(keys[:, :4] == numbers).all(axis=1), 4]
        assert set(mine.tolist()) == reachable(numbers), numbers


def test_splits_share_no_key():
    parts = [_keys(split) for split in SIZES]
    assert tuple(map(len, parts)) == tuple(SIZES.values())
    assert len(np.unique(np.concatenate(parts), axis=0)) == sum(SIZES.values()) == len(_solvable())


def test_split_is_frozen():
    assert int(_keys("test").sum()) == 2854884


def test_problems_are_uniform_over_the_keys(chi_square):
    """By the tenth of the list of keys that a problem comes from."""
    import torch

    place = {tuple(row): i for i, row in enumerate(_keys("validation").tolist())}
    drawn = [place[key(problem)] * 10 // len(place) for problem in TASK.problems("validation", 10_000, seed=0)]
    assert chi_square(torch.bincount(torch.tensor(drawn)), torch.full((10,), 0.1)) > 1e-3


def test_examples_are_right_varied_and_outside_the_test_split():
    test = set(map(tuple, _keys("test").tolist()))
    examples = [(read(prompt), completion) for prompt, completion in TASK.examples(3000, seed=0)]
    assert all(TASK.grade(problem, completion).correct for problem, completion in examples)
    assert not any(key(problem) in test for problem, _ in examples)
    assert {sign for _, text in examples for sign in "+-*/" if sign in text} == set("+-*/")
    first, second = ([text.split(" , ")[i].split() for _, text in examples] for i in (0, 1))
    chained = [a[4] in (b[0], b[2]) for a, b in zip(first, second, strict=True)]
    assert 0.5 < np.mean(chained) < 0.95  # the rest are trees: (a b) (c d)
    swapped = [a[4] == b[2] for a, b, is_chain in zip(first, second, chained, strict=True) if is_chain]
    assert 0.2 < np.mean(swapped) < 0.8


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7 * 3 = 21 , 21 + 11 = 32 , 32 - 5 = 27", 1),
        ("7 * 3 = 21 , 11 - 5 = 6 , 21 + 6 = 27", 1),  # a tree
        ("11 - 5 = 6 , 3 * 7 = 21 , 6 + 21 = 27", 1),
        ("7 * 3 = 21 , 21 + 11 = 32 , 32 - 5 = 26", 0.1),  # false
        ("7 * 3 = 21 , 21 + 11 = 32 , 32 - 6 = 26", 0.1),  # a number not given
        ("7 * 3 = 21 , 7 + 11 = 18 , 18 + 9 = 27", 0.1),  # a number used twice
        ("7 * 3 = 21 , 11 - 5 = 6 , 22 + 5 = 27", 0.1),  # results not used
        ("7 * 3 = 21 , 21 + 11 = 32", 0),  # for three numbers
        ("7 * 3 = 21 , 21 + 11 = 32 , 32 - 5 = 27 ,", 0),
        ("<answer>7 * 3 + 11 - 5</answer>", 1),
        ("<answer>7 * 3 + 11</answer>", 0.1),
        ("", 0),
    ],
)
def test_rewards(text, reward):
    problem = TASK.problem((7, 3, 11, 5), 27)
    assert TASK.grade(problem, text).reward == reward
    assert TASK.grade(problem, text).correct == (reward == 1)


def test_three_numbers_are_refused():
    with pytest.raises(ValueError, match=r"4 integers in 1\.\."):
        TASK.problem((1, 2, 3), 6)
    with pytest.raises(ValueError, match="1 1 1 1 -> 99"):
        TASK.solution(TASK.problem((1, 1, 1, 1), 99), np.random.default_rng(0))
