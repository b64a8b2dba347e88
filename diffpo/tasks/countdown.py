"""Countdown: combine three numbers with + - * / so that they make the target."""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import d1
from .answers import boxes, final_answer
from .expressions import makes_target
from .published import PublishedTask
from .task import CompactTask, Grade, Split, check_request, stable_hash

MAX_NUMBER = 20
MAX_VALUE = 99  # of the target and of every intermediate value
OPERATORS = "+-*/"

_EQUATION = r"\s*([0-9]{1,9})\s*([-+*/])\s*([0-9]{1,9})\s*=\s*([0-9]{1,9})\s*"
_ORDERS = np.array(list(itertools.permutations(range(3))))  # [6, 3]


@dataclass(frozen=True)
class CountdownQuestion:
    """Numbers in the order shown and a target, of any size: what the chat form can ask. It need not be solvable."""

    numbers: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class CountdownProblem(CountdownQuestion):
    """Numbers in 1..20 and a target in 1..99: what the compact form can write."""

    def __post_init__(self) -> None:
        if not all(1 <= number <= MAX_NUMBER for number in self.numbers):
            raise ValueError(f"numbers must be integers in 1..{MAX_NUMBER}, got {self.numbers}")
        if not 1 <= self.target <= MAX_VALUE:
            raise ValueError(f"target must be in 1..{MAX_VALUE}, got {self.target}")


class Countdown(CompactTask[CountdownQuestion], PublishedTask[CountdownQuestion]):
    """Countdown with three numbers.

    Compact: prompt `7 3 11 -> 32`, completion `7 * 3 = 21 , 21 + 11 = 32` and EOS. The first step takes two of the
    numbers, the second its result and the remaining number, in either order.

    Distribution: `problems` are uniform over the solvable keys (sorted numbers, target) of a split, so all splits are
    equally hard. `examples` are uniform over the valid *expressions*: numbers a, b, c in 1..20, two operators,
    and which side of the second step the first result stands on, such that both results are integers in 1..99. There a
    target is the more likely the more ways there are to reach it. The numbers are shown in random order.

    Split: by key (sorted numbers, target); a hash of the key alone sends a tenth of the keys to test and a tenth to validation.

    Reward: 0 without an answer, .1 for a wrong one, 1 for a right one. An answer is two equations (compact, true or not), a non-empty
    `<answer>`, closed or not, or without one a `\\boxed{}` (chat). Of a chat answer the last box counts, else all of it: it is right if
    it is one expression of each number exactly once whose value, a fraction, is the target; see `makes_target`.
    Format "compact" reads both, "chat" reads no compact answer.
    Protocol "d1": what its scripts say of a chat, see `diffpo/tasks/d1.py`; d1 has no compact form.

    Published data: rows such as {"input": "30,100,93", "output": "23"} (d1) or {"nums": [44, 19, 35], "target": 98}
    (Jiayi-Pan/Countdown-Tasks-3to4). Numbers beyond those of `CountdownProblem` make a `CountdownQuestion`, which has a chat form alone.
    """

    name = "countdown"
    formats = ("compact", "chat")
    count = 3  # of numbers
    vocabulary = (*map(str, range(MAX_VALUE + 1)), *OPERATORS, "=", ",", "->")
    gen_length = 12
    block_length = 12
    ends_with_eos = True

    def problem(self, numbers: Iterable[int], target: int) -> CountdownProblem:
        """A problem of your own, solvable or not. ValueError or TypeError unless it is `count` integers in 1..20 and a
        target in 1..99."""
        numbers = tuple(map(operator.index, numbers))
        if len(numbers) != self.count:
            raise ValueError(f"numbers must be {self.count} integers in 1..{MAX_NUMBER}, got {numbers}")
        return CountdownProblem(numbers, operator.index(target))

    def problem_from_row(self, row: Mapping[str, Any]) -> CountdownQuestion:
        numbers, target = _published(row)
        try:
            return self.problem(numbers, target)
        except ValueError:
            return CountdownQuestion(numbers, target)

    def problems(self, split: Split, count: int, seed: int) -> list[CountdownQuestion]:
        if split == "test" and self.data:
            return PublishedTask.problems(self, split, count, seed)
        check_request(split, count)
        rng = np.random.default_rng(seed)
        expressions = _expressions(split)
        _, first = np.unique(split_key(expressions.numbers, expressions.target), return_index=True)
        if count > len(first):
            raise ValueError(f"the {split} split of countdown holds {len(first)} problems, {count} were asked for")
        chosen = expressions[rng.choice(first, size=count, replace=False)]
        shown = rng.permuted(chosen.numbers, axis=1)
        return [
            self.problem(numbers, target)
            for numbers, target in zip(shown.tolist(), chosen.target.tolist(), strict=True)
        ]

    def examples(self, count: int, seed: int) -> list[tuple[str, str]]:
        check_request("train", count)
        rng = np.random.default_rng(seed)
        completions = _train_completions()
        index = rng.integers(len(completions), size=count)
        chosen = _pretraining_expressions()[index]
        shown = np.take_along_axis(chosen.numbers, _ORDERS[rng.integers(len(_ORDERS), size=count)], axis=1)
        return [
            (f"{a} {b} {c} -> {target}", completions[i])
            for (a, b, c), target, i in zip(shown.tolist(), chosen.target.tolist(), index.tolist(), strict=True)
        ]

    def words(self, problem: CountdownQuestion) -> str:
        if not isinstance(problem, CountdownProblem):
            raise ValueError(
                f"{list(problem.numbers)} -> {problem.target} has no compact form: it holds {self.count} numbers in "
                f"1..{MAX_NUMBER} and a target in 1..{MAX_VALUE}"
            )
        return f"{' '.join(map(str, problem.numbers))} -> {problem.target}"

    def question(self, problem: CountdownQuestion) -> str:
        return (
            f"Using only the numbers {list(problem.numbers)}, write an arithmetic expression that evaluates to exactly "
            f"{problem.target}. Use every number exactly once, with the operations + - * / and parentheses as needed. "
            "Give only the expression as the answer, for example: (1 + 2) * 3"
        )

    def solution(self, problem: CountdownQuestion, rng: np.random.Generator) -> str:
        """A valid expression drawn uniformly, as `examples` does. ValueError if none makes the target, or the problem has no compact form."""
        asked = self.words(problem)
        expressions = _evaluate(np.array(problem.numbers)[_ORDERS])
        expressions = expressions[expressions.target == problem.target]
        if not len(expressions):
            raise ValueError(f"no two steps with results in 1..{MAX_VALUE} solve {asked!r}")
        return expressions[rng.integers(len(expressions), size=1)].texts()[0]

    def grade(self, problem: CountdownQuestion, text: str) -> Grade:
        if self.protocol == "d1":
            return d1.grade_countdown(problem.numbers, problem.target, text)
        answer = final_answer(text)
        if self.format == "compact" and answer is None and _equations(self.count - 1).fullmatch(text):
            correct = _steps_solve(problem, text)
            return Grade(1.0 if correct else 0.1, correct)
        marked = boxes(answer or text)
        answer = marked[-1] if marked else answer
        correct = makes_target(answer, problem.numbers, problem.target) if answer else False
        return Grade(1.0 if correct else 0.1 if answer else 0.0, correct)


def _published(row: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """Numbers and target of a row in either published format."""
    if row.get("nums") is not None and row.get("target") is not None:
        numbers, target, names = row["nums"], row["target"], "nums and target"
    elif row.get("input") is not None and row.get("output") is not None:
        numbers, target, names = str(row["input"]).split(","), row["output"], "input and output"
    else:
        raise ValueError(f"needs the columns input, output (or nums, target), found {', '.join(map(str, row))}")
    values = [str(value).strip() for value in numbers] if isinstance(numbers, list | tuple) else []
    target = str(target).strip()
    if (
        len(values) < 2
        or not all(re.fullmatch("[0-9]{1,9}", value) for value in values)
        or not re.fullmatch("-?[0-9]{1,9}", target)
    ):
        raise ValueError(
            f'{names} must be numbers such as "30,100,93" and "23", at least two and one, got {str(row)[:120]}'
        )
    return tuple(map(int, values)), int(target)


@functools.cache
def _equations(steps: int) -> re.Pattern:
    return re.compile(",".join([_EQUATION] * steps))


def _steps_solve(problem: CountdownQuestion, text: str) -> bool:
    """Each step takes two of what is there and puts its result back; at the end only the target is left."""
    match = _equations(len(problem.numbers) - 1).fullmatch(text)
    if not match:
        return False
    words = match.groups()
    there = Counter(problem.numbers)
    for i in range(0, len(words), 4):
        left, sign, right, result = int(words[i]), words[i + 1], int(words[i + 2]), int(words[i + 3])
        taken = Counter([left, right])
        if taken - there or not _holds(left, sign, right, result):
            return False
        there = there - taken + Counter([result])
    return there == Counter([problem.target])


def _holds(left: int, sign: str, right: int, result: int) -> bool:
    if sign == "/":
        return right != 0 and left == result * right
    return result == {"+": operator.add, "-": operator.sub, "*": operator.mul}[sign](left, right)


@dataclass(frozen=True)
class Expressions:
    """N expressions of S steps `left sign right = result` from S + 1 numbers; the last result is the target."""

    numbers: np.ndarray  # [N, S + 1]
    left: np.ndarray  # [N, S]
    sign: np.ndarray  # [N, S], index into OPERATORS
    right: np.ndarray  # [N, S]
    result: np.ndarray  # [N, S]

    @property
    def target(self) -> np.ndarray:
        return self.result[:, -1]

    @property
    def valid(self) -> np.ndarray:
        """bool [N]: every result is in 1..99."""
        return np.all((self.result >= 1) & (self.result <= MAX_VALUE), axis=1)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: np.ndarray) -> Expressions:
        return Expressions(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def texts(self) -> list[str]:
        columns = (self.left, self.sign, self.right, self.result)
        return [
            " , ".join(f"{a} {OPERATORS[sign]} {b} = {x}" for a, sign, b, x in zip(*row, strict=True))
            for row in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _evaluate(numbers: np.ndarray) -> Expressions:
    """The valid ones among the 32 expressions that take each row of `numbers` [N, 3] in order."""
    sign_1, sign_2, middle_first, row = np.indices((4, 4, 2, len(numbers))).reshape(4, -1)
    a, b, c = numbers[row].T
    middle = apply_sign(sign_1, a, b)
    left, right = np.where(middle_first, (middle, c), (c, middle))
    target = apply_sign(sign_2, left, right)
    pairs = ((a, left), (sign_1, sign_2), (b, right), (middle, target))
    expressions = Expressions(numbers[row], *(np.stack(pair, axis=1) for pair in pairs))
    return expressions[expressions.valid]


def apply_sign(sign: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Result of each operation, 0 (never valid) for a division that is not exact."""
    divisor = np.maximum(right, 1)  # a first result below 1 makes the expression invalid anyway
    quotient = np.where(left % divisor == 0, left // divisor, 0)
    return np.choose(sign, (left + right, left - right, left * right, quotient))


def split_key(numbers: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same integer [N] for the same sorted numbers [N, count] and target [N]: two decimal digits for each."""
    return functools.reduce(lambda key, column: key * 100 + column, [*np.sort(numbers, axis=1).T, target])


def split_tenth(key: np.ndarray) -> np.ndarray:
    """[N] in 0..9: keys of the test split have 0, of validation 1."""
    return stable_hash(key) % np.uint64(10)


def in_split(tenth: np.ndarray, split: Split) -> np.ndarray:
    return {"test": tenth == 0, "validation": tenth == 1, "train": tenth > 1}[split]


@functools.cache
def _expressions(split: Split) -> Expressions:
    """Every valid expression of a split."""
    expressions, tenth = every_expression()
    return expressions[in_split(tenth, split)]


@functools.cache
def _pretraining_expressions() -> Expressions:
    """All but those of the test split."""
    expressions, tenth = every_expression()
    return expressions[tenth > 0]


@functools.cache
def every_expression() -> tuple[Expressions, np.ndarray]:
    """Every valid expression, there are few enough to list them all, and which tenth of the keys it belongs to."""
    numbers = np.stack(np.meshgrid(*[np.arange(1, MAX_NUMBER + 1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    expressions = _evaluate(numbers)
    return expressions, split_tenth(split_key(expressions.numbers, expressions.target))


@functools.cache
def _train_completions() -> list[str]:
    return _pretraining_expressions().texts()
