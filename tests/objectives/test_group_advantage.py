"""Advantages of the rollouts within their groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpo.training.rollout import group_advantage, speed

NAN = math.nan
KINDS = ["mean", "std", "leave_one_out"]


def naive_advantage(reward, group_size, kind):
    result = []
    for start in range(0, len(reward), group_size):
        group = reward[start : start + group_size]
        known = [r for r in group if not math.isnan(r)]
        for i, r in enumerate(group):
            if math.isnan(r) or all(other == known[0] for other in known):
                result.append(0.0)
            elif kind == "leave_one_out":
                others = [other for j, other in enumerate(group) if j != i and not math.isnan(other)]
                result.append(r - sum(others) / len(others))
            else:
                mean = sum(known) / len(known)
                deviation = (sum((other - mean) ** 2 for other in known) / len(known)) ** 0.5
                result.append((r - mean) / (deviation if kind == "std" else 1))
    return torch.tensor(result)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("reward", "group_size"),
    [
        ([1.0, 0.0, 0.0, 1.0, 0.1, 0.9, 0.4, 0.5], 4),
        ([2.0, 0.5, 0.0, 0.0], 2),
        ([1.0, NAN, 0.0, 0.5, NAN, NAN, 0.3, 0.8], 4),
        ([NAN, 1.0, NAN, NAN, 0.2, 0.1], 3),
        ([NAN, NAN, 1.0, 0.0], 2),
        ([0.0, 0.0, 1.0, 1.0], 2),
        ([-3.0, 5.0, 7.0], 3),
    ],
)
def test_equals_the_loop(kind, reward, group_size):
    got = group_advantage(torch.tensor(reward), group_size, kind)
    torch.testing.assert_close(got, naive_advantage(reward, group_size, kind), rtol=1e-5, atol=1e-6)


def test_by_hand():
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, NAN, 0.0, NAN])
    torch.testing.assert_close(group_advantage(reward, 4), torch.tensor([0.5, -0.5, -0.5, 0.5, 0.5, 0.0, -0.5, 0.0]))
    torch.testing.assert_close(
        group_advantage(reward, 4, "std"), torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 0.0, -1.0, 0.0])
    )
    torch.testing.assert_close(
        group_advantage(reward, 4, "leave_one_out"),
        torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3, 1.0, 0.0, -1.0, 0.0]),
    )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 10).map(lambda n: n / 10) | st.just(NAN), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(KINDS),
)
def test_advantages_of_a_group_sum_to_zero_and_are_never_nan(groups, kind):
    advantage = group_advantage(torch.tensor(groups).flatten(), 5, kind).reshape(-1, 5)
    assert advantage.isfinite().all()
    torch.testing.assert_close(advantage.sum(dim=1), torch.zeros(len(groups)), rtol=0, atol=1e-5)
    assert (advantage[torch.tensor(groups).isnan()] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 2.0, 3.3, 123.4, -17.9])
def test_equal_rewards_have_no_advantage_at_all(kind, value):
    for group_size in range(2, 14):
        reward = torch.full((group_size * 2,), value)
        reward[group_size] = NAN  # the second group has one fewer
        assert (group_advantage(reward, group_size, kind) == 0).all()


def test_small_differences_keep_their_advantage():
    # a slow right answer against a slightly faster one
    advantage = group_advantage(torch.tensor([1.0, 1.0001]), 2)
    torch.testing.assert_close(advantage, torch.tensor([-5e-5, 5e-5]), rtol=1e-2, atol=0)


def test_speed_of_a_rollout():
    assert speed(torch.tensor([1, 16, 8]), 16).tolist() == [1.0, 1 / 16, 9 / 16]
