"""Watches that no kind of problem is ruined while the mean gets better.

What the base model solves is measured at a careful bound: the smallest bin of a threshold that is trained, else the run's own rule. At the
end, where both are known, one token at a time counts instead if it solves more.
Each kind of problem is watched, and the whole task, under its name.

A kind is lost when its accuracy a is below (1 - tolerance) b, b the base's, by more than chance: when the upper end of the interval of
a - (1 - tolerance) b is below 0. The interval is put together from Wilson's 95% intervals of a and of b (Zou and Donner, Statistics in
Medicine 27, 2008), as if the two were asked different problems; they are asked the same, which makes chance smaller. Where nothing is
lost, one check of 10 to 128 problems of a kind cries in 1% of the cases at most; where exactly what is tolerated, in 3%. At a tolerance
of 20%, a kind that the base always solves is lost below 60% with 20 problems, below 72% with 128. It is lost until a is back at
(1 - tolerance) b.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from diffpo.decoding.rules import EntropyBounded, PromptThreshold, Rule
from diffpo.evaluation import Evaluation, Item, wilson_interval
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.runs.json_lines import finite
from diffpo.tasks import Task
from diffpo.tasks.grading import TaskError
from diffpo.tasks.prompts import check_context, prompt_ids
from diffpo.tasks.task import NoSplitError
from diffpo.training.config import TrainConfig
from diffpo.training.evaluating import evaluate
from diffpo.training.rollout import rows_at_once
from diffpo.training.trainer import Trainer

_EXPLORED = 0.1  # share of the rollouts, where exploration is the remedy
_GENTLE = 0.25  # speed exponent, where that is the remedy


@dataclass(frozen=True)
class Loss:
    """A kind that the run's own rule solves less than the base model at the careful bound. gamma: mean bound (nats), if there is one."""

    kind: str
    problems: int
    base: float
    now: float
    gamma: float | None

    def __str__(self) -> str:
        bound = "" if self.gamma is None else f" at a mean bound of {self.gamma:.3g} nats"
        return f"{self.kind}: {self.now:.0%} of {self.problems} problems solved{bound}, the base model solves {self.base:.0%}"


class Guard:
    """Asks problems of the validation split while a run trains. What cannot be asked is not watched: no run fails because of its guard.

    careful: the rule by which the base is measured; base: what was measured, None before `see_base` and where nothing is watched; lost: by kind;
    off: why nothing is watched, for the reader.
    """

    def __init__(self, trainer: Trainer, evaluated_together: int) -> None:
        self.trainer, self.task, self.rows = trainer, trainer.task, evaluated_together
        self.settings = trainer.config.guard
        self.careful = careful(trainer.evaluation_rule, trainer.model)
        self.base: Evaluation | None = None
        self.now: Evaluation | None = None
        self.lost: dict[str, Loss] = {}
        self.problems: list = []
        self.off = ""
        if 0 < self.settings.every <= trainer.config.updates:  # else no check would ever be due
            try:
                self._choose_problems()
            except Exception as error:  # of the task's own code, whatever it is
                self._turn_off(error)

    def _choose_problems(self) -> None:
        trainer = self.trainer
        self.problems = validation_problems(self.task, self.settings.problems)
        gen_length = trainer.lengths.gen_length
        prompts = prompt_ids(trainer.model.tokenizer, self.task, self.problems)
        check_context(prompts, gen_length, trainer.model)
        at_once = rows_at_once(prompts, gen_length, trainer.config.update.tokens_at_once)
        self.rows = min(self.rows, at_once or self.rows)

    def see_base(self) -> None:
        """Ask the model, which must be as it came, at the careful bound; nothing if that is known already."""
        if self.problems and self.base is None:
            self.base = self._asked(self.careful)

    def due(self, update: int) -> bool:
        return self.base is not None and bool(self.problems) and update % self.settings.every == 0

    def check(self) -> list[Loss]:
        """Ask the model of now by the run's own rule. What `judge` says."""
        self.now = self._asked(self.trainer.evaluation_rule)
        return self.judge(self.base, self.now) if self.base and self.now else []

    def judge(self, base: Evaluation, now: Evaluation) -> list[Loss]:
        """The kinds that were not lost before; ``lost`` then holds all of them. A kind without problems stays as it was."""
        before, self.lost = self.lost, {}
        shares, shares_now = self.kinds(base), self.kinds(now)
        for kind in [*shares_now, *(kind for kind in before if kind not in shares_now)]:
            if kind not in shares_now or kind not in shares:
                self.lost |= {kind: before[kind]} if kind in before else {}
            elif is_lost(shares[kind], shares_now[kind], self.settings.tolerance, kind in before):
                of = shares_now[kind]
                self.lost[kind] = Loss(kind, of["done"], shares[kind]["accuracy"], of["accuracy"], of["gamma"])
        return [loss for kind, loss in self.lost.items() if kind not in before]

    def kinds(self, evaluation: Evaluation) -> dict[str, Item]:
        """`Evaluation.kinds`, and the whole task under its name."""
        whole = {name: getattr(evaluation, name) for name in ("done", "accuracy", "nfe", "gamma")}
        return {self.task.name: whole} | evaluation.kinds

    def by_kind(self, base: Evaluation, careful: Evaluation, trained: Evaluation) -> dict[str, Item]:
        """What the report says of each kind: accuracy of the base and of the trained model at the careful bound, and by the trained rule,
        with its evaluations (nfe) and bounds (gamma)."""
        of_base, of_careful = self.kinds(base), self.kinds(careful)
        return {
            kind: {
                "problems": of["done"],
                "base_careful": of_base[kind]["accuracy"],
                "careful": of_careful[kind]["accuracy"],
                **{name: of[name] for name in ("accuracy", "nfe", "gamma")},
            }
            for kind, of in self.kinds(trained).items()
            if kind in of_base and kind in of_careful
        }

    def metrics(self) -> dict[str, float]:
        """Accuracy by kind of the last check."""
        return {f"watched/{kind}": of["accuracy"] for kind, of in self.kinds(self.now).items()} if self.now else {}

    def state(self) -> dict[str, Any]:
        """What a resume needs, JSON values; the base's numbers are kept by the run."""
        return {kind: finite(asdict(loss)) for kind, loss in self.lost.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self.lost = {kind: Loss(**fields) for kind, fields in state.items()}

    def _asked(self, rule: Rule) -> Evaluation | None:
        trainer = self.trainer
        try:
            return evaluate(trainer.model, self.task, self.problems, rule, trainer.lengths, self.rows, trainer.world)
        except TaskError as error:
            self._turn_off(error)
            return None

    def _turn_off(self, error: Exception) -> None:
        self.problems, self.off = [], " ".join(f"{type(error).__name__}: {error}".split())


def is_lost(base: Item, now: Item, tolerance: float, was_lost: bool = False) -> bool:
    """Whether a kind is lost, see above. base, now: `done` problems and `accuracy`."""
    kept, b, a = 1 - tolerance, base["accuracy"], now["accuracy"]
    short = kept * b - a
    if was_lost or short <= 0:
        return short > 0
    lowest = wilson_interval(round(b * base["done"]), base["done"])[0]
    highest = wilson_interval(round(a * now["done"]), now["done"])[1]
    return short > math.hypot(highest - a, kept * (b - lowest))


def careful(rule: Rule, model: MaskedDiffusionLM) -> Rule:
    """The most careful decoding that a rule can choose: a learned threshold's smallest bin; another rule has no choice."""
    rule, gammas = rule.resolve(model), model.config.threshold_gammas
    if isinstance(rule, PromptThreshold) and rule.order and gammas:
        return EntropyBounded(min(gammas), rule.order)
    return rule


def validation_problems(task: Task, count: int) -> list:
    """``count`` problems, always the same; half as many, and half of those, where the split holds fewer. ValueError without any."""
    while True:
        try:
            problems = task.problems("validation", count, seed=0)
            break
        except NoSplitError:
            raise
        except ValueError:
            if count == 1:
                raise
            count //= 2
    if not problems:
        raise ValueError(f"task {task.name} has no validation problems")
    return problems


def kinds_table(kinds: Mapping[str, Item], lost: Collection[str]) -> Table:
    """Of what `Guard.by_kind` returns."""
    table = Table(title="accuracy by kind of problem")
    for column in ("kind", "problems", "base,\ncareful", "trained,\ncareful", "trained", "NFE", "gamma\n(nats)", ""):
        table.add_column(column, overflow="fold")
    for kind, of in kinds.items():
        shares = [f"{of[name]:.1%}" for name in ("base_careful", "careful", "accuracy")]
        gamma = "" if of["gamma"] is None else f"{of['gamma']:.3f}"
        table.add_row(
            escape(kind), str(of["problems"]), *shares, f"{of['nfe']:.2f}", gamma, "LOST" if kind in lost else ""
        )
    return table


def remedy(config: TrainConfig, loss: Loss) -> str:
    """The first of the flags that may save a kind and that the run has not set."""
    rollout, algorithm, optimizer = config.rollout, config.algorithm, config.optimizer
    # decoded faster than it could be: the threshold is at fault
    fast = config.trains_threshold and (loss.gamma is None or loss.gamma > min(rollout.bins))
    if fast and getattr(algorithm, "threshold_advantage", "std") != "std":
        return "--algorithm.threshold-advantage std"
    if rollout.speed_exponent > _GENTLE:
        return f"--rollout.speed-exponent {_GENTLE}"
    if fast and not rollout.threshold_exploration and getattr(algorithm, "importance_weights", "none") != "none":
        return f"--rollout.threshold-exploration {_EXPLORED}"
    part = "lr" if "model" in algorithm.train else "threshold-lr"
    return f"--optimizer.{part} {getattr(optimizer, part.replace('-', '_')) / 2:g}"
