"""The kinds of problems of the medley: how they are drawn, asked, solved and checked."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from ..countdown import Countdown, CountdownProblem, every_expression

LENGTH = 12  # tokens of a completion
DRAWN = LENGTH - 1  # of a set; the last token is EOS

Level = int
Numbers = tuple[int, ...]


class Kind(ABC):
    """trained, unseen: levels of difficulty; numbers: what a problem is about, each kind says what."""

    name: str
    share: int = 1  # of the examples for pretraining, against the other kinds': harder ones take more
    trained: tuple[Level, ...]
    unseen: tuple[Level, ...]

    @abstractmethod
    def draw(self, level: Level, rng: np.random.Generator) -> Numbers:
        """A random problem."""

    @abstractmethod
    def prompt(self, numbers: Numbers) -> str:
        """The question, words with a space between two."""

    @abstractmethod
    def solution(self, numbers: Numbers, rng: np.random.Generator) -> Sequence[int | str]:
        """A random right answer, of at most 11 words."""

    @abstractmethod
    def right(self, numbers: Numbers, words: Sequence[str]) -> bool:
        """Whether the words are a right answer."""

    @abstractmethod
    def formed(self, numbers: Numbers, words: Sequence[str]) -> bool:
        """Whether they have the form of an answer, right or wrong."""

    def identity(self, numbers: Numbers) -> Numbers:
        """The same for problems with the same answers; it decides the split."""
        return numbers


class Draw(Kind):
    """numbers: how often a number may be used, and the set, in the order shown; level: the size of the set."""

    def __init__(self, name: str, most: int, share: int, trained: tuple[Level, ...], unseen: tuple[Level, ...]) -> None:
        self.name, self.most, self.share, self.trained, self.unseen = name, most, share, trained, unseen

    def draw(self, level: Level, rng: np.random.Generator) -> Numbers:
        return self.most, *rng.choice(100, size=level, replace=False).tolist()

    def prompt(self, numbers: Numbers) -> str:
        return f"draw {numbers[0]} : {_joined(numbers[1:])}"

    def solution(self, numbers: Numbers, rng: np.random.Generator) -> list[int]:
        most, *given = numbers
        copies = given * most if most < DRAWN else given
        return rng.choice(copies, size=DRAWN, replace=most == DRAWN).tolist()

    def right(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return self.formed(numbers, words) and max(Counter(words).values()) <= numbers[0]

    def formed(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return len(words) == DRAWN and set(words) <= set(map(str, numbers[1:]))

    def identity(self, numbers: Numbers) -> Numbers:
        return numbers[0], *sorted(numbers[1:])


class Copy(Kind):
    """numbers: what is to be copied; level: how many."""

    name = "copy"
    trained, unseen = (4, 8, 11), (6, 10)

    def draw(self, level: Level, rng: np.random.Generator) -> Numbers:
        return tuple(rng.integers(100, size=level).tolist())

    def prompt(self, numbers: Numbers) -> str:
        return f"{self.name} {_joined(numbers)}"

    def solution(self, numbers: Numbers, rng: np.random.Generator) -> Numbers:
        return numbers

    def right(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return list(words) == list(map(str, self.solution(numbers, np.random.default_rng(0))))

    def formed(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return len(words) == len(numbers) and all(map(_is_number, words))


class Reverse(Copy):
    name = "reverse"

    def solution(self, numbers: Numbers, rng: np.random.Generator) -> Numbers:
        return numbers[::-1]


class Add(Kind):
    """numbers: the digits of both, the most significant first; level: how many digits each has. a + b and b + a are two problems, which may
    lie in different splits."""

    name = "add"
    share = 4
    trained, unseen = (2, 4, 6), (3, 5)

    def draw(self, level: Level, rng: np.random.Generator) -> Numbers:
        return tuple(rng.integers(10, size=2 * level).tolist())

    def prompt(self, numbers: Numbers) -> str:
        half = len(numbers) // 2
        return f"add {_joined(numbers[:half])} + {_joined(numbers[half:])}"

    def solution(self, numbers: Numbers, rng: np.random.Generator) -> list[str]:
        half = len(numbers) // 2
        total = int("".join(map(str, numbers[:half]))) + int("".join(map(str, numbers[half:])))
        return list(str(total).zfill(half + 1))

    def right(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return list(words) == self.solution(numbers, np.random.default_rng(0))

    def formed(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return len(words) == len(numbers) // 2 + 1 and all(len(word) == 1 and _is_number(word) for word in words)


class Make(Kind):
    """numbers: the target, and three numbers in the order shown; there is one level."""

    name = "countdown"
    share = 6
    trained, unseen = (3,), ()
    task = Countdown()

    def draw(self, level: Level, rng: np.random.Generator) -> Numbers:
        expressions, _ = every_expression()
        index = int(rng.integers(len(expressions)))
        shown = rng.permutation(expressions.numbers[index]).tolist()
        return int(expressions.target[index]), *shown

    def prompt(self, numbers: Numbers) -> str:
        return f"make {numbers[0]} : {_joined(numbers[1:])}"

    def solution(self, numbers: Numbers, rng: np.random.Generator) -> list[str]:
        texts = _solutions()[self.identity(numbers)]
        return texts[int(rng.integers(len(texts)))].split(" ")

    def right(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return self.task.grade(CountdownProblem(numbers[1:], numbers[0]), " ".join(words)).correct is True

    def formed(self, numbers: Numbers, words: Sequence[str]) -> bool:
        return (self.task.grade(CountdownProblem(numbers[1:], numbers[0]), " ".join(words)).reward or 0.0) > 0

    def identity(self, numbers: Numbers) -> Numbers:
        return numbers[0], *sorted(numbers[1:])


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Draw("independent", DRAWN, share=1, trained=(2, 5, 11), unseen=(3, 8)),
        Draw("distinct", 1, share=4, trained=(11, 14, 20), unseen=(12, 17)),
        Copy(),
        Reverse(),
        Add(),
        Make(),
    )
}


@functools.cache
def _solutions() -> dict[Numbers, list[str]]:
    """Every completion of each Countdown problem, by target and sorted numbers."""
    (expressions, _), found = every_expression(), defaultdict(list)
    numbers = np.sort(expressions.numbers, axis=1).tolist()
    for key, target, text in zip(numbers, expressions.target.tolist(), expressions.texts(), strict=True):
        found[target, *key].append(text)
    return found


def _joined(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 2 and str(int(word)) == word
