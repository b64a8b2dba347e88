"""Advantages of the rollouts within their groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpo.objectives.advantage import group_advantage
from diffpo.training.rollout import priced, speed

NAN = math.nan
KINDS = ["mean", "std", "best", "rank", "leave_one_out"]


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
            elif kind == "rank":
                beats = sum(r > other for other in known) - sum(r < other for other in known)
                result.append(beats / len(known) / 2)
            else:
                mean = sum(known) / len(known)
                deviation = (sum((other - mean) ** 2 for other in known) / len(known)) ** 0.5
                scale = {"mean": 1, "std": deviation + 1e-4, "best": max(map(abs, known))}[kind]
                result.append((r - mean) / scale)
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
    one = 0.5 / (0.5 + 1e-4)
    torch.testing.assert_close(
        group_advantage(reward, 4, "std"), torch.tensor([one, -one, -one, one, one, 0.0, -one, 0.0])
    )
    torch.testing.assert_close(
        group_advantage(reward, 4, "leave_one_out"),
        torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3, 1.0, 0.0, -1.0, 0.0]),
    )
    reward = torch.tensor([0.1, 0.4, 0.4, 0.0, -0.5, NAN, -2.0, NAN])
    torch.testing.assert_close(
        group_advantage(reward, 4, "rank"), torch.tensor([-1 / 8, 2 / 8, 2 / 8, -3 / 8, 1 / 4, 0.0, -1 / 4, 0.0])
    )
    torch.testing.assert_close(
        group_advantage(reward, 4, "best"), torch.tensor([-0.3125, 0.4375, 0.4375, -0.5625, 0.375, 0.0, -0.375, 0.0])
    )


def test_rank_knows_no_order_among_rewards_that_differ_by_rounding():
    """Also where others of the group differ by more."""
    reward = torch.tensor([0.3, 0.3000001, 0.2999999, 1.0])
    assert group_advantage(reward, 4, "rank").tolist() == [-1 / 8, -1 / 8, -1 / 8, 3 / 8]


@pytest.mark.parametrize("kind", ["std", "best", "rank"])
def test_a_slow_prompt_counts_as_much_as_a_fast_one(kind):
    fast = torch.tensor([1.0, 0.5, 0.0, 0.75])
    both = group_advantage(torch.cat([fast, fast / 12]), 4, kind)
    torch.testing.assert_close(both[:4], both[4:], rtol=5e-3, atol=0)


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


INF = math.inf
ALMOST_EQUAL = [
    [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3000001],
    [1e6, 1e6, 1e6, 1e6 + 0.06, 1e6, 1e6, 1e6, 1e6 - 0.06],
    [-7.1, -7.1000004, -7.1, -7.1, -7.0999994, -7.1, -7.1, -7.1],
    [0.1 + 0.2 - 0.3, 0.0, 0.0, -0.0, 0.0, 0.0, 3e-8, 0.0],
    [0.9, 0.3 * 3, 1 - 0.1, NAN, 0.9000002, 0.9, -INF, 0.9],
    [3e37, 3e37, 3e37 + 1e31, 3e37, 3e37, 3e37, 3e37, 3e37],
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", ALMOST_EQUAL)
def test_rewards_that_differ_by_rounding_have_no_advantage(kind, dtype, reward):
    assert (group_advantage(torch.tensor(reward, dtype=dtype), 8, kind) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e5, 1e-2, 1e37])
def test_differences_beyond_rounding_keep_theirs(kind, scale):
    reward = torch.tensor([1.0, 1.001, 1.0, 0.999]) * scale
    advantage = group_advantage(reward, 4, kind)
    deviation = 1e-3 * scale / 2**0.5
    expected = {
        "mean": 1e-3 * scale,
        "std": 1e-3 * scale / (deviation + 1e-4),
        "best": 1e-3 / 1.001,
        "rank": 3 / 8,
        "leave_one_out": 4 / 3 * 1e-3 * scale,
    }[kind]
    torch.testing.assert_close(advantage, torch.tensor([0, expected, 0, -expected]), rtol=2e-3, atol=2e-3 * expected)


@pytest.mark.parametrize(
    ("usual", "other", "most"),
    [(0.3, 0.300003, 0.03), (1.0, 1.00001, 0.09), (0.0, 2e-6, 0.02), (-2.0, -2.00002, 0.17)],
)
def test_nearly_equal_rewards_have_small_advantages(usual, other, most):
    advantage = group_advantage(torch.tensor([usual] * 7 + [other], dtype=torch.float64), 8, "std")
    assert 0 < advantage.abs().max() < most
    assert advantage[7].sign() == math.copysign(1, other - usual)


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_reward_does_not_count(kind):
    reward = torch.tensor([1.0, INF, 0.0, 0.5, 1.0, -INF, 0.0, 0.5, INF, INF, -INF, 3.0, INF, -INF, NAN, INF])
    with_nan = torch.where(reward.isinf(), NAN, reward)
    advantage = group_advantage(reward, 4, kind)
    assert torch.equal(advantage, group_advantage(with_nan, 4, kind))
    assert advantage.isfinite().all()
    assert (advantage[8:] == 0).all(), "one known reward, and none"
    assert (group_advantage(reward, 1, kind) == 0).all()


def test_the_price_of_time_keeps_an_infinite_reward_out():
    nfe, correct = torch.tensor([4, 4, 4, 4]), torch.tensor([True, False, False, True])
    got = priced(torch.tensor([INF, INF, -INF, 1.0]), correct, nfe, 8, 1.0)
    assert got[:3].isnan().all()
    assert got[3] == speed(nfe[3], 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_have_the_dtype_of_the_rewards(dtype):
    assert group_advantage(torch.tensor([0.0, 1.0], dtype=dtype), 2, "std").dtype == dtype


def test_small_differences_keep_their_advantage():
    # a slow right answer against a slightly faster one
    advantage = group_advantage(torch.tensor([1.0, 1.0001]), 2)
    torch.testing.assert_close(advantage, torch.tensor([-5e-5, 5e-5]), rtol=1e-2, atol=0)


def test_speed_of_a_rollout():
    assert speed(torch.tensor([1, 16, 8]), 16).tolist() == [1.0, 1 / 16, 9 / 16]
