"""MATH: competition problems with answers in LaTeX (arXiv 2103.03874); MATH-500 is the usual test subset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .boxed import last_boxed
from .gsm8k import BOXED_FORMAT
from .math_equivalence import MathEquivalence
from .task import ChatTask, Grade, Protocol, chat_answer


@dataclass(frozen=True)
class MathProblem:
    """A question and its answer in LaTeX."""

    text: str
    answer: str


class Math500(ChatTask[MathProblem]):
    """MATH-500 in chat form.

    Published data: problem, and answer (HuggingFaceH4/MATH-500) or a solution that holds it in `\\boxed{}` (ankner/math-500, the
    train split of d1). Read from a text: the last `\\boxed{}`; it is right if math-verify finds it mathematically equal, and
    undecided (None) if math-verify fails or takes too long.

    Reward (d1, arXiv 2504.12216): 2 if the answer is right, and for the format 1 with a `\\boxed{}` in `<answer>`, .75 with
    `<answer>` alone, .5 with `\\boxed{}` alone, .25 with neither.
    """

    name = "math500"
    columns = ("problem",)
    hub_file = ("HuggingFaceH4/MATH-500", "test.jsonl")
    packages = ("math_verify",)
    instruction = BOXED_FORMAT

    def __init__(self, equivalence: MathEquivalence | None = None, *, protocol: Protocol = "strict") -> None:
        super().__init__(protocol=protocol)
        self.equivalence = equivalence or MathEquivalence()

    def problem_from_row(self, row: dict[str, Any]) -> MathProblem:
        answer = row.get("answer") or last_boxed(str(row.get("solution", "")))
        if not answer:
            raise ValueError(f"needs a column answer, or a solution with a \\boxed{{}}; columns: {', '.join(row)}")
        return MathProblem(str(row["problem"]), str(answer))

    def question(self, problem: MathProblem) -> str:
        return problem.text

    def grade(self, problem: MathProblem, text: str) -> Grade:
        answer = last_boxed(text)
        correct = bool(answer) and self.equivalence(problem.answer, answer)
        return Grade(None if correct is None else 2.0 * correct + format_reward(text), correct)


def format_reward(text: str) -> float:
    """1 for a `\\boxed{}` in `<answer>`, .75 for `<answer>` alone (or a box beside it), .5 for a box alone, .25 for neither."""
    answer = chat_answer(text)
    if answer is not None:
        return 1.0 if last_boxed(answer) is not None else 0.75
    return 0.5 if last_boxed(text) is not None else 0.25
