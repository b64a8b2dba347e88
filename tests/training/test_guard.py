"""The guard: what counts as lost, what is watched, and what is advised. What a run does with it: test_guarded_runs.py."""

import json
import math

import pytest

from diffpo.decoding.rules import EntropyBounded, FixedSchedule, PromptThreshold
from diffpo.tasks.task import NoSplitError
from diffpo.training.config import parse_train
from diffpo.training.guard import Guard, Loss, careful, is_lost, remedy, validation_problems

# What counts as lost


def share(right: int, done: int) -> dict:
    return {"done": done, "accuracy": right / done, "nfe": 1.0, "gamma": 2.0}


def binomial(n: int, p: float) -> list[float]:
    return [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]


@pytest.mark.parametrize(
    ("done", "right", "lost"),
    [(20, 11, True), (20, 12, False), (128, 92, True), (128, 93, False), (1000, 775, True), (1000, 776, False)],
)  # fmt: skip
def test_what_is_lost_where_the_base_solves_everything(done, right, lost):
    """The fewer problems, the more must be lost: the documented numbers."""
    assert is_lost(share(done, done), share(right, done), 0.2) is lost


@pytest.mark.parametrize("done", [10, 20, 43])
def test_chance_is_no_loss(done):
    """Exact: the base's and the trained model's right answers are binomial, the share of pairs that count as lost is theirs."""
    verdicts = [[is_lost(share(b, done), share(a, done), 0.2) for a in range(done + 1)] for b in range(done + 1)]
    for kept, most in ((1.0, 0.011), (0.8, 0.03)):
        for p in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 1.0):
            base, now = binomial(done, p), binomial(done, kept * p)
            alarms = sum(
                pb * pa
                for pb, row in zip(base, verdicts, strict=True)
                for pa, lost in zip(now, row, strict=True)
                if lost
            )
            assert alarms <= most, (kept, p)


def test_a_kind_that_the_base_does_not_solve_cannot_be_lost():
    assert not is_lost(share(0, 1000), share(0, 1000), 0.0)
    assert not is_lost(share(1, 20), share(0, 20), 0.2)
    assert is_lost(share(60, 1000), share(20, 1000), 0.2)


def test_the_tolerance_is_a_share_of_what_the_base_solves():
    assert not is_lost(share(500, 1000), share(300, 1000), 0.4)
    assert is_lost(share(500, 1000), share(300, 1000), 0.2)


def test_what_is_lost_stays_so_until_it_is_back_at_what_is_tolerated():
    base = share(20, 20)
    assert not is_lost(base, share(14, 20), 0.2)  # perhaps by chance
    assert is_lost(base, share(15, 20), 0.2, was_lost=True)
    assert not is_lost(base, share(16, 20), 0.2, was_lost=True)


@pytest.fixture
def judging(make_trainer):
    """judging(base, now) by kind -> the names of the new losses; both over 100 problems of each kind."""
    guard = Guard(make_trainer(), 8)
    guard.kinds = lambda kinds: {kind: share(right, 100) for kind, right in kinds.items()}
    return guard, lambda base, now: [loss.kind for loss in guard.judge(base, now)]


def test_each_loss_is_new_once_until_it_recovers(judging):
    guard, new = judging
    base = {"a": 100, "b": 100, "c": 0}
    assert new(base, {"a": 99, "b": 98, "c": 0}) == []
    assert new(base, {"a": 99, "b": 10, "c": 0}) == ["b"]
    assert new(base, {"a": 30, "b": 10, "c": 0}) == ["a"]
    assert new(base, {"a": 79, "b": 10, "c": 0}) == []
    assert list(guard.lost) == ["a", "b"]
    assert new(base, {"a": 80, "b": 90, "c": 0}) == []
    assert guard.lost == {}
    assert new(base, {"a": 80, "b": 10, "c": 0}) == ["b"]
    assert guard.lost == {"b": Loss("b", 100, 1.0, 0.1, 2.0)}


def test_a_kind_without_problems_stays_as_it_was(judging):
    guard, new = judging
    new({"a": 100, "b": 100}, {"a": 10, "b": 100})
    assert new({"b": 100}, {"b": 100}) == []
    assert list(guard.lost) == ["a"]
    assert new({"a": 100}, {"a": 10, "b": 0}) == []
    assert list(guard.lost) == ["a"]


def test_what_is_lost_survives_a_checkpoint(judging, make_trainer):
    guard, new = judging
    new({"a": 100}, {"a": 10})
    guard.lost["b"] = Loss("b", 20, 1.0, 0.0, math.inf)
    again = Guard(make_trainer(), 8)
    again.restore(json.loads(json.dumps(guard.state(), allow_nan=False)))
    assert again.lost == guard.lost | {"b": Loss("b", 20, 1.0, 0.0, None)}


def test_the_careful_bound(random_model):
    learned = random_model(threshold_gammas=(2.0, 0.5, 4.0), threshold_order="margin")
    assert repr(careful(PromptThreshold(), learned)) == repr(EntropyBounded(0.5, "margin"))
    assert repr(careful(PromptThreshold("entropy"), learned)) == repr(EntropyBounded(0.5, "entropy"))
    for rule in (EntropyBounded(3.0), FixedSchedule(4)):
        assert careful(rule, learned) is rule


FAST, CAREFUL = Loss("a", 20, 1.0, 0.0, 4.0), Loss("a", 20, 1.0, 0.0, 2.0)


@pytest.mark.parametrize(
    ("flags", "loss", "said"),
    [
        (["--algorithm.threshold-advantage", "mean"], FAST, ["--algorithm.threshold-advantage std"]),
        ([], FAST, ["--rollout.speed-exponent 0.25", "--rollout.threshold-exploration 0.1", "--optimizer.lr 0.0001"]),
        ([], CAREFUL, ["--rollout.speed-exponent 0.25", "--optimizer.lr 0.0001", "--optimizer.lr 5e-05"]),
        (["--algorithm.importance-weights", "none"], FAST, ["--rollout.speed-exponent 0.25"]),
        (["--algorithm.train", "threshold", "--rollout.speed-exponent", "0"], CAREFUL, ["--optimizer.threshold-lr 0.001"]),
        (["--algorithm.train", "model"], FAST, ["--rollout.speed-exponent 0.25", "--optimizer.lr 0.0001"]),
        (["--algorithm.name", "d1"], FAST, ["--optimizer.lr"]),
    ],
    ids=["mean", "fast", "careful", "uncorrected", "threshold", "model", "d1"],
)  # fmt: skip
def test_remedies_are_flags_that_the_run_has_not_set(flags, loss, said):
    """Each that is followed gives way to the next, and is a flag of the command."""
    for expected in said:
        found = remedy(parse_train(flags), loss)
        assert found.startswith(expected)
        flags = [*flags, *found.split()]
        parse_train(flags)


# What is watched


class Splits:
    """A task of somebody's that has `there` validation problems, or raises."""

    name = "splits"

    def __init__(self, there):
        self.there = there

    def problems(self, split, count, seed):
        assert (split, seed) == ("validation", 0)
        if isinstance(self.there, Exception):
            raise self.there
        if self.there is None:
            return []
        if count > self.there:
            raise ValueError(f"the validation split holds {self.there}")
        return list(range(count))


@pytest.mark.parametrize(("there", "taken"), [(256, 256), (255, 128), (40, 32), (1, 1)])
def test_fewer_problems_are_taken_where_there_are_fewer(there, taken):
    assert len(validation_problems(Splits(there), 256)) == taken


@pytest.mark.parametrize(
    ("there", "message"),
    [(0, "holds 0"), (None, "has no validation problems"), (NoSplitError("no such split"), "no such split")],
    ids=["empty", "nothing", "no split"],
)
def test_a_split_without_problems_is_refused(there, message):
    with pytest.raises(ValueError, match=message):
        validation_problems(Splits(there), 256)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("every", "-1"), ("problems", "0"), ("tolerance", "1"), ("tolerance", "-0.1"), ("tolerance", "nan")],
)
def test_numbers_out_of_range_are_refused_by_name(train, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as stopped:
        train(f"--guard.{flag}", value)
    assert stopped.value.code == 2
    assert f"guard.{flag}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
