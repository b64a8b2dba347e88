"""GSM8K: grade-school word problems whose answer is a number (arXiv 2110.14168)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from .boxed import boxed_spans, last_boxed
from .task import CHAT_FORMAT, ChatTask, Grade, chat_answer

BOXED_FORMAT = (
    "Solve the math problem step by step and put the final answer inside \\boxed{}.\n"
    + CHAT_FORMAT.replace("your answer", "\\boxed{your answer}")
)  # fmt: skip

_MAX_DIGITS = 40
_NUMBER = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_TAGS = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
_REASONING_THEN_ANSWER = re.compile(r"</reasoning>\s*<answer>")


@dataclass(frozen=True)
class GSM8KProblem:
    """A question and its answer, a number."""

    text: str
    answer: Decimal


class GSM8K(ChatTask[GSM8KProblem]):
    """GSM8K in chat form.

    Published data (openai/gsm8k): question, and an answer that ends in `#### 72`. Read from a text: the first number in a
    `\\boxed{}`, else the last number in `<answer>`; `1,234` is one number.

    Reward, the sum of (d1, arXiv 2504.12216): tags .125 for each of the four that stands exactly once, on a line of its own,
    less .001 for each character after the last; .5 for reasoning and answer in their tags, in order (soft format); .5 if each
    tag has its own line and nothing else follows (strict format); .5 if the answer is an integer; 2 if it is right.
    """

    name = "gsm8k"
    columns = ("question", "answer")
    hub_file = ("openai/gsm8k", "main/test-00000-of-00001.parquet")
    instruction = BOXED_FORMAT

    def problem_from_row(self, row: dict[str, Any]) -> GSM8KProblem:
        _, mark, answer = str(row["answer"]).rpartition("####")
        try:
            return GSM8KProblem(
                str(row["question"]), Decimal(answer.replace(",", "").replace("$", "").strip() if mark else "")
            )
        except InvalidOperation:
            raise ValueError(f"answer must end in #### and a number, got {str(row['answer'])[-40:]!r}") from None

    def question(self, problem: GSM8KProblem) -> str:
        return problem.text

    def grade(self, problem: GSM8KProblem, text: str) -> Grade:
        correct = read_number(text) == problem.answer
        form = 0.5 * (is_soft_format(text) + is_strict_format(text) + _is_integer(chat_answer(text)))
        return Grade(tag_reward(text) + form + 2.0 * correct, correct)


def read_number(text: str) -> Decimal | None:
    """The answer in a text: the first number in a `\\boxed{}`, else the last one in `<answer>`; None without any."""
    end = 0
    for start, stop in boxed_spans(text):
        if start >= end and (match := _NUMBER.search(text, start, stop)):
            return _decimal(match.group())
        end = max(end, stop)  # what is nested in a box without a number holds none either
    numbers = _NUMBER.findall(chat_answer(text) or "")
    return _decimal(numbers[-1]) if numbers else None


def _decimal(number: str) -> Decimal | None:
    return Decimal(number.replace(",", "")) if len(number) <= _MAX_DIGITS else None


def tag_reward(text: str) -> float:
    """.125 for each tag that stands exactly once, less .001 for each character after the closing one and its line end."""
    reward = 0.125 * sum(text.count(tag) == 1 for tag in _TAGS)
    if text.count(_TAGS[-1]) == 1:
        reward -= 0.001 * len(text.partition(_TAGS[-1])[2].removeprefix("\n"))
    return reward


def is_soft_format(text: str) -> bool:
    """Whether the text begins with complete reasoning, directly followed by a complete answer."""
    between = _REASONING_THEN_ANSWER.search(text, len("<reasoning>"))
    return text.startswith("<reasoning>") and between is not None and text.find("</answer>", between.end()) >= 0


def is_strict_format(text: str) -> bool:
    """Whether each tag has a line of its own and the text ends with the last of these lines."""
    first, middle, last = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>\n"
    return text.startswith(first) and text.endswith(last) and text.find(middle, len(first), -len(last)) >= 0


def _is_integer(answer: str | None) -> bool:
    content = last_boxed(answer or "") or answer or ""
    return content.isascii() and content.isdigit()
