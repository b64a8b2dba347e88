"""Tasks of which data has been published, asked as d1 asks them."""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from .data import hub_problems, local_problems
from .task import Format, NoSplitError, ProblemT, Prompt, Split, Task, check_request

Protocol = Literal["strict", "d1"]

CHAT_FORMAT = """Respond in the following format:
<reasoning>
your reasoning
</reasoning>
<answer>
your answer
</answer>"""


class PublishedTask(Task[ProblemT]):
    """Problems in the rows of a published dataset, for instruction models: one user turn, answered inside `<answer>` tags.

    format: "chat", or "compact" for tasks that are also asked in the words of a tiny model; the first of `formats` by default.
    protocol: "strict", what is mathematically right; "d1", what d1's own scripts say (arXiv 2504.12216).
    data: a file of the published format, whose rows are then the test split; without one, the file on the hub.
    """

    columns: tuple[str, ...] = ()  # that a row must have, see `problem_from_row`
    hub_file: tuple[str, str] | None = None  # dataset and file on the hub that hold the published test split
    formats: tuple[Format, ...] = ("chat",)
    instruction: str = CHAT_FORMAT
    prefill: str = "<reasoning>"  # with which the assistant's turn is begun, as in d1's evaluation

    def __init__(self, *, format: Format | None = None, protocol: Protocol = "strict", data: str = "") -> None:
        """ValueError for an unknown protocol, or a format that the task does not have. `data` is read when it is needed."""
        if protocol not in get_args(Protocol):
            raise ValueError(f"unknown protocol {protocol!r}: use {', '.join(map(repr, get_args(Protocol)))}")
        self.format = self._checked(format or self.formats[0])
        self.protocol, self.data = protocol, data

    @abstractmethod
    def problem_from_row(self, row: Mapping[str, Any]) -> ProblemT:
        """The problem in one row of the published data, which has all of `columns`. ValueError if a value does not fit."""

    @abstractmethod
    def question(self, problem: ProblemT) -> str:
        """The question in plain English."""

    def words(self, problem: ProblemT) -> str:
        """The compact prompt. ValueError for a problem without one."""
        raise ValueError(f"task {self.name} has no compact format: use --format chat")

    def asked(self, format: Format) -> Self:
        """The same task, asked in `format`. ValueError if it has no such format."""
        other = copy.copy(self)
        other.format = self._checked(format)
        return other

    @functools.cached_property
    def published(self) -> tuple[list[ProblemT], str]:
        """The problems of `data`, or of the hub's file, and their revision; see `local_problems` and `hub_problems`."""
        return local_problems(self, self.data) if self.data else hub_problems(self)

    def problems(self, split: Split, count: int, seed: int) -> list[ProblemT]:
        """The first `count` published problems in their order, whatever the seed. NoSplitError for any split but test."""
        check_request(split, count)
        if split != "test":
            raise NoSplitError(f"task {self.name} has no {split} split, its data is a test split")
        problems, _ = self.published
        if count > len(problems):
            raise ValueError(f"the test split of {self.name} holds {len(problems)} problems, {count} were asked for")
        return problems[:count]

    def prompt(self, problem: ProblemT) -> Prompt:
        """The compact line; or a chat, one user turn of format instruction and question, and the assistant's, begun with `prefill`."""
        if self.format == "compact":
            return self.words(problem)
        asked = {"role": "user", "content": f"{self.instruction}\n\n{self.question(problem)}"}
        return [asked, {"role": "assistant", "content": self.prefill}]

    def _checked(self, format: str) -> Format:
        if format not in self.formats:
            raise ValueError(f"task {self.name} has no {format} format: use --format {' or '.join(self.formats)}")
        return format
