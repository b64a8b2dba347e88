"""What a batch of rollouts holds, and on what it depends."""

import pytest
import torch

from diffpo.decoding.rules import EntropyBounded
from diffpo.models.checkpoints import load
from diffpo.tasks import Grade, Sudoku, get_task
from diffpo.training.rollout import collect, priced, speed


@pytest.fixture
def rollouts(sudoku_model):
    model, task = load(sudoku_model), get_task("sudoku")
    return lambda **changes: collect(
        **{"model": model, "task": task, "prompts": 3, "group_size": 4, "rule": EntropyBounded(1.0)}
        | {"temperature": 1.0, "speed_exponent": 0.5, "seed": 5}
        | changes
    )


def test_a_group_shares_its_prompt_and_differs_in_its_draws(rollouts):
    trajectory = rollouts().trajectory
    prompts, tokens = trajectory.prompt_ids.reshape(3, 4, -1), trajectory.tokens.reshape(3, 4, -1)
    assert (prompts == prompts[:, :1]).all()
    assert all(len(group.unique(dim=0)) > 1 for group in tokens)


def test_rollouts_are_keyed_by_their_seed_and_not_by_the_global_generator(rollouts):
    first = rollouts().trajectory.tokens
    torch.manual_seed(99)
    assert torch.equal(first, rollouts().trajectory.tokens)
    assert not torch.equal(first, rollouts(seed=6).trajectory.tokens)


def test_only_a_right_answer_is_worth_less_when_it_is_slow(rollouts, monkeypatch):
    graded = Sudoku.grade
    monkeypatch.setattr(Sudoku, "grade", lambda *asked: Grade(graded(*asked).reward, asked[2].startswith("1")))
    rollout = rollouts(speed_exponent=1.0)
    factor = speed(rollout.trajectory.nfe, 16)
    assert rollout.correct.any()
    assert not rollout.correct.all()
    expected = torch.where(rollout.correct, rollout.task_reward * factor, rollout.task_reward.clamp(max=1 / 16))
    assert torch.equal(rollout.reward, expected)
    unscaled = rollouts(speed_exponent=0.0)
    assert torch.equal(unscaled.reward, unscaled.task_reward)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0, 4.0])
def test_no_wrong_answer_is_worth_more_than_a_right_one(exponent):
    nfe = torch.arange(1, 17).repeat(2)
    correct = torch.arange(32) < 16
    task_reward = torch.where(correct, 1.0, torch.linspace(0, 0.99, 32))
    reward = priced(task_reward, correct, nfe, 16, exponent)
    assert reward[correct].min() >= reward[~correct].max() * (1 - 1e-6)  # equal at the slowest, up to rounding
    assert (reward[~correct] <= task_reward[~correct]).all()


def test_a_dropped_reward_stays_dropped():
    assert priced(torch.tensor([torch.nan]), torch.tensor([False]), torch.tensor([3]), 16, 1.0).isnan().all()


def test_a_reward_without_a_verdict_is_priced_as_a_right_one():
    """A reward model, say, gives a number and no verdict: all of its completions being wrong would leave nothing to learn."""
    nfe, unknown = torch.tensor([1, 16, 1, 16]), torch.ones(4, dtype=torch.bool)
    reward = priced(torch.tensor([0.8, 0.8, -2.0, -2.0]), unknown, nfe, 16, 1.0)
    assert torch.equal(reward, torch.tensor([0.8, 0.8 / 16, -2.0, -2.0])), "a bad one is not better for being slow"


def test_without_a_price_the_rewards_are_the_tasks():
    task_reward = torch.tensor([3.0, -1.0, 2.5])
    right = torch.tensor([True, True, False])
    assert torch.equal(priced(task_reward, right, torch.tensor([1, 2, 3]), 16, 0.0), task_reward)


def test_a_task_without_verdicts_teaches(rollouts, monkeypatch):
    grade = Sudoku.grade
    monkeypatch.setattr(Sudoku, "grade", lambda self, problem, text: Grade(grade(self, problem, text).reward, None))
    rollout = rollouts(speed_exponent=1.0)
    assert not rollout.correct.any()
    assert torch.equal(rollout.reward, rollout.task_reward * speed(rollout.trajectory.nfe, 16))
