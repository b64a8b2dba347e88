"""MATH: competition problems with answers in LaTeX (arXiv 2103.03874); MATH-500 is the usual test subset."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .boxed import last_boxed, last_boxes
from .gsm8k import BOXED_FORMAT
from .math_equivalence import MathEquivalence
from .mathematics import answer_in_prose, d1, is_list, reads_as_mathematics
from .published import PublishedTask
from .task import Grade, chat_answer

_MOST_BOXES = 60  # of one list


@dataclass(frozen=True)
class MathProblem:
    """A question and its answer in LaTeX."""

    text: str
    answer: str


class Math500(PublishedTask[MathProblem]):
    """MATH-500 in chat form.

    Published data: problem, and answer (HuggingFaceH4/MATH-500) or a solution that holds it in a box (ankner/math-500, the train split of
    d1). An answer may be a number, or a list, which is the list of its items in any order.

    strict: the last box in `<answer>` (see `final_answer`) is right if it is mathematically equal to the answer, see `MathEquivalence`;
    undecided answers are None. Reward: 2 if it is right, and for the format what `format_reward` gives.

    d1 (arXiv 2504.12216): the verdict of d1's evaluation and the reward of d1's training, see `mathematics.d1`. They compare strings.
    """

    name = "math500"
    columns = ("problem",)
    hub_file = ("HuggingFaceH4/MATH-500", "test.jsonl")
    instruction = BOXED_FORMAT

    def __init__(self, equivalence: MathEquivalence | None = None, **options: Any) -> None:
        """options: those of `PublishedTask`."""
        super().__init__(**options)
        self.packages = ("math_verify",) if self.protocol == "strict" else ()
        self.equivalence = equivalence or MathEquivalence()

    def problem_from_row(self, row: Mapping[str, Any]) -> MathProblem:
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be an object with the columns problem and answer, got {str(row)[:40]!r}")
        if row.get("problem") is None:
            raise ValueError(f"needs a column problem; columns: {', '.join(map(str, row))}")
        return MathProblem(str(row["problem"]), _gold(row))

    def question(self, problem: MathProblem) -> str:
        return problem.text

    def grade(self, problem: MathProblem, text: str) -> Grade:
        return self.grade_many([problem], [text])[0]

    def grade_many(self, problems: Sequence[MathProblem], texts: Sequence[str]) -> list[Grade]:
        """A grade for every text, within the equivalence's budget of time for all of them."""
        if self.protocol == "d1":
            return [_d1_grade(problem.answer, text) for problem, text in zip(problems, texts, strict=True)]
        answers = [
            final_answer(text, problem.answer) if isinstance(text, str) else None
            for problem, text in zip(problems, texts, strict=True)
        ]
        pairs = [(problem.answer, answer) for problem, answer in zip(problems, answers, strict=True) if answer]
        verdicts = dict(zip(pairs, self.equivalence.many(pairs), strict=True)) if pairs else {}
        grades = []
        for problem, text, answer in zip(problems, texts, answers, strict=True):
            if not isinstance(text, str):
                grades.append(Grade(None, None))
                continue
            correct = verdicts[problem.answer, answer] if answer else False
            grades.append(Grade(None if correct is None else 2.0 * correct + format_reward(text), correct))
        return grades


def _d1_grade(gold: str, text: str) -> Grade:
    return Grade(d1.reward(gold, text), d1.is_correct(gold, text)) if isinstance(text, str) else Grade(None, None)


def final_answer(text: str, gold: str = "") -> str | None:
    """What a text answers; None if nothing. If gold is a list, boxes that follow one another are the items of one.

    The last box in the last `<answer>`, which need not be closed. Without a box there, its content, if that is mathematics; else the last
    box of the text; else the content. Of a sentence, what it says last (`answer_in_prose`).
    """
    answer = chat_answer(text)
    if answer is None and "<answer>" in text:
        answer = text.rpartition("<answer>")[2].strip()
    if answer is None:
        return _boxed(text, gold)
    box = _boxed(answer, gold)
    if box is not None:
        return box
    answer = answer_in_prose(answer)
    return answer if reads_as_mathematics(answer) else _boxed(text, gold) or answer


def _boxed(text: str, gold: str) -> str | None:
    boxes = last_boxes(text)
    if 1 < len(boxes) <= _MOST_BOXES and is_list(gold) and not any(map(is_list, boxes)):
        return ", ".join(boxes)
    return boxes[-1] if boxes else None


def format_reward(text: str) -> float:
    """1 for a box in a complete `<answer>`, .75 for `<answer>` alone (or a box beside it), .5 for a box alone, .25 for neither."""
    answer = chat_answer(text)
    if answer is not None:
        return 1.0 if last_boxed(answer) is not None else 0.75
    return 0.5 if last_boxed(text) is not None else 0.25


def _gold(row: Mapping[str, Any]) -> str:
    """The answer of a row in LaTeX. ValueError if it has none, or one that is no text, number or list of them."""
    answer = row.get("answer")
    if answer is None or answer == "":
        solution = row.get("solution")
        answer = last_boxed(solution) if isinstance(solution, str) else None
    if answer is None or answer == "":
        raise ValueError(
            f"needs a column answer, or a solution with a \\boxed{{}}; columns: {', '.join(map(str, row))}"
        )
    if isinstance(answer, list | tuple) and answer:
        return ", ".join(map(_one_gold, answer))
    return _one_gold(answer)


def _one_gold(answer: Any) -> str:
    if isinstance(answer, str) and answer.strip() and answer.strip().lower() != "nan":
        return last_boxed(answer) or answer.strip()
    if isinstance(answer, numbers.Real) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    raise ValueError(f"answer must be LaTeX, a number or a list of them, got {str(answer)[:40]!r}")
