"""GSM8K: grade-school word problems whose answer is a number (arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from . import d1
from .answers import MAX_LENGTH, boxes, final_answer, plain
from .boxed import last_boxed
from .mathematics import UndecidedError, decide
from .published import CHAT_FORMAT, PublishedTask
from .quantities import announced, last_statement, stated_number
from .task import Grade, chat_answer

BOXED_FORMAT = (
    "Solve the math problem step by step and put the final answer inside \\boxed{}.\n"
    + CHAT_FORMAT.replace("your answer", "\\boxed{your answer}")
)  # fmt: skip

_GOLD = re.compile(r"([-+]?)\$?([-+]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{0,40})?|\.[0-9]{1,40})")
_UNIT = re.compile(r"\b(?:how many|number of|in) (dozen|hundred|thousand|million|billion)s?\b", re.IGNORECASE)
_DIGIT = re.compile(r"[0-9]")
_FACTORIAL = re.compile(r"[^a-zA-Z]*[0-9)}]\s*!+[\s$]*|[^a-zA-Z]*[0-9)]!+\s*[-+*/=^][^a-zA-Z]*")
_LIST = re.compile(r"[,:;]|(?<![\\a-zA-Z])[a-zA-Z]{2,}\s")  # and sentences: nothing for a reader of one expression
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")


@dataclass(frozen=True)
class GSM8KProblem:
    """A question and its answer, a number. published: the answer as the row writes it, "1,234" for 1234."""

    text: str
    answer: Decimal
    published: str = ""


class GSM8K(PublishedTask[GSM8KProblem]):
    """GSM8K in chat form.

    Published data (openai/gsm8k): question, and an answer that ends in `#### 72`.

    Protocol "strict": `read_number` and the published answer are equal as fractions; where it reads none, an only box may hold an
    expression of that value (`\\sqrt{144}`, `5!`), see `mathematics.decide`. Reward, the sum of: tags .125 for each of the
    four that stands exactly once, on a line of its own, less .001 for each character after the last; .5 for reasoning and answer in
    their tags, in order (soft format); .5 if each tag has its own line and nothing else follows (strict format); .5 if the answer is
    an integer; 2 if it is right.
    Protocol "d1": verdict of d1's evaluation script, reward of its training code (arXiv 2504.12216), see `diffpo/tasks/d1.py`.
    """

    name = "gsm8k"
    columns = ("question", "answer")
    hub_file = ("openai/gsm8k", "main/test-00000-of-00001.parquet")
    instruction = BOXED_FORMAT

    def problem_from_row(self, row: Mapping[str, Any]) -> GSM8KProblem:
        _, mark, answer = str(row["answer"]).rpartition("####")
        answer = answer.strip()
        match = _GOLD.fullmatch(answer.replace("\u2212", "-"))
        if not mark or not match or (match[1] and match[2]):
            raise ValueError(f"answer must end in #### and a number, got {str(row['answer'])[-40:]!r}")
        number = Decimal(match[1] + match[2] + match[3].replace(",", ""))
        return GSM8KProblem(str(row["question"]), number, answer)

    def question(self, problem: GSM8KProblem) -> str:
        return problem.text

    def grade(self, problem: GSM8KProblem, text: str) -> Grade:
        if self.protocol == "d1":
            return d1.grade_gsm8k(problem.answer, problem.published, text)
        number = read_number(text, _UNIT.findall(problem.text.lower()))
        correct = number == problem.answer if number is not None else _is_boxed(text, problem.answer)
        form = 0.5 * (d1.is_soft_format(text) + d1.is_strict_format(text) + _is_integer(chat_answer(text)))
        return Grade(tag_reward(text) + form + 2.0 * correct, correct)


def read_number(text: str, units: Iterable[str] = ()) -> Fraction | None:
    """The number that a text answers with; None without any, and where there is no telling which.

    Read is, in this order: what stands in `<answer>`, closed or not; the last `\\boxed{}`; the last line if it says "answer is" or
    "####". In `<answer>` a box counts, else what is bold, else the last line. units: see `stated_number`.
    """
    answer = final_answer(text)
    if answer:
        return _read_answer(answer, units) if len(answer) <= MAX_LENGTH else None
    marked = boxes(text)
    if marked:
        return _read_marked(marked, units)
    end = announced(plain(text[-MAX_LENGTH:])) if answer is None else None
    return stated_number(end, first=False, units=units) if end else None


def _is_boxed(text: str, number: Decimal) -> bool:
    """Whether the one box of an answer holds an expression, such as `\\sqrt{144}`, that is exactly this number."""
    marked = boxes(final_answer(text) or text)
    if len(marked) != 1 or _LIST.search(marked[0]):
        return False
    try:
        return decide(str(number), marked[0]) is True
    except UndecidedError:
        return False


def _read_answer(answer: str, units: Iterable[str]) -> Fraction | None:
    marked = boxes(answer)
    number = _read_marked(marked, units)
    if number is not None or any(map(_DIGIT.search, marked)):
        return number
    bold = [part for part in _BOLD.findall(answer) if _DIGIT.search(part) and not part.rstrip().endswith(":")]
    if bold:
        return _read_marked(bold, units)
    return stated_number(last_statement(plain(answer)), first=False, units=units)


def _read_marked(marked: Sequence[str], units: Iterable[str]) -> Fraction | None:
    """The last number of several boxes."""
    numbers = (
        stated_number(plain(part), first=True, units=units)
        for part in reversed(marked)
        if len(part) <= MAX_LENGTH and not _FACTORIAL.fullmatch(part)
    )
    return next((number for number in numbers if number is not None), None)


def tag_reward(text: str) -> float:
    """.125 for each tag that stands exactly once, less .001 for each character after the closing one and its line end."""
    reward = 0.125 * sum(text.count(tag) == 1 for tag in d1.TAGS)
    if text.count(d1.TAGS[-1]) == 1:
        reward -= 0.001 * len(text.partition(d1.TAGS[-1])[2].removeprefix("\n"))
    return reward


def _is_integer(answer: str | None) -> bool:
    if answer is None or len(answer) > MAX_LENGTH:
        return False
    content = last_boxed(answer) or answer
    return content.isascii() and content.isdigit()
