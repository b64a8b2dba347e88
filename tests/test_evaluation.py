"""The one evaluator: its numbers on rules whose cost is known, what is graded together, and what an error leaves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffpo.evaluation
from diffpo.config import ModelSize
from diffpo.decoding.generation import generate
from diffpo.decoding.rules import EntropyBounded, FixedSchedule, PromptThreshold
from diffpo.evaluation import (
    chunks,
    evaluate,
    evaluated,
    fixed_problems,
    one_at_a_time,
    parallel_rules,
    summarise,
    wilson_interval,
)
from diffpo.pretrain import build_model
from diffpo.tasks import Grade, Sudoku, get_task
from diffpo.tasks.prompts import prompt_ids
from diffpo.tasks.task import Lengths, completion_lengths

TASK = get_task("sudoku")
SIZE = ModelSize(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(TASK, SIZE).eval()


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
    assert evaluate(model, TASK, problems, one_at_a_time(completion_lengths(TASK))).nfe == TASK.gen_length
    bounded = evaluate(model, TASK, problems, EntropyBounded(0.25))
    assert bounded.gamma == 0.25
    assert bounded.tokens_per_second > 0


def test_batch_size_does_not_change_the_result(model):
    problems = fixed_problems(TASK, 7)
    whole, pieces = (evaluate(model, TASK, problems, EntropyBounded(1.0), batch_size=size) for size in (256, 3))
    assert (whole.accuracy, whole.nfe) == (pieces.accuracy, pieces.nfe)


@pytest.mark.parametrize("lengths", [(12, 12), (16, 16), (256, 32), (9, 3), (2, 1), (1, 1)])
def test_every_rule_of_the_sweep_fits_the_lengths(model, lengths):
    lengths = Lengths(*lengths)
    rules = [one_at_a_time(lengths), *parallel_rules(lengths)]
    assert len({repr(rule) for rule in rules}) >= len(rules) - (lengths.block_length == 1)
    for rule in rules:
        rule.check(model, 3, *lengths)


def test_the_numbers_are_those_of_generate(model):
    problems, rule = fixed_problems(TASK, 9), EntropyBounded(0.3)
    out = generate(model, [TASK.prompt(problem) for problem in problems], 16, rule=rule)
    grades = [TASK.grade(problem, text) for problem, text in zip(problems, out.text, strict=True)]
    found = evaluate(model, TASK, problems, rule)
    assert (found.rule, found.done, found.undecided) == (repr(rule), 9, 0)
    assert found.right == sum(grade.correct for grade in grades)
    assert found.mean_reward == pytest.approx(sum(grade.reward for grade in grades) / 9)
    assert (found.nfe, found.tokens) == (out.nfe.float().mean().item(), 16)
    assert found.tokens_per_forward == pytest.approx(16 / found.nfe)
    assert found.accuracy_interval_95 == wilson_interval(found.right, 9)


@pytest.mark.parametrize(("gammas", "written"), [((math.inf,), "inf"), ((0.25, 0.5), None)])
def test_gamma_is_the_mean_of_the_thresholds(gammas, written):
    torch.manual_seed(1)
    learned = build_model(TASK, SIZE).eval()
    learned.add_threshold(gammas)
    problems = fixed_problems(TASK, 6)
    ids, lengths = prompt_ids(learned.tokenizer, TASK, problems), completion_lengths(TASK)
    found = list(evaluated(learned, TASK, problems, ids, lengths, PromptThreshold().resolve(learned), 4))
    assert all(item["gamma"] == written if written else item["gamma"] in gammas for item in found)
    mean = summarise(PromptThreshold(), found).gamma
    assert mean == math.inf if written else min(gammas) <= mean <= max(gammas)


class Watched(Sudoku):
    """Notes how many texts are graded together."""

    def __init__(self):
        super().__init__()
        self.together = []

    def grade_many(self, problems, texts):
        self.together.append(len(texts))
        return super().grade_many(problems, texts)


def test_finished_rows_are_graded_together(model):
    task, problems = Watched(), fixed_problems(TASK, 10)
    assert evaluate(model, task, problems, FixedSchedule(2), batch_size=4).done == 10
    assert task.together == [4, 4, 2]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FloatingPointError("nan"), torch.OutOfMemoryError("full")])
def test_rows_that_had_finished_are_graded_before_an_error_is_raised(model, monkeypatch, error):
    stream = diffpo.evaluation.stream

    def broken(*arguments, **options):
        for count, row in enumerate(stream(*arguments, **options)):
            if count == 3:
                raise error
            yield row

    monkeypatch.setattr(diffpo.evaluation, "stream", broken)
    task, problems, found = Watched(), fixed_problems(TASK, 6), []
    ids = prompt_ids(model.tokenizer, task, problems)
    left = evaluated(model, task, problems, ids, completion_lengths(task), FixedSchedule(1), 6)
    found += [next(left)["index"] for _ in range(3)]
    with pytest.raises(type(error)):
        next(left)
    assert (found, task.together) == ([0, 1, 2], [3])


def test_chunks_that_are_left_early_end_without_noise():
    source = iter(range(5))
    parts = chunks(source, 2)
    assert next(parts) == [0, 1]
    parts.close()
    assert list(chunks(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    assert list(chunks(iter(()), 2)) == []
    assert list(chunks(iter(range(4)), 2)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("reward", [None, math.nan])
def test_undecided_answers_are_counted_apart(model, monkeypatch, reward):
    problems = fixed_problems(TASK, 8)
    open_ones = set(problems[:3])
    graded = lambda self, problem, text: Grade(reward, None) if problem in open_ones else Grade(0.5, True)  # noqa: E731
    monkeypatch.setattr(Sudoku, "grade", graded)
    found = evaluate(model, TASK, problems, FixedSchedule(1))
    assert (found.undecided, found.right, found.accuracy, found.mean_reward) == (3, 5, 5 / 8, 0.5)


def test_nothing_decided_is_no_error(model, monkeypatch):
    monkeypatch.setattr(Sudoku, "grade", lambda self, problem, text: Grade(None, None))
    found = evaluate(model, TASK, fixed_problems(TASK, 4), FixedSchedule(1))
    assert (found.undecided, found.accuracy, found.mean_reward) == (4, 0.0, None)


# The interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_the_wilson_interval_equals_published_values(right, count, low, high):
    """The last case is Newcombe's (1998), 81 of 263."""
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_wilson_bounds_solve_the_score_equation(count, data):
    """A bound is a probability p0 with |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    p = data.draw(st.integers(0, count)) / count
    low, high = wilson_interval(round(p * count), count)
    assert 0 <= low <= p + 1e-12
    assert p - 1e-12 <= high <= 1
    for bound in (low, high):
        assert (p - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / count, abs=1e-9)
