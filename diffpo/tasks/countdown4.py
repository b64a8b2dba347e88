"""Countdown with four numbers: three steps, 18 tokens, too many expressions to list them all."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from .countdown import (
    MAX_NUMBER,
    MAX_VALUE,
    OPERATORS,
    Countdown,
    CountdownProblem,
    Expressions,
    apply_sign,
    in_split,
    split_key,
    split_tenth,
)
from .task import Split, check_request

_ORDERS = np.array(list(itertools.permutations(range(4))))  # [24, 4]
# How the steps hang together: the second takes the first's result and a number, or the two other numbers ("tree"); in a later step,
# the newest result stands on the left or on the right. (tree, second step swapped, third step swapped)
_SHAPES = np.array([(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)], dtype=bool)


class Countdown4(Countdown):
    """Countdown with four numbers.

    Compact: prompt `7 3 11 5 -> 27`, completion `7 * 3 = 21 , 21 + 11 = 32 , 32 - 5 = 27` and EOS. Each step takes two of the numbers and
    results that are left.

    Distribution, split and reward as in `Countdown`: `problems` are uniform over the solvable keys (sorted numbers, target) of a split,
    `examples` uniform over the valid expressions outside the test split: four numbers in 1..20, three operators and one of six shapes, such
    that all results are integers in 1..99.
    """

    name = "countdown4"
    count = 4
    gen_length = 18
    block_length = 18

    def problems(self, split: Split, count: int, seed: int) -> list[CountdownProblem]:
        check_request(split, count)
        rng, keys = np.random.default_rng(seed), _keys(split)
        if count > len(keys):
            raise ValueError(f"the {split} split of countdown4 holds {len(keys)} problems, {count} were asked for")
        chosen = keys[rng.choice(len(keys), size=count, replace=False)]
        shown = rng.permuted(chosen[:, :4], axis=1)
        return [
            self.problem(numbers, target) for numbers, target in zip(shown.tolist(), chosen[:, 4].tolist(), strict=True)
        ]

    def examples(self, count: int, seed: int) -> list[tuple[str, str]]:
        """By rejection: what is drawn uniformly from all expressions is uniform among those kept."""
        check_request("train", count)
        rng, found = np.random.default_rng(seed), []
        while len(found) < count:
            size = 4096
            numbers = rng.integers(1, MAX_NUMBER + 1, size=(size, 4))
            signs, shape = rng.integers(len(OPERATORS), size=(size, 3)), _SHAPES[rng.integers(len(_SHAPES), size=size)]
            drawn = _evaluate(numbers, signs, shape)
            drawn = drawn[drawn.valid]
            drawn = drawn[split_tenth(split_key(drawn.numbers, drawn.target)) > 0]
            shown = rng.permuted(drawn.numbers, axis=1)
            rows = zip(shown.tolist(), drawn.target.tolist(), drawn.texts(), strict=True)
            found += [(f"{' '.join(map(str, numbers))} -> {target}", text) for numbers, target, text in rows]
        return found[:count]

    def solution(self, problem: CountdownProblem, rng: np.random.Generator) -> str:
        """A valid expression drawn uniformly, as `examples` does. ValueError if none makes the target."""
        order, first, second, third, shape = np.indices((len(_ORDERS), 4, 4, 4, len(_SHAPES))).reshape(5, -1)
        signs = np.stack([first, second, third], axis=1)
        expressions = _evaluate(np.array(problem.numbers)[_ORDERS[order]], signs, _SHAPES[shape])
        expressions = expressions[expressions.valid & (expressions.target == problem.target)]
        if not len(expressions):
            raise ValueError(f"no three steps with results in 1..{MAX_VALUE} solve {self.words(problem)!r}")
        return expressions[rng.integers(len(expressions), size=1)].texts()[0]


def _evaluate(numbers: np.ndarray, signs: np.ndarray, shape: np.ndarray) -> Expressions:
    """The expressions that take each row of `numbers` [N, 4] in order, valid or not; signs int [N, 3], shape bool [N, 3]."""
    a, b, c, d = numbers.T
    tree, swap_second, swap_third = shape.T
    first = apply_sign(signs[:, 0], a, b)
    left, right = np.where(tree, (c, d), np.where(swap_second, (c, first), (first, c)))
    second = apply_sign(signs[:, 1], left, right)
    other = np.where(tree, first, d)
    last_left, last_right = np.where(swap_third, (other, second), (second, other))
    third = apply_sign(signs[:, 2], last_left, last_right)
    columns = ((a, left, last_left), (b, right, last_right), (first, second, third))
    lefts, rights, results = (np.stack(steps, axis=1) for steps in columns)
    return Expressions(numbers, lefts, signs, rights, results)


@functools.cache
def _keys(split: Split) -> np.ndarray:
    """[N, 5]: the sorted numbers and the target of every solvable problem of a split."""
    keys = _solvable()
    return keys[in_split(split_tenth(split_key(keys[:, :4], keys[:, 4])), split)]


@functools.cache
def _solvable() -> np.ndarray:
    """[N, 5]: every four sorted numbers with every target they reach.

    Sets of values as 0/1 vectors over 0..99, of two, three and four numbers in turn. `combine`[x, y, z]: z is the result of x and y in one
    of the orders.
    """
    combine = _results()
    two = combine[1 : MAX_NUMBER + 1, 1 : MAX_NUMBER + 1]  # [20, 20, 100]
    with_number = combine[:, 1 : MAX_NUMBER + 1]  # [100, 20, 100]
    joined = np.tensordot(two, with_number, axes=(2, 0)) > 0  # (a b) c, [20, 20, 20, 100]
    three = (joined | joined.transpose(0, 2, 1, 3) | joined.transpose(2, 0, 1, 3)).astype(np.float32)
    fours = np.array(list(itertools.combinations_with_replacement(range(MAX_NUMBER), 4)))  # numbers less 1
    reached = np.zeros((len(fours), MAX_VALUE + 1), dtype=bool)
    for alone in range(4):  # ((three) alone)
        i, j, k = np.delete(fours, alone, axis=1).T
        for number in range(MAX_NUMBER):
            rows = fours[:, alone] == number
            reached[rows] |= three[i[rows], j[rows], k[rows]] @ with_number[:, number] > 0
    for mate in (1, 2, 3):  # ((0 mate) (the others))
        i, j, k, m = fours[:, [0, mate, *({1, 2, 3} - {mate})]].T
        for p, q in itertools.combinations_with_replacement(range(MAX_NUMBER), 2):
            rows = (i == p) & (j == q)
            if rows.any():
                reached[rows] |= two[k[rows], m[rows]] @ np.tensordot(two[p, q], combine, axes=1) > 0
    row, target = reached.nonzero()
    return np.concatenate([fours[row] + 1, target[:, None]], axis=1)


def _results() -> np.ndarray:
    """fp32 0/1 [100, 100, 100]: which z in 1..99 are a result of x and y in 1..99, in either order."""
    sign, x, y = np.indices((len(OPERATORS), MAX_VALUE + 1, MAX_VALUE + 1)).reshape(3, -1)
    z = apply_sign(sign, x, y)
    kept = (x > 0) & (y > 0) & (z >= 1) & (z <= MAX_VALUE)
    found = np.zeros((MAX_VALUE + 1,) * 3, dtype=np.float32)
    found[x[kept], y[kept], z[kept]] = 1
    return np.maximum(found, found.transpose(1, 0, 2))
