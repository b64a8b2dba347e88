"""What a task offers to rollouts, evaluation and, if it is a compact one, pretraining."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeGuard, TypeVar, get_args

import numpy as np

Split = Literal["train", "validation", "test"]
Format = Literal["compact", "chat"]
Prompt = str | list[dict[str, str]]  # a text, or a chat: messages of a role and a content
ProblemT = TypeVar("ProblemT", bound=Hashable)

GEN_LENGTH, BLOCK_LENGTH = (
    256,
    32,
)  # where neither the task nor the settings say more, as in LLaDA's and d1's evaluations


class NoSplitError(ValueError):
    """The task has no problems of this split."""


@dataclass(frozen=True)
class Grade:
    """What a text is worth. reward: for training, None if it could not be decided; correct: whether it solves the problem, None likewise."""

    reward: float | None
    correct: bool | None


class Task(ABC, Generic[ProblemT]):
    """Problems, what a model is asked, and what its answer is worth. Lengths, data and rewards are settings of who uses it.

    Four members make a task: `name`, `problems`, `prompt` and `grade`.
    """

    name: str
    packages: tuple[str, ...] = ()  # modules that grading needs and `import diffpo` does not

    @abstractmethod
    def problems(self, split: Split, count: int, seed: int) -> list[ProblemT]:
        """`count` problems; equal seeds give equal lists. NoSplitError without such a split, ValueError if it holds fewer.

        train: for reinforcement learning. validation: for choosing settings; perhaps seen in pretraining, never in reinforcement
        learning. test: for reports alone, never seen.
        """

    @abstractmethod
    def prompt(self, problem: ProblemT) -> Prompt:
        """What the model is asked: a text, or a chat. A last message of the assistant is its turn, already begun.

        All prompts of a task are texts, or all are chats. ValueError for a problem that cannot be asked.
        """

    @abstractmethod
    def grade(self, problem: ProblemT, text: str) -> Grade:
        """Reward and verdict. It should not raise and not hang, whatever the text.

        text: the completion, decoded, cut at the first EOS, without special tokens; behind what `begun` says.
        """

    def kind(self, problem: ProblemT) -> str:
        """Which sort of problem it is, where a task has several; the task's name by default.

        Training reports by kind, and warns when one is lost: a few kinds, each with many problems.
        """
        return self.name

    def grade_many(self, problems: Sequence[ProblemT], texts: Sequence[str]) -> list[Grade]:
        """`grade` of every text, for tasks that are faster at many."""
        return [self.grade(problem, text) for problem, text in zip(problems, texts, strict=True)]


class CompactTask(Task[ProblemT]):
    """A task for models that are small enough to be pretrained on a CPU.

    Prompts and completions are short lines of whitespace-separated words from a closed `vocabulary`. Problems are distinct, rewards are
    in [0, 1].
    """

    vocabulary: tuple[str, ...]  # every word; special tokens are the tokenizer's own
    gen_length: int  # tokens of a completion, EOS included if it ends with one
    block_length: int  # divides gen_length
    ends_with_eos: bool
    format: Format = "compact"

    @abstractmethod
    def examples(self, count: int, seed: int) -> list[tuple[str, str]]:
        """`count` (prompt, completion) pairs of the train and validation splits, drawn with replacement, for pretraining."""

    @abstractmethod
    def solution(self, problem: ProblemT, rng: np.random.Generator) -> str:
        """A random correct completion, without EOS. ValueError if the problem has none."""


class Lengths(NamedTuple):
    """Tokens of a completion, and of a block: those that are decoded before the next ones are begun."""

    gen_length: int
    block_length: int


def is_compact(task: Task) -> TypeGuard[CompactTask]:
    """Whether the task is asked and answered in the words of its vocabulary."""
    return isinstance(task, CompactTask) and task.format == "compact"


def completion_lengths(task: Task, gen_length: int | None = None, block_length: int | None = None) -> Lengths:
    """The lengths given; instead of None a compact task's own, else 256 tokens in blocks of 32, or one block if that is longer."""
    own = (task.gen_length, task.block_length) if is_compact(task) else (GEN_LENGTH, BLOCK_LENGTH)
    gen_length = gen_length or own[0]
    return Lengths(gen_length, block_length or min(own[1], gen_length))


def begun(prompt: Prompt) -> str:
    """What the prompt has written of the assistant's turn already; a completion goes on from it."""
    return prompt[-1]["content"] if isinstance(prompt, list) and prompt[-1]["role"] == "assistant" else ""


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
