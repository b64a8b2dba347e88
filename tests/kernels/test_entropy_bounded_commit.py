"""entropy_bounded_commit_: against the definition by enumeration, then each clause of the contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffpo_kernels import entropy_bounded_commit_

MASK = 99


def masked_row(*, rows: int = 1, length: int) -> tuple[Tensor, Tensor]:
    tokens_BL = torch.full((rows, length), MASK)
    return tokens_BL, torch.arange(rows * length).reshape(rows, length)


def by_enumeration(
    tokens: list[int], proxy: list[float], cost: list[float], gamma: float, start: int, end: int
) -> set[int]:
    """Every subset of the window is tried: the largest that is closed under "more certain" and within the bound."""
    window = [i for i in range(len(tokens)) if start <= i < end and tokens[i] == MASK]
    best: set[int] = set()
    for bits in range(1, 2 ** len(window)):
        subset = {i for k, i in enumerate(window) if bits >> k & 1}
        is_prefix = all((proxy[i], i) < (proxy[j], j) for i in subset for j in window if j not in subset)
        costs = [cost[i] for i in subset]
        within = len(subset) == 1 or sum(costs) - max(costs) <= gamma
        if is_prefix and within and len(subset) > len(best):
            best = subset
    return best


# Costs and bounds are multiples of 1/8, so that both sides compute exactly and the boundary itself is tested.
@settings(max_examples=150, deadline=None)
@given(data=st.data(), length=st.integers(1, 8), gamma=st.integers(0, 24))
def test_commits_what_the_definition_says(data: st.DataObject, length: int, gamma: int) -> None:
    def draw(values: st.SearchStrategy) -> list:
        return data.draw(st.lists(values, min_size=length, max_size=length))

    tokens, proxy, eighths = draw(st.sampled_from([MASK, MASK, 1])), draw(st.integers(0, 4)), draw(st.integers(0, 12))
    start, end = data.draw(st.integers(-1, length)), data.draw(st.integers(0, length + 2))
    cost = [k / 8 for k in eighths]
    tokens_BL, proposal_BL = torch.tensor([tokens]), torch.arange(length)[None]
    committed_BL = entropy_bounded_commit_(
        tokens_BL, proposal_BL, torch.tensor([proxy]).float(), torch.tensor([cost]), gamma / 8, MASK, start, end
    )
    expected = by_enumeration(tokens, proxy, cost, gamma / 8, start, end)
    assert set(committed_BL[0].nonzero()[:, 0].tolist()) == expected
    assert tokens_BL[0].tolist() == [i if i in expected else tokens[i] for i in range(length)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gamma_zero_commits_one_and_infinity_the_window(dtype: torch.dtype) -> None:
    tokens_BL, proposal_BL = masked_row(rows=2, length=40)
    entropy_BL = (torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) + 0.1).to(dtype)
    gamma_B = torch.tensor([0.0, math.inf])
    start_B, end_B = torch.tensor([3, 5]), torch.tensor([30, 35])
    committed_BL = entropy_bounded_commit_(
        tokens_BL, proposal_BL, entropy_BL, entropy_BL, gamma_B, MASK, start_B, end_B
    )
    assert committed_BL[0].nonzero().tolist() == [[3 + entropy_BL[0, 3:30].argmin().item()]]
    assert committed_BL[1].nonzero()[:, 0].tolist() == list(range(5, 35))
    assert torch.equal(tokens_BL, torch.where(committed_BL, proposal_BL, MASK))


def test_gamma_zero_takes_every_position_of_entropy_zero() -> None:
    tokens_BL, proposal_BL = masked_row(length=5)
    entropy_BL = torch.tensor([[0.0, 0.3, 0.0, 0.2, 0.0]])
    committed_BL = entropy_bounded_commit_(tokens_BL, proposal_BL, entropy_BL, entropy_BL, 0.0, MASK, 0, 5)
    # The smallest positive entropy is the prefix's max, which the rule leaves out of the sum.
    assert committed_BL.tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_unit_costs_are_fixed_top_k(k: int) -> None:
    tokens_BL, proposal_BL = masked_row(rows=3, length=6)
    proxy_BL = torch.rand(3, 6, generator=torch.Generator().manual_seed(k))
    committed_BL = entropy_bounded_commit_(tokens_BL, proposal_BL, proxy_BL, torch.ones(3, 6), k - 1, MASK, 0, 6)
    expected_BL = torch.zeros(3, 6, dtype=torch.bool).scatter_(1, proxy_BL.topk(k, largest=False).indices, True)
    assert torch.equal(committed_BL, expected_BL)


def test_ties_go_to_the_lowest_position() -> None:
    tokens_BL, proposal_BL = masked_row(length=50)
    committed_BL = entropy_bounded_commit_(
        tokens_BL, proposal_BL, torch.zeros(1, 50), torch.ones(1, 50), 2.0, MASK, 4, 50
    )
    assert committed_BL.nonzero()[:, 1].tolist() == [4, 5, 6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_infinite_costs_are_committed_only_first_or_at_infinite_gamma(bad: float) -> None:
    entropy_BL = torch.tensor([[0.1, bad, 0.1], [bad, bad, bad]])
    for gamma, expected in ((1e30, [[0, 2], [0]]), (math.inf, [[0, 1, 2], [0, 1, 2]])):
        tokens_BL, proposal_BL = masked_row(rows=2, length=3)
        committed_BL = entropy_bounded_commit_(tokens_BL, proposal_BL, entropy_BL, entropy_BL, gamma, MASK, 0, 3)
        assert [row.nonzero()[:, 0].tolist() for row in committed_BL] == expected


def test_an_infinite_cost_in_front_stands_alone() -> None:
    tokens_BL, proposal_BL = masked_row(length=3)
    proxy_BL = torch.tensor([[0.0, 1.0, 2.0]])
    committed_BL = entropy_bounded_commit_(
        tokens_BL, proposal_BL, proxy_BL, torch.tensor([[math.inf, 0.0, 0.0]]), 5.0, MASK, 0, 3
    )
    assert committed_BL.tolist() == [[True, False, False]]


def test_values_at_inactive_positions_do_not_matter() -> None:
    tokens_BL, proposal_BL = torch.tensor([[MASK, 5, MASK, MASK]]), torch.tensor([[7, 7, 7, 7]])
    proxy_BL = torch.tensor([[-math.inf, math.nan, math.inf, math.nan]])
    entropy_BL = torch.tensor([[math.nan, math.inf, 1.0, 1.0]])
    committed_BL = entropy_bounded_commit_(tokens_BL, proposal_BL, proxy_BL, entropy_BL, 1.0, MASK, 1, 4)
    assert committed_BL.tolist() == [[False, False, True, True]]
    assert tokens_BL.tolist() == [[MASK, 5, 7, 7]]


def test_rows_without_a_masked_position_commit_nothing() -> None:
    tokens_BL = torch.tensor([[1, 2, 3], [MASK, 2, MASK], [MASK, MASK, MASK]])
    before = tokens_BL.clone()
    start_B, end_B = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 2])
    committed_BL = entropy_bounded_commit_(
        tokens_BL, tokens_BL + 1, torch.zeros(3, 3), torch.zeros(3, 3), math.inf, MASK, start_B, end_B
    )
    assert not committed_BL.any()
    assert torch.equal(tokens_BL, before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    tokens_BL, values_BL = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    assert entropy_bounded_commit_(tokens_BL, tokens_BL, values_BL, values_BL, 1.0, MASK, 0, 4).shape == shape


def test_writes_through_a_strided_view() -> None:
    buffer = torch.full((2, 10), MASK)
    tokens_BL = buffer[:, ::2]
    entropy_bounded_commit_(
        tokens_BL, torch.ones_like(tokens_BL), torch.zeros(2, 5), torch.zeros(2, 5), 0.0, MASK, 0, 5
    )
    assert (buffer[:, ::2] == 1).all()
    assert (buffer[:, 1::2] == MASK).all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must have dtype torch.int64, got torch.float32"),
        ({"proposal": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"proposal must have shape \[2, 3\]"),
        ({"proxy": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "proxy must have dtype"),
        ({"entropy": torch.zeros(2, 3, device="meta")}, ValueError, "entropy must be on cpu"),
        ({"gamma": math.nan}, ValueError, "gamma must be a number >= 0, got nan"),
        ({"gamma": torch.tensor([0.0, -1.0])}, ValueError, "gamma must be a number >= 0 in every row, got -1"),
        ({"mask_id": 1.0}, TypeError, "mask_id must be an int, got float"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, ValueError, r"start must have shape \[2\]"),
        ({"end": 2.5}, TypeError, "end must be an int"),
        ({"backend": "cuda"}, RuntimeError, "not written yet; available: reference"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    tokens_BL, values_BL = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    good = {
        "tokens": tokens_BL, "proposal": tokens_BL, "proxy": values_BL, "entropy": values_BL,
        "gamma": 0.1, "mask_id": MASK, "start": 0, "end": 3,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        entropy_bounded_commit_(**(good | changed))
