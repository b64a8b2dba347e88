"""The numbers of an evaluation, on rules whose cost is known."""

import pytest

from diffpo.decoding.rules import EntropyBounded, FixedSchedule
from diffpo.models.checkpoints import load
from diffpo.tasks import Grade, get_task
from diffpo.evaluation import evaluate, fixed_problems, one_at_a_time, parallel_rules

TASK = get_task("sudoku")


@pytest.fixture
def model(sudoku_model):
    return load(sudoku_model)


def test_the_held_out_problems_never_change_and_are_not_trained_on():
    problems = fixed_problems(TASK, 20)
    assert problems == fixed_problems(TASK, 20)
    assert {p.solution for p in problems}.isdisjoint(p.solution for p in TASK.problems("train", 200, seed=0))


def test_accuracy_is_the_share_of_right_answers(model, monkeypatch):
    problems = fixed_problems(TASK, 10)
    solved = set(problems[:3])
    monkeypatch.setattr(type(TASK), "grade", lambda self, problem, text: Grade(0.5, problem in solved))
    assert evaluate(model, TASK, problems, FixedSchedule(1)).accuracy == pytest.approx(0.3)


def test_nfe_and_gamma(model):
    problems = fixed_problems(TASK, 5)
    fixed = evaluate(model, TASK, problems, FixedSchedule(4))
    assert (fixed.nfe, fixed.gamma) == (4, None)
    assert evaluate(model, TASK, problems, one_at_a_time(TASK)).nfe == TASK.gen_length
    bounded = evaluate(model, TASK, problems, EntropyBounded(0.25))
    assert bounded.gamma == 0.25
    assert bounded.tokens_per_second > 0


def test_batch_size_does_not_change_the_result(model):
    problems = fixed_problems(TASK, 7)
    whole, pieces = (evaluate(model, TASK, problems, EntropyBounded(1.0), batch_size=size) for size in (256, 3))
    assert (whole.accuracy, whole.nfe) == (pieces.accuracy, pieces.nfe)


@pytest.mark.parametrize("name", ["countdown", "sudoku"])
def test_every_rule_of_the_sweep_fits_the_task(model, name):
    task = get_task(name)
    rules = [one_at_a_time(task), *parallel_rules(task)]
    assert len({repr(rule) for rule in rules}) == len(rules)
    for rule in rules:
        rule.check(model, 3, task.gen_length, task.block_length)
