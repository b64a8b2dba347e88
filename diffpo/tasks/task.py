"""What a task offers to pretraining, rollouts and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np

Split = Literal["train", "validation", "test"]
Protocol = Literal["strict", "d1"]
ProblemT = TypeVar("ProblemT", bound=Hashable)

CHAT_FORMAT = """Respond in the following format:
<reasoning>
your reasoning
</reasoning>
<answer>
your answer
</answer>"""


@dataclass(frozen=True)
class Grade:
    """What a text is worth. reward: for training, None if it could not be decided; correct: whether it solves the problem, None likewise."""

    reward: float | None
    correct: bool | None


class ChatTask(ABC, Generic[ProblemT]):
    """Problems for instruction models: one user turn, answered inside `<answer>` tags.

    `grade` reads the assistant's turn: decoded, cut at the first EOS, without special tokens, `prefill` in front.
    protocol: "strict", what is mathematically right; "d1", what d1's own scripts say (arXiv 2504.12216).
    """

    name: str
    columns: tuple[str, ...]  # that a row of the published data must have, see `problem_from_row`
    hub_file: tuple[str, str] | None = None  # dataset and file on the hub that hold the published test split
    packages: tuple[str, ...] = ()  # modules that grading needs and `import diffpo` does not
    instruction: str = CHAT_FORMAT
    prefill: str = "<reasoning>"  # opening of the assistant's chat turn, written for the model, as in d1's evaluation

    def __init__(self, *, protocol: Protocol = "strict") -> None:
        """ValueError for an unknown protocol."""
        if protocol not in get_args(Protocol):
            raise ValueError(f"unknown protocol {protocol!r}: use {', '.join(map(repr, get_args(Protocol)))}")
        self.protocol = protocol

    @abstractmethod
    def problem_from_row(self, row: dict[str, Any]) -> ProblemT:
        """The problem in one row of the published data, which has all of `columns`. ValueError if a value does not fit."""

    @abstractmethod
    def question(self, problem: ProblemT) -> str:
        """The question in plain English."""

    @abstractmethod
    def grade(self, problem: ProblemT, text: str) -> Grade:
        """Reward and verdict. Never raises and never hangs, whatever the text."""

    def grade_many(self, problems: Sequence[ProblemT], texts: Sequence[str]) -> list[Grade]:
        """`grade` of every text, for tasks that are faster at many."""
        return [self.grade(problem, text) for problem, text in zip(problems, texts, strict=True)]

    def chat(self, problem: ProblemT) -> list[dict[str, str]]:
        """The chat prompt: one user turn of format instruction and question. Generate after `prefill`."""
        return [{"role": "user", "content": f"{self.instruction}\n\n{self.question(problem)}"}]


class Task(ChatTask[ProblemT]):
    """Generated problems with their prompts, solutions and rewards.

    Every problem has two forms. The *compact* form is a short line of whitespace-separated words from a closed
    `vocabulary`, for models small enough to be pretrained on a CPU. The *chat* form is that of `ChatTask`. `grade` reads
    both; a compact text is in the words of the vocabulary and nothing else. Rewards are in [0, 1].
    """

    vocabulary: tuple[str, ...]  # every compact word; special tokens are the tokenizer's own
    gen_length: int  # tokens of a compact completion, EOS included if it ends with one
    block_length: int  # divides gen_length
    ends_with_eos: bool
    columns = ()

    def problem_from_row(self, row: dict[str, Any]) -> ProblemT:
        """Only for tasks of which data has been published."""
        raise ValueError(f"task {self.name} has no published data format, its problems are generated")

    @abstractmethod
    def problems(self, split: Split, count: int, seed: int) -> list[ProblemT]:
        """`count` distinct problems; equal seeds give equal lists. ValueError if the split holds fewer.

        train: for reinforcement learning. validation: for choosing settings; seen in pretraining, never in reinforcement
        learning. test: for reports alone, never seen.
        """

    @abstractmethod
    def examples(self, count: int, seed: int) -> list[tuple[str, str]]:
        """`count` compact (prompt, completion) pairs of the train and validation splits, drawn with replacement, for pretraining."""

    @abstractmethod
    def prompt(self, problem: ProblemT) -> str:
        """The compact prompt."""

    @abstractmethod
    def solution(self, problem: ProblemT, rng: np.random.Generator) -> str:
        """A random correct compact completion, without EOS. ValueError if the problem has none."""


def chat_answer(text: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`, stripped; None if there is none.

    The last one, as in the reward of d1: a model that restates the format before it answers is not punished for it.
    Plain searches rather than a lazy regular expression, whose time is quadratic in the number of unclosed tags.
    """
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return None
    start += len("<answer>")
    return text[start : text.find("</answer>", start)].strip()


def check_request(split: str, count: int) -> None:
    """ValueError for an unknown split or a negative count."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: use {', '.join(map(repr, get_args(Split)))}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")


def stable_hash(key: np.ndarray) -> np.ndarray:
    """Pseudo-random 64-bit hash [N] of non-negative integers [N], the same on every machine and in every process.

    The splitmix64 finalizer (Steele, Lea and Flood, 2014), a bijection. Splits hang on it: it must never change.
    """
    bits = key.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))
