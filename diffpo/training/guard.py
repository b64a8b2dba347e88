"""Watches that no kind of problem is ruined while the mean gets better.

A kind counts as solved by the base model where the most careful decoding that the run can choose solves it. Both models are asked the
same problems, of the validation split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from diffpo.decoding.rules import EntropyBounded, PromptThreshold, Rule
from diffpo.evaluation import Evaluation, evaluate
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Task
from diffpo.tasks.task import Lengths

SOLVED = 0.1  # a kind of which the base solves less is not watched


@dataclass(frozen=True)
class Loss:
    """A kind whose accuracy under the run's own rule has fallen behind the base's."""

    kind: str
    base: float
    now: float
    gamma: float | None

    def __str__(self) -> str:
        bound = "" if self.gamma is None else f" at a mean bound of {self.gamma:.3g} nats"
        return f"{self.kind}: {self.now:.0%} solved{bound}, the base model solves {self.base:.0%}"


class Guard:
    """tolerance: share of the base's accuracy that a kind may lose."""

    def __init__(self, task: Task, problems: Sequence, lengths: Lengths, rule: Rule, tolerance: float) -> None:
        self.task, self.problems, self.lengths, self.rule = task, problems, lengths, rule
        self.tolerance = tolerance
        self.base: dict[str, float] = {}  # accuracy by kind
        self.now: dict[str, float] = {}
        self.lost: dict[str, Loss] = {}

    def see_base(self, model: MaskedDiffusionLM) -> None:
        """Ask the untrained model, as carefully as the run can decode."""
        self.base = accuracies(
            self.task, evaluate(model, self.task, self.problems, careful(self.rule, model), self.lengths)
        )

    def check(self, model: MaskedDiffusionLM) -> list[Loss]:
        """The kinds that have lost too much since the last check, each told once until it has recovered."""
        evaluation = evaluate(model, self.task, self.problems, self.rule, self.lengths)
        gammas = {kind: numbers["gamma"] for kind, numbers in evaluation.kinds.items()} or {
            self.task.name: evaluation.gamma
        }
        self.now = accuracies(self.task, evaluation)
        before, self.lost = self.lost, {}
        for kind, accuracy in self.now.items():
            base = self.base.get(kind, 0.0)
            if base >= SOLVED and accuracy < (1 - self.tolerance) * base:
                self.lost[kind] = Loss(kind, base, accuracy, gammas[kind])
        return [loss for kind, loss in self.lost.items() if kind not in before]


def careful(rule: Rule, model: MaskedDiffusionLM) -> Rule:
    """The most careful decoding that the rule can choose: a learned threshold's smallest bin; the rule itself has no choice."""
    if isinstance(rule, PromptThreshold):
        return EntropyBounded(min(model.config.threshold_gammas), rule.order)
    return rule


def accuracies(task: Task, evaluation: Evaluation) -> dict[str, float]:
    """Accuracy by kind."""
    if not evaluation.kinds:
        return {task.name: evaluation.accuracy}
    return {kind: numbers["accuracy"] or 0.0 for kind, numbers in evaluation.kinds.items()}
