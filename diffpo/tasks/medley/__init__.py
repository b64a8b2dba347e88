"""Six kinds of short problems in one task: what a prompt needs of its decoding differs from kind to kind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..task import CompactTask, Grade, Split, check_request, stable_hash
from .kinds import KINDS, LENGTH, Kind, Level

MOST = 10_000  # problems of a split at once, a share of each kind: Countdown's, the rarest kind's, can be drawn
_BATCH = 64  # problems drawn at a time


@dataclass(frozen=True)
class MedleyProblem:
    """numbers: what the kind asks about, see its class; level: of its difficulty."""

    kind: str
    level: Level
    numbers: tuple[int, ...]


class Medley(CompactTask[MedleyProblem]):
    """Problems of six kinds, alike many of each kind and of each of its levels.

    independent   draw 11 : 4 9 17       11 numbers of a set, each as often as you like: high entropies, and harmless
    distinct      draw 1 : 4 9 17 ..     11 different numbers of a set: high entropies, and harmful. Only the prompt's first number tells
    copy          copy 5 81 2 60         the same numbers
    reverse       reverse 5 81 2 60      from the last to the first
    add           add 4 7 + 3 9          the sum of two numbers, digit by digit, with leading zeros
    countdown     make 32 : 7 3 11       as task countdown: `7 * 3 = 21 , 21 + 11 = 32`

    Completions hold 12 tokens, filled up with EOS.
    levels: "trained", or "unseen": others of the same kinds, which no model has been trained on; Countdown has none.
    Split: by a hash of kind and numbers (Countdown's numbers in any order): a tenth each is for test and for validation.
    Reward: 1 for a right answer, .1 for a wrong one of the right form, else 0.
    """

    name = "medley"
    vocabulary = (*map(str, range(100)), "+", "-", "*", "/", "=", ",", ":", "draw", "copy", "reverse", "add", "make")
    gen_length = LENGTH
    block_length = LENGTH
    ends_with_eos = True

    def __init__(self, levels: str = "trained", kinds: Sequence[str] = tuple(KINDS)) -> None:
        """ValueError for unknown levels or kinds."""
        if levels not in ("trained", "unseen"):
            raise ValueError(f"levels must be 'trained' or 'unseen', got {levels!r}")
        unknown = [name for name in kinds if name not in KINDS]
        if unknown or not kinds:
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {', '.join(map(str, unknown)) or 'none'}")
        self.levels: dict[str, tuple[Level, ...]] = {name: getattr(KINDS[name], levels) for name in kinds}
        self.kinds = [KINDS[name] for name in kinds if self.levels[name]]
        if not self.kinds:
            raise ValueError(f"kinds must be some with {levels} levels, {', '.join(kinds)} has none")

    def kind(self, problem: MedleyProblem) -> str:
        return problem.kind

    def problems(self, split: Split, count: int, seed: int) -> list[MedleyProblem]:
        check_request(split, count)
        most = MOST * len(self.kinds) // len(KINDS)
        if count > most:
            raise ValueError(f"the {split} split of medley holds {most} problems, {count} were asked for")
        found: dict[MedleyProblem, None] = {}
        for problem in self._drawn(self.kinds, {"test": (0, 0), "validation": (1, 1), "train": (2, 9)}[split], seed):
            if len(found) == count:
                break
            found[problem] = None
        return list(found)

    def examples(self, count: int, seed: int) -> list[tuple[str, str]]:
        check_request("train", count)
        rng = np.random.default_rng(seed)
        kinds = [kind for kind in self.kinds for _ in range(kind.share)]
        problems = itertools.islice(self._drawn(kinds, (1, 9), seed), count)
        return [(self.prompt(problem), self.solution(problem, rng)) for problem in problems]

    def prompt(self, problem: MedleyProblem) -> str:
        return KINDS[problem.kind].prompt(problem.numbers)

    def solution(self, problem: MedleyProblem, rng: np.random.Generator) -> str:
        return " ".join(map(str, KINDS[problem.kind].solution(problem.numbers, rng)))

    def grade(self, problem: MedleyProblem, text: str) -> Grade:
        kind, words = KINDS[problem.kind], text.split()
        correct = kind.right(problem.numbers, words)
        return Grade(1.0 if correct else 0.1 if kind.formed(problem.numbers, words) else 0.0, correct)

    def _drawn(self, kinds: list[Kind], tenths: tuple[int, int], seed: int) -> Iterator[MedleyProblem]:
        """Random problems without end, of `kinds` in turn, whose hash modulo ten lies between `tenths`."""
        rng = np.random.default_rng(seed)
        waiting: dict[str, list[MedleyProblem]] = {kind.name: [] for kind in kinds}
        while True:
            for kind in kinds:
                while not waiting[kind.name]:
                    waiting[kind.name] = self._batch(kind, tenths, rng)
                yield waiting[kind.name].pop()

    def _batch(self, kind: Kind, tenths: tuple[int, int], rng: np.random.Generator) -> list[MedleyProblem]:
        """Some problems of one kind; its levels are equally frequent."""
        levels = self.levels[kind.name]
        drawn = [(level, kind.draw(level, rng)) for level in (levels[i % len(levels)] for i in range(_BATCH))]
        tenth = stable_hash(np.array([_key(kind, numbers) for _, numbers in drawn], dtype=np.uint64)) % np.uint64(10)
        kept = (tenth >= tenths[0]) & (tenth <= tenths[1])
        return [MedleyProblem(kind.name, *each) for each, keep in zip(drawn, kept.tolist(), strict=True) if keep]


def _key(kind: Kind, numbers: tuple[int, ...]) -> int:
    key = list(KINDS).index(kind.name)
    for number in kind.identity(numbers):
        key = (key * 1_000_003 + number + 1) % 2**64
    return key
