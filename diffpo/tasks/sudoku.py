"""Sudoku 4x4: fill the grid so that every row, column and 2x2 box holds 1, 2, 3 and 4."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import d1
from .answers import MAX_LENGTH, boxes, final_answer, plain
from .published import PublishedTask
from .task import CompactTask, Grade, Split, check_request, stable_hash

CELLS = 16
MIN_CLUES = 4  # fewer clues never determine a 4x4 grid
TEST_GRIDS, VALIDATION_GRIDS = 58, 29  # of 288

_ROWS = list(itertools.permutations((1, 2, 3, 4)))  # also the 24 ways to rename the digits


@dataclass(frozen=True)
class SudokuProblem:
    """A puzzle and its solution, 16 digits each, row by row; 0 in the puzzle is an empty cell."""

    puzzle: str
    solution: str

    def __post_init__(self) -> None:
        _check_puzzle(self.puzzle)
        if self.solution not in _grid_texts():
            raise ValueError(f"{self.solution!r} is not a complete 4x4 grid")
        if not _fits(self.puzzle, self.solution):
            raise ValueError(f"{self.solution!r} does not solve {self.puzzle!r}")


class Sudoku(CompactTask[SudokuProblem], PublishedTask[SudokuProblem]):
    """Sudoku 4x4 with exactly one solution per puzzle.

    Compact: prompt of 16 words `1`..`4` or `_` (empty), completion of 16 digits, without EOS.

    Distribution: a solution grid, uniform over the split's; a number of clues, uniform over `clues`; which cells,
    uniform over the choices that leave one solution. More clues make easier puzzles.

    Split: by *solution*: 201 of the 288 grids are for training, 29 for validation, 58 for test. Split by puzzle, a model could learn all
    the grids by heart.

    Reward: the fraction of the originally empty cells that are right, of an answer that is padded with empty cells; 0 for more than 16 digits.
    Right is an answer of exactly the solution's 16 digits: with a changed clue it is wrong, whatever its reward.
    Format "compact" reads a text of the words of the compact form, a space between two, as such. Any other text is a chat: its answer stands in `<answer>`, closed or not,
    and without one it earns 0. There a box counts if there is one, and what is around the digits (words, fences, rules of a table,
    LaTeX) does not.
    Protocol "d1": the cells and no more, as its evaluation script reads them, see `diffpo/tasks/d1.py`.

    Published data (d1): columns Puzzle and Solution, 16 digits each. Its split is by puzzle, so the grids of its test are in its
    training data too.
    """

    name = "sudoku"
    formats = ("compact", "chat")
    columns = ("Puzzle", "Solution")
    vocabulary = ("1", "2", "3", "4", "_")
    gen_length = CELLS
    block_length = CELLS
    ends_with_eos = False

    def __init__(self, clues: tuple[int, int] = (4, 8), **options: Any) -> None:
        """`clues`: least and greatest number of given cells, within 4..15. options: those of `PublishedTask`."""
        super().__init__(**options)
        low, high = clues
        if not MIN_CLUES <= low <= high < CELLS:
            raise ValueError(f"clues must be (low, high) with {MIN_CLUES} <= low <= high < {CELLS}, got {clues}")
        self.clues = (low, high)

    def problem(self, puzzle: str) -> SudokuProblem:
        """A puzzle of your own: 16 digits, 0 = empty. ValueError unless it has exactly one solution."""
        _check_puzzle(puzzle)
        solutions = [grid for grid in _grid_texts() if _fits(puzzle, grid)]
        if len(solutions) != 1:
            raise ValueError(f"a puzzle needs exactly one solution, {puzzle!r} has {len(solutions)}")
        return SudokuProblem(puzzle, solutions[0])

    def problem_from_row(self, row: Mapping[str, Any]) -> SudokuProblem:
        # a reader that took the puzzle for a number has dropped its leading zeros
        return SudokuProblem(str(row["Puzzle"]).zfill(CELLS), str(row["Solution"]))

    def problems(self, split: Split, count: int, seed: int) -> list[SudokuProblem]:
        if split == "test" and self.data:
            return PublishedTask.problems(self, split, count, seed)
        check_request(split, count)
        low, high = self.clues
        _, _, size = _clue_masks()
        available = int(size[_split_grids(split) % len(size), low : high + 1].sum())
        if count > available:
            raise ValueError(
                f"the {split} split of sudoku holds {available} puzzles with {low}..{high} clues, {count} asked for"
            )
        rng = np.random.default_rng(seed)
        texts = list(_grid_texts())
        found: dict[SudokuProblem, None] = {}
        while len(found) < count:
            grid, puzzle = self._draw(_split_grids(split), count, rng)
            rows = ("".join(map(str, cells)) for cells in puzzle.tolist())
            found |= dict.fromkeys(SudokuProblem(row, texts[g]) for row, g in zip(rows, grid.tolist(), strict=True))
        return list(found)[:count]

    def kind(self, problem: SudokuProblem) -> str:
        """By the number of given cells: "4 clues"."""
        return f"{CELLS - problem.puzzle.count('0')} clues"

    def examples(self, count: int, seed: int) -> list[tuple[str, str]]:
        check_request("train", count)
        grids = np.concatenate([_split_grids("validation"), _split_grids("train")])
        grid, puzzle = self._draw(grids, count, np.random.default_rng(seed))
        words = np.full((count, 2 * CELLS - 1), ord(" "), dtype=np.uint8)
        words[:, ::2] = np.frombuffer(b"_1234", dtype=np.uint8)[puzzle]
        prompts = words.view(f"S{2 * CELLS - 1}")[:, 0].astype(str).tolist()
        completions = [" ".join(text) for text in _grid_texts()]
        return [(prompt, completions[g]) for prompt, g in zip(prompts, grid.tolist(), strict=True)]

    def _draw(self, grids: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Indices [N] drawn from `grids` and puzzles [N, 16] with 0 for an empty cell."""
        low, high = self.clues
        masks, start, size = _clue_masks()
        grid = rng.choice(grids, size=count)
        pattern, clues = grid % len(size), rng.integers(low, high, size=count, endpoint=True)
        mask = masks[start[pattern, clues] + rng.integers(size[pattern, clues])]
        return grid, _grids()[grid] * _bits(mask)

    def words(self, problem: SudokuProblem) -> str:
        return " ".join(problem.puzzle.replace("0", "_"))

    def question(self, problem: SudokuProblem) -> str:
        return (
            f"Solve this 4x4 Sudoku: {problem.puzzle}\nIt is written row by row, and 0 is an empty cell. "
            "Fill the empty cells so that every row, every column and every 2x2 box holds each of 1, 2, 3 and 4 once. "
            f"Give the completed grid as the answer: {CELLS} digits, row by row, without separators."
        )

    def solution(self, problem: SudokuProblem, rng: np.random.Generator) -> str:
        """The one solution; nothing is random about it."""
        return " ".join(problem.solution)

    def grade(self, problem: SudokuProblem, text: str) -> Grade:
        if self.protocol == "d1":
            return d1.grade_sudoku(problem.puzzle, problem.solution, text)
        answer = _cells(text, self.format == "compact")
        cells = zip(problem.puzzle, problem.solution, answer[:CELLS].ljust(CELLS, "0"), strict=True)
        right = [given == digit for clue, digit, given in cells if clue == "0"]
        reward = sum(right) / len(right) if len(answer) <= CELLS else 0.0
        return Grade(reward, answer == problem.solution)


def _check_puzzle(puzzle: str) -> None:
    if len(puzzle) != CELLS or set(puzzle) - set("01234") or "0" not in puzzle:
        raise ValueError(f"a puzzle is {CELLS} digits 0..4 with at least one 0, got {puzzle!r}")


def _fits(puzzle: str, grid: str) -> bool:
    return all(clue in ("0", digit) for clue, digit in zip(puzzle, grid, strict=True))


def _cells(text: str, compact: bool) -> str:
    """The digits that a text gives as its answer, however many; `_` is an empty cell, 0. compact: it may be one of the compact form."""
    if compact and _COMPACT.fullmatch(text.strip()):
        return "".join(text.split()).replace("_", "0")
    answer = final_answer(text) or ""
    marked = boxes(answer)
    answer = marked[-1] if len(marked) == 1 else answer
    answer = plain(answer) if len(answer) <= MAX_LENGTH else ""
    for pattern in _LABELS:
        answer = pattern.sub(" ", answer)
    return re.sub("[^0-9]", "", answer.replace("_", "0"))


_COMPACT = re.compile("(?:[1-4_](?: [1-4_])*)?")  # a tokenizer of words puts a space between two
_LABELS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\((?=[^()]*[a-z])[^()]*\)",  # a remark
        r"\b(?:row|column|line|r)s? ?[0-9]\b",
        r"\b[0-9]{1,2} ?(?:x|\*|by) ?[0-9]{1,2}\b(?= ?[a-z])|\b[0-9]{1,2}[- ](?:digits?|cells?|characters?|rows?)\b",  # 4x4 grid
        r"(?m:^) *[0-9][.)](?= )",  # numbered lines
        r"(?<![a-z])[a-z]+[0-9]+\b|\b[0-9]+[a-z]+",
    )
]


@functools.cache
def _grids() -> np.ndarray:
    """All 288 solution grids [288, 16]: the 12 whose first row is 1 2 3 4, under each of the 24 renamings of digits.

    Grid g is a renaming of grid g % 12.
    """
    candidates = np.array([sum(rows, ()) for rows in itertools.product(_ROWS[:1], _ROWS, _ROWS, _ROWS)])
    row, column = np.divmod(np.arange(CELLS), 4)
    units = [np.flatnonzero(kind == i) for kind in (row, column, row // 2 * 2 + column // 2) for i in range(4)]
    sorted_units = np.sort(candidates[:, units], axis=-1)  # [candidates, 12, 4]
    first = candidates[(sorted_units == _ROWS[0]).all(axis=(1, 2))]
    return np.array(_ROWS)[:, first - 1].reshape(-1, CELLS)


@functools.cache
def _grid_texts() -> dict[str, int]:
    """The grids as 16 digits, in the order of `_grids`, with their index."""
    return {"".join(map(str, grid)): index for index, grid in enumerate(_grids().tolist())}


@functools.cache
def _split_grids(split: Split) -> np.ndarray:
    """Indices of a split's grids: those with the smallest hashes are for test, the next for validation."""
    order = np.argsort(stable_hash(np.array([int(text) for text in _grid_texts()])))
    test, validation, train = np.split(order, (TEST_GRIDS, TEST_GRIDS + VALIDATION_GRIDS))
    return {"test": test, "validation": validation, "train": train}[split]


def _bits(masks: np.ndarray) -> np.ndarray:
    """Bits [N, 16] of masks [N]; bit i stands for cell i."""
    return masks[:, None] >> np.arange(CELLS) & 1


@functools.cache
def _clue_masks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every choice of clue cells that leaves exactly one solution: masks, start [12, 17] and size [12, 17].

    `masks[start[p, n] :][: size[p, n]]` are those with n clues for any grid g with g % 12 == p. Renaming the digits
    changes no puzzle's number of solutions, so 12 grids stand for all. A choice fails if another grid has the same
    digits in all of its cells.
    """
    every = np.arange(1 << CELLS)
    clues = _bits(every).sum(axis=1)
    by_clues = np.argsort(clues, kind="stable")
    lists, size = [], []
    for grid in _grids()[: len(_grids()) // len(_ROWS)]:
        agreements = np.unique((grid == _grids()) @ (1 << np.arange(CELLS)))
        unique = np.ones(len(every), dtype=bool)
        for agreement in agreements[agreements != every[-1]]:
            unique &= (every & ~agreement) != 0
        lists.append(by_clues[unique[by_clues]])
        size.append(np.bincount(clues[unique], minlength=CELLS + 1))
    sizes = np.array(size)
    ends = np.cumsum(sizes).reshape(sizes.shape)
    return np.concatenate(lists), ends - sizes, sizes
