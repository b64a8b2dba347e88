"""What a training has come to: the base model beside the trained one, as JSON values and as a table."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.table import Table

from diffpo.decoding.rules import Rule
from diffpo.evaluation import Evaluation
from diffpo.training.guard import Guard


class Outcome:
    """base, trained: evaluations by the same rules, those of the trained model behind the one by the rule that was trained.

    single, smallest: the rule that commits one token at a time, and the guard's. The guard judges here what is lost.
    """

    def __init__(self, guard: Guard, single: Rule, base: Sequence[Evaluation], trained: Sequence[Evaluation]) -> None:
        self.guard, self.base, self.evaluations = guard, base, trained
        self.single, self.smallest = repr(single), repr(guard.careful)
        self.before, self.after = ({e.rule: e for e in of_model} for of_model in (base, trained))
        self.trained, self.best = trained[0], max(base, key=lambda e: (e.accuracy, -e.nfe))
        # a threshold's smallest bin may itself be fast: then one token at a time is what careful decoding can do
        self.careful = max(self.smallest, self.single, key=lambda rule: self.before[rule].accuracy)
        guard.judge(self.before[self.careful], self.trained)
        self.kinds = guard.by_kind(self.before[self.careful], self.after[self.careful], self.trained)

    def summary(self) -> dict:
        """Of summary.json what evaluations say: accuracies in [0, 1], NFE, gamma in nats."""
        careful = {"base": _point(self.before[self.careful]), "trained": _point(self.after[self.careful])}
        return {
            "base": {
                "one_at_a_time": _point(self.before[self.single]),
                "best": {"rule": self.best.rule, **_point(self.best)},
            },
            "trained": {**_point(self.trained), "gamma": self.trained.gamma},
            "careful": {"rule": self.careful, **careful},
            "kinds": self.kinds,
            "lost": [asdict(loss) for loss in self.guard.lost.values()],
            "sweep": {"base": [e.asdict() for e in self.base], "trained": [e.asdict() for e in self.evaluations]},
        }

    def table(self, title: str, of_threshold: bool) -> Table:
        """For people. of_threshold: the guard's rule is the smallest bound of a threshold that was trained."""
        bound = "smallest bound, " if of_threshold else ""
        named = {self.single: "one token at a time", self.smallest: f"{bound}{self.smallest}"}
        table = Table(title=title)
        for column in ("model", "decoding", "accuracy", "NFE", "gamma\n(nats)"):
            table.add_column(column, overflow="fold")  # all of a rule's name, in a narrow terminal too
        for model, name, e in [
            *(("base", name, self.before[rule]) for rule, name in named.items()),
            ("base", f"its best rule, {self.best.rule}", self.best),
            *(("trained", name, self.after[rule]) for rule, name in named.items() if rule != self.trained.rule),
            ("trained", self.trained.rule, self.trained),
        ]:
            table.add_row(model, name, f"{e.accuracy:.1%}", f"{e.nfe:.2f}", "" if e.gamma is None else f"{e.gamma:.3f}")
        return table


def distinct(rules: Iterable[Rule]) -> list[Rule]:
    """Each of them once."""
    return list({repr(rule): rule for rule in rules}.values())


def _point(e: Evaluation) -> dict:
    return {"accuracy": e.accuracy, "nfe": e.nfe}
