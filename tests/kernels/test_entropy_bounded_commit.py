"""entropy_bounded_commit_: against the definition in plain Python and by enumeration, then each clause of the contract.

Costs, bounds and thresholds that meet in a comparison are multiples of 1/8, so that every order of summation is exact and the boundary
itself is tested.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffpo_kernels import backends, entropy_bounded_commit_
from diffpo_kernels.entropy_bounded_commit import compiled, reference

OPERATOR = "entropy_bounded_commit_"
Target = tuple[str, str]  # backend, device
MASK = 99
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLES = 25 if INTERPRETED else 150


def commit(target: Target, tokens: Tensor, *arguments: object, **options: object) -> Tensor:
    """The operator on the target's device; what it changes in place there is copied back."""
    backend, device = target
    given = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    given |= {index: value for index, value in enumerate((tokens, *arguments)) if isinstance(value, Tensor)}
    moved = {name: value.to(device) for name, value in given.items()}
    positional = [moved.get(index, value) for index, value in enumerate((tokens, *arguments))]
    named = {name: moved.get(name, value) for name, value in options.items()}
    committed_BL = entropy_bounded_commit_(*positional, **named, backend=backend)
    for name in (0, 6, 7, "logprob", "commit_step", "nfe"):
        if name in moved and moved[name] is not given[name]:
            given[name].copy_(moved[name])
    return committed_BL.cpu()


def masked_row(*, rows: int = 1, length: int) -> tuple[Tensor, Tensor]:
    tokens_BL = torch.full((rows, length), MASK)
    return tokens_BL, torch.arange(rows * length).reshape(rows, length)


class Row(NamedTuple):
    """One row of the operator's arguments as Python values; the last five are changed in place."""

    tokens: list[int]
    proposal: list[int]
    proxy: list[float]
    cost: list[float]
    gamma: float
    proposal_logprob: list[float]
    logprob: list[float]
    commit_step: list[int]
    nfe: list[int]
    window: list[int]


def by_definition(row: Row, rule: str, advance: bool) -> list[bool]:
    """The contract, clause by clause, on one row."""
    length, (start, end) = len(row.tokens), row.window
    masked = [i for i in range(length) if start <= i < end and row.tokens[i] == MASK]
    order = sorted(masked, key=lambda i: (math.inf if math.isnan(row.proxy[i]) else row.proxy[i], i))
    prefix: list[int] = order[:1]
    for n in range(2, len(order) + 1):
        costs = [math.inf if math.isnan(row.cost[i]) else max(row.cost[i], 0.0) for i in order[:n]]
        price = sum(costs) - max(costs) if rule == "joint" else (n + 1) * costs[-1]
        if row.gamma < math.inf and not (math.inf not in costs and price <= row.gamma):
            break
        prefix = order[:n]
    row.nfe[0] += bool(masked)
    for i in prefix:
        row.tokens[i] = row.proposal[i]
        row.commit_step[i] = row.nfe[0]
        row.logprob[i] = row.proposal_logprob[i]
    if advance and not any(start <= i < end and row.tokens[i] == MASK for i in range(length)):
        row.window[:] = min(end, length), min(2 * end - start, length)
    return [i in prefix for i in range(length)]


def sampled(generator: torch.Generator, values: list, *shape: int) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]


PROXIES = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0**-140, 1e30, math.inf, -math.inf, math.nan]
COSTS = [0.0, 0.125, 0.25, 0.5, 1.0, 2.0, -0.0, -1.0]
BAD_COSTS = [*COSTS, math.nan, math.inf, -math.inf]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    seed=st.integers(0, 10**9),
    rows=st.integers(1, 3),
    length=st.integers(1, 40),
    width=st.integers(0, 20),
    rule=st.sampled_from(["joint", "ranked"]),
    costs=st.sampled_from([COSTS, BAD_COSTS]),
    proxies=st.sampled_from([PROXIES, None]),
    proxy_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cost_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    advance=st.booleans(),
    bounded=st.booleans(),
    strided=st.booleans(),
)
def test_equals_the_definition(
    target, seed, rows, length, width, rule, costs, proxies, proxy_dtype, cost_dtype, advance, bounded, strided
):
    generator = torch.Generator().manual_seed(seed)

    def laid_out(values: Tensor) -> Tensor:
        return torch.stack([values, values.flip(0)], dim=-1)[..., 0] if strided else values

    random_BL = torch.rand(rows, length, generator=generator)
    proxy_BL = laid_out((random_BL if proxies is None else sampled(generator, proxies, rows, length)).to(proxy_dtype))
    cost_BL = laid_out(sampled(generator, costs, rows, length).to(cost_dtype))
    gamma_B = sampled(generator, [0.0, 0.125, 0.5, 1.0, 3.0, 1e30, math.inf], rows)
    tokens_BL = laid_out(sampled(generator, [MASK, MASK, MASK, 1], rows, length))
    proposal_BL = laid_out(sampled(generator, [MASK, *range(7)], rows, length))  # a mask that is proposed stays one
    proposal_logprob_BL, logprob_BL = (
        laid_out(torch.rand(rows, length, generator=generator)),
        laid_out(torch.zeros(rows, length)),
    )
    commit_step_BL, nfe_B = laid_out(torch.zeros(rows, length, dtype=torch.int64)), torch.arange(rows) * 7
    start_B = torch.randint(-3, length + 2, (rows,), generator=generator)
    end_B = start_B + width
    expected = [
        Row(*values)
        for values in zip(
            tokens_BL.tolist(), proposal_BL.tolist(), proxy_BL.tolist(), cost_BL.tolist(), gamma_B.tolist(), proposal_logprob_BL.tolist(),
            logprob_BL.tolist(), commit_step_BL.tolist(), nfe_B[:, None].tolist(), torch.stack([start_B, end_B], dim=1).tolist(),
            strict=True,
        )
    ]  # fmt: skip
    expected_committed = [by_definition(row, rule, advance) for row in expected]

    committed_BL = commit(
        target, tokens_BL, proposal_BL, proxy_BL, cost_BL, gamma_B, MASK, start_B, end_B, rule=rule,
        proposal_logprob=proposal_logprob_BL, logprob=logprob_BL, commit_step=commit_step_BL, nfe=nfe_B, advance=advance,
        max_window=width if bounded else None,
    )  # fmt: skip
    assert committed_BL.tolist() == expected_committed
    assert tokens_BL.tolist() == [row.tokens for row in expected]
    assert commit_step_BL.tolist() == [row.commit_step for row in expected]
    assert nfe_B.tolist() == [row.nfe[0] for row in expected]
    assert logprob_BL.tolist() == [row.logprob for row in expected]
    assert [[*window] for window in zip(start_B.tolist(), end_B.tolist(), strict=True)] == [
        row.window for row in expected
    ]


@pytest.mark.parametrize("rule", ["joint", "ranked"])
@pytest.mark.parametrize("length", [33, 64, 256] if INTERPRETED else [33, 64, 256, 1000, 2048])
def test_equals_the_reference_on_random_numbers(target: Target, length: int, rule: str) -> None:
    generator = torch.Generator().manual_seed(length)
    rows = 2 if INTERPRETED else 16
    entropy_BL = -2 * torch.rand(rows, length, generator=generator).log()
    proxy_BL = -torch.rand(rows, length, generator=generator) if rule == "ranked" else entropy_BL
    gamma_B = (torch.arange(rows) * 40.0 / rows).exp2() - 0.5
    arguments = masked_row(rows=rows, length=length)[1], proxy_BL, entropy_BL, gamma_B, MASK, 0, length
    tokens_BL, expected_tokens_BL = (masked_row(rows=rows, length=length)[0] for _ in range(2))
    expected_BL = entropy_bounded_commit_(expected_tokens_BL, *arguments, rule=rule, backend="reference")
    assert torch.equal(commit(target, tokens_BL, *arguments, rule=rule), expected_BL)
    assert torch.equal(tokens_BL, expected_tokens_BL)


def every_subset(cost: list[float]) -> tuple[Tensor, Tensor]:
    """Members [2^n, n] of every subset of n positions, and its sum - max [2^n]."""
    n = len(cost)
    member_SN = (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2 == 1
    chosen_SN = torch.where(member_SN, torch.tensor(cost, dtype=torch.float64), 0.0)
    return member_SN, chosen_SN.sum(dim=1) - chosen_SN.amax(dim=1)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    cost=st.lists(st.integers(0, 12).map(lambda k: k / 8), min_size=1, max_size=10),
    gamma=st.integers(0, 40).map(lambda k: k / 8),
)
def test_no_subset_that_fits_has_more_positions(target: Target, cost: list[float], gamma: float) -> None:
    """With proxy = cost the prefix is the best of all subsets: swapping a member for a cheaper position never raises sum - max."""
    tokens_BL, proposal_BL = masked_row(length=len(cost))
    cost_BL = torch.tensor([cost])
    committed_BL = commit(target, tokens_BL, proposal_BL, cost_BL, cost_BL, gamma, MASK, 0, len(cost))
    member_SN, excess_S = every_subset(cost)
    assert int(committed_BL.sum()) == int(member_SN.sum(dim=1)[excess_S <= gamma].max())
    assert float(excess_S[(member_SN == committed_BL).all(dim=1)]) <= gamma or int(committed_BL.sum()) == 1


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


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data(), length=st.integers(1, 10), gamma=st.integers(0, 24))
def test_commits_the_largest_prefix_of_all_subsets(
    target: Target, data: st.DataObject, length: int, gamma: int
) -> None:
    def draw(values: st.SearchStrategy) -> list:
        return data.draw(st.lists(values, min_size=length, max_size=length))

    tokens, proxy, eighths = draw(st.sampled_from([MASK, MASK, 1])), draw(st.integers(0, 4)), draw(st.integers(0, 12))
    start, end = data.draw(st.integers(-1, length)), data.draw(st.integers(0, length + 2))
    cost = [k / 8 for k in eighths]
    tokens_BL, proposal_BL = torch.tensor([tokens]), torch.arange(length)[None]
    committed_BL = commit(
        target, tokens_BL, proposal_BL, torch.tensor([proxy]).float(), torch.tensor([cost]), gamma / 8, MASK, start, end
    )
    expected = by_enumeration(tokens, proxy, cost, gamma / 8, start, end)
    assert set(committed_BL[0].nonzero()[:, 0].tolist()) == expected
    assert tokens_BL[0].tolist() == [i if i in expected else tokens[i] for i in range(length)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gamma_zero_commits_one_and_infinity_the_window(target: Target, dtype: torch.dtype) -> None:
    tokens_BL, proposal_BL = masked_row(rows=2, length=40)
    if dtype == torch.float64 and target[0] in ("triton", "cuda"):
        pytest.skip("orders in float32, see test_what_a_gpu_kernel_cannot_take")
    entropy_BL = (torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) + 0.1).to(dtype)
    gamma_B = torch.tensor([0.0, math.inf])
    start_B, end_B = torch.tensor([3, 5]), torch.tensor([30, 35])
    committed_BL = commit(target, tokens_BL, proposal_BL, entropy_BL, entropy_BL, gamma_B, MASK, start_B, end_B)
    assert committed_BL[0].nonzero().tolist() == [[3 + entropy_BL[0, 3:30].argmin().item()]]
    assert committed_BL[1].nonzero()[:, 0].tolist() == list(range(5, 35))
    assert torch.equal(tokens_BL, torch.where(committed_BL, proposal_BL, MASK))


def test_gamma_zero_takes_every_position_of_entropy_zero(target: Target) -> None:
    tokens_BL, proposal_BL = masked_row(length=5)
    entropy_BL = torch.tensor([[0.0, 0.3, 0.0, 0.2, 0.0]])
    committed_BL = commit(target, tokens_BL, proposal_BL, entropy_BL, entropy_BL, 0.0, MASK, 0, 5)
    # The smallest positive entropy is the prefix's max, which the rule leaves out of the sum.
    assert committed_BL.tolist() == [[True, False, True, True, True]]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_unit_costs_are_fixed_top_k(target: Target, k: int) -> None:
    tokens_BL, proposal_BL = masked_row(rows=3, length=6)
    proxy_BL = torch.rand(3, 6, generator=torch.Generator().manual_seed(k))
    committed_BL = commit(target, tokens_BL, proposal_BL, proxy_BL, torch.ones(3, 6), k - 1, MASK, 0, 6)
    expected_BL = torch.zeros(3, 6, dtype=torch.bool).scatter_(1, proxy_BL.topk(k, largest=False).indices, True)
    assert torch.equal(committed_BL, expected_BL)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7, 1.0])
def test_a_confidence_threshold_as_data(target: Target, p: float) -> None:
    tokens_BL, proposal_BL = masked_row(rows=4, length=20)
    confidence_BL = torch.rand(4, 20, generator=torch.Generator().manual_seed(1))
    confidence_BL[3] *= 0.25  # none above most thresholds
    cost_BL = torch.where(confidence_BL >= p, 0.0, math.inf)
    committed_BL = commit(target, tokens_BL, proposal_BL, -confidence_BL, cost_BL, 0.0, MASK, 0, 20)
    best_BL = torch.arange(20) == confidence_BL.argmax(dim=1, keepdim=True)
    assert torch.equal(committed_BL, (confidence_BL >= p) | best_BL)


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0, 2.5, math.inf])
def test_the_factor_rule_as_data(target: Target, factor: float) -> None:
    tokens_BL, proposal_BL = masked_row(rows=4, length=20)
    confidence_BL = 1 - torch.rand(4, 20, generator=torch.Generator().manual_seed(2)) ** 3
    committed_BL = commit(
        target, tokens_BL, proposal_BL, -confidence_BL, 1 - confidence_BL, factor, MASK, 0, 20, rule="ranked"
    )
    descending_BL, order_BL = confidence_BL.double().sort(dim=1, descending=True)
    accepted_BL = descending_BL >= 1 - factor / torch.arange(2, 22)
    accepted_BL[:, 0] = True
    expected_BL = torch.zeros(4, 20, dtype=torch.bool).scatter_(1, order_BL, accepted_BL.cummin(dim=1).values)
    assert torch.equal(committed_BL, expected_BL)


def test_ties_go_to_the_lowest_position(target: Target) -> None:
    tokens_BL, proposal_BL = masked_row(length=50)
    committed_BL = commit(target, tokens_BL, proposal_BL, torch.zeros(1, 50), torch.ones(1, 50), 2.0, MASK, 4, 50)
    assert committed_BL.nonzero()[:, 1].tolist() == [4, 5, 6]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_infinite_costs_are_committed_only_first_or_at_infinite_gamma(target: Target, bad: float) -> None:
    entropy_BL = torch.tensor([[0.1, bad, 0.1], [bad, bad, bad]])
    for gamma, expected in ((1e30, [[0, 2], [0]]), (math.inf, [[0, 1, 2], [0, 1, 2]])):
        tokens_BL, proposal_BL = masked_row(rows=2, length=3)
        committed_BL = commit(target, tokens_BL, proposal_BL, entropy_BL, entropy_BL, gamma, MASK, 0, 3)
        assert [row.nonzero()[:, 0].tolist() for row in committed_BL] == expected


def test_an_infinite_cost_in_front_stands_alone(target: Target) -> None:
    tokens_BL, proposal_BL = masked_row(length=3)
    proxy_BL = torch.tensor([[0.0, 1.0, 2.0]])
    committed_BL = commit(
        target, tokens_BL, proposal_BL, proxy_BL, torch.tensor([[math.inf, 0.0, 0.0]]), 5.0, MASK, 0, 3
    )
    assert committed_BL.tolist() == [[True, False, False]]


def test_values_at_inactive_positions_do_not_matter(target: Target) -> None:
    tokens_BL, proposal_BL = torch.tensor([[MASK, 5, MASK, MASK]]), torch.tensor([[7, 7, 7, 7]])
    proxy_BL = torch.tensor([[-math.inf, math.nan, math.inf, math.nan]])
    entropy_BL = torch.tensor([[math.nan, math.inf, 1.0, 1.0]])
    committed_BL = commit(target, tokens_BL, proposal_BL, proxy_BL, entropy_BL, 1.0, MASK, 1, 4)
    assert committed_BL.tolist() == [[False, False, True, True]]
    assert tokens_BL.tolist() == [[MASK, 5, 7, 7]]


def test_rows_without_a_masked_position_commit_nothing(target: Target) -> None:
    tokens_BL = torch.tensor([[1, 2, 3], [MASK, 2, MASK], [MASK, MASK, MASK]])
    before = tokens_BL.clone()
    start_B, end_B = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 2])
    committed_BL = commit(
        target, tokens_BL, tokens_BL + 1, torch.zeros(3, 3), torch.zeros(3, 3), math.inf, MASK, start_B, end_B
    )
    assert not committed_BL.any()
    assert torch.equal(tokens_BL, before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(target: Target, shape: tuple[int, int]) -> None:
    tokens_BL, values_BL = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    assert commit(target, tokens_BL, tokens_BL, values_BL, values_BL, 1.0, MASK, 0, 4).shape == shape


def test_writes_through_a_strided_view(target: Target) -> None:
    buffer = torch.full((2, 10), MASK)
    tokens_BL = buffer[:, ::2]
    commit(target, tokens_BL, torch.ones_like(tokens_BL), torch.zeros(2, 5), torch.zeros(2, 5), 0.0, MASK, 0, 5)
    assert (buffer[:, ::2] == 1).all()
    assert (buffer[:, 1::2] == MASK).all()


@pytest.mark.parametrize("columns", [slice(None), slice(None, None, 2)], ids=["rows", "columns"])
def test_writes_every_output_through_its_strides(target: Target, columns: slice) -> None:
    def buffer(value: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        whole = torch.full((4, 20), value, dtype=dtype)
        return whole, whole[::2, 3:13][:, columns]

    tokens, tokens_BL = buffer(MASK, torch.int64)
    logprob, logprob_BL = buffer(7.0, torch.float32)
    commit_step, commit_step_BL = buffer(-1, torch.int64)
    (nfe, nfe_B), (start, start_B), (end, end_B) = ((x, x[::3]) for x in (torch.tensor([k] * 6) for k in (4, 0, 10)))
    length = tokens_BL.shape[1]
    zeros_BL = torch.zeros(2, length)
    commit(
        target, tokens_BL, zeros_BL.long(), zeros_BL, zeros_BL, 0.0, MASK, start_B, end_B, proposal_logprob=zeros_BL, logprob=logprob_BL,
        commit_step=commit_step_BL, nfe=nfe_B, advance=True,
    )  # fmt: skip
    for written_BL, whole, value, before in ((tokens_BL, tokens, 0, MASK), (logprob_BL, logprob, 0, 7), (commit_step_BL, commit_step, 5, -1)):  # fmt: skip
        assert (written_BL == value).all()
        assert (whole == before).sum() == whole.numel() - written_BL.numel()
    assert [x.tolist() for x in (nfe, start)] == [[5, 4, 4, 5, 4, 4], [length, 0, 0, length, 0, 0]]
    assert end.tolist() == [length, 10, 10, length, 10, 10]


@pytest.mark.parametrize(
    "view",
    [lambda x: x.t(), lambda x: x.t()[1:3], lambda x: x[:, 2:3], lambda x: x[1:2, ::3], lambda x: x[:1].expand(1, 6)],
)
def test_views_without_overlap_are_written(target: Target, view: Callable[[Tensor], Tensor]) -> None:
    tokens_BL = view(torch.full((5, 6), MASK))
    zeros_BL = torch.zeros(tokens_BL.shape)
    assert commit(target, tokens_BL, zeros_BL.long(), zeros_BL, zeros_BL, 0.0, MASK, 0, 9).all()
    assert (tokens_BL == 0).all()


def test_offsets_above_2_to_the_31(target: Target, tmp_path: Path) -> None:
    if target[1] != "cpu":
        pytest.skip("tests/gpu")
    stride = 2**30 + 16  # an int32, twice the stride is none

    def far_apart(dtype: torch.dtype) -> Tensor:
        """Zeros [3, 8] in a sparse file: only the pages that are touched exist."""
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return torch.from_file(str(path), True, 2 * stride + 8, dtype=dtype).as_strided((3, 8), (stride, 1))

    tokens_BL, proposal_BL, commit_step_BL = (far_apart(torch.int64) for _ in range(3))
    entropy_BL, proposal_logprob_BL, logprob_BL = (far_apart(torch.float32) for _ in range(3))
    values_BL = torch.arange(24.0).view(3, 8)
    for tensor, value in (
        (tokens_BL, MASK),
        (proposal_BL, values_BL),
        (entropy_BL, values_BL),
        (proposal_logprob_BL, -values_BL),
    ):
        tensor[:] = value
    committed_BL = commit(
        target, tokens_BL, proposal_BL, entropy_BL, entropy_BL, torch.tensor([0.0, 17.0, math.inf]), MASK, 2, 8,
        proposal_logprob=proposal_logprob_BL, logprob=logprob_BL, commit_step=commit_step_BL, nfe=torch.zeros(3).long(),
    )  # fmt: skip
    assert committed_BL.sum(dim=1).tolist() == [1, 2, 6]
    assert torch.equal(tokens_BL, torch.where(committed_BL, values_BL.long(), MASK))
    assert torch.equal(commit_step_BL, committed_BL.long())
    assert torch.equal(logprob_BL, torch.where(committed_BL, -values_BL, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_logprobs_of_every_dtype_are_copied_bit_by_bit(target: Target, dtype: torch.dtype) -> None:
    tokens_BL, proposal_BL = masked_row(length=6)
    proposal_logprob_BL = torch.tensor([[-1.1, -math.inf, -1e-30, math.nan, -0.3, -70000.0]], dtype=dtype)
    logprob_BL = torch.ones(1, 6, dtype=dtype)
    commit(
        target, tokens_BL, proposal_BL, torch.zeros(1, 6), torch.ones(1, 6), 3.0, MASK, 1, 6,
        proposal_logprob=proposal_logprob_BL, logprob=logprob_BL,
    )  # fmt: skip
    expected_BL = torch.cat(
        [torch.ones(1, 1, dtype=dtype), proposal_logprob_BL[:, 1:5], torch.ones(1, 1, dtype=dtype)], dim=1
    )
    torch.testing.assert_close(logprob_BL, expected_BL, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", ["joint", "ranked"])
def test_a_whole_decode(target: Target, rule: str) -> None:
    rows, length, block = 3, 20, 8  # the last block is a short one
    generator = torch.Generator().manual_seed(0)
    gamma_B = torch.tensor([0.0, 1.0, math.inf])
    tokens_BL, proposal_BL = masked_row(rows=rows, length=length)
    tokens_BL[1, 8:16] = 5  # a block that is full from the start costs a call, but no network evaluation
    given_BL = tokens_BL != MASK
    commit_step_BL, nfe_B, logprob_BL = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, length)  # fmt: skip
    start_B, end_B = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), block)
    times_BL, steps_B, drawn_BL = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, length)  # fmt: skip
    calls = 0
    while (tokens_BL == MASK).any():
        entropy_BL, proposal_logprob_BL = torch.rand(2, rows, length, generator=generator)
        window_before = start_B.clone(), end_B.clone()
        committed_BL = commit(
            target, tokens_BL, proposal_BL, entropy_BL, entropy_BL, gamma_B, MASK, start_B, end_B, rule=rule, advance=True,
            proposal_logprob=proposal_logprob_BL, logprob=logprob_BL, commit_step=commit_step_BL, nfe=nfe_B, max_window=block,
        )  # fmt: skip
        position_L = torch.arange(length)
        assert (
            committed_BL <= (position_L >= window_before[0][:, None]) & (position_L < window_before[1][:, None])
        ).all()
        times_BL += committed_BL
        steps_B += committed_BL.any(dim=1)
        drawn_BL = torch.where(committed_BL, proposal_logprob_BL, drawn_BL)
        calls += 1
        assert calls <= length + 1
    assert torch.equal(times_BL, (~given_BL).long())
    assert torch.equal(tokens_BL, torch.where(given_BL, 5, proposal_BL))
    assert torch.equal(nfe_B, steps_B)
    assert torch.equal(commit_step_BL.amax(dim=1), nfe_B)
    assert nfe_B[0] == length
    assert nfe_B[2] == 3
    assert torch.equal(logprob_BL, drawn_BL)
    assert (start_B == length).all()
    assert (end_B == length).all()
    before = [tensor.clone() for tensor in (tokens_BL, nfe_B, commit_step_BL)]
    committed_BL = commit(target, tokens_BL, proposal_BL, entropy_BL, entropy_BL, gamma_B, MASK, start_B, end_B, advance=True, nfe=nfe_B, commit_step=commit_step_BL)  # fmt: skip
    assert not committed_BL.any()
    assert all(torch.equal(a, b) for a, b in zip(before, (tokens_BL, nfe_B, commit_step_BL), strict=True))
    assert (start_B == length).all()
    assert (end_B == length).all()


def test_advance_out_of_the_row(target: Target) -> None:
    tokens_BL = torch.zeros(4, 10, dtype=torch.int64)
    start_B, end_B = torch.tensor([8, -2, 12, 0]), torch.tensor([12, 2, 16, 0])
    commit(
        target, tokens_BL, tokens_BL, torch.zeros(4, 10), torch.zeros(4, 10), 0.0, MASK, start_B, end_B, advance=True
    )
    assert start_B.tolist() == [10, 2, 10, 0]
    assert end_B.tolist() == [10, 6, 10, 0]


@pytest.mark.parametrize("start", [-(10**30), torch.tensor([-(2**40)])])
@pytest.mark.parametrize("end", [10**30, torch.tensor([2**40])])
def test_windows_far_outside(target: Target, start: int | Tensor, end: int | Tensor) -> None:
    tokens_BL, proposal_BL = masked_row(length=5)
    zeros_BL = torch.zeros(1, 5)
    assert commit(target, tokens_BL, proposal_BL, zeros_BL, zeros_BL, 0.0, MASK, start, end).all()
    tokens_BL, proposal_BL = masked_row(length=5)
    assert not commit(target, tokens_BL, proposal_BL, zeros_BL, zeros_BL, 0.0, MASK, end, start).any()


def run_unchecked(
    target: Target, tokens_BL: Tensor, gamma: object, start_B: Tensor, end_B: Tensor, max_window: int
) -> Tensor:
    """An implementation without the contract's checks: values that a GPU call cannot look at."""
    backend, device = target
    zeros_BL = torch.zeros(tokens_BL.shape, device=device)
    inputs = [x.to(device) if isinstance(x, Tensor) else x for x in (tokens_BL, gamma, start_B, end_B)]
    committed_BL = (reference if backend == "reference" else compiled).entropy_bounded_commit_(
        inputs[0], zeros_BL.long(), zeros_BL, zeros_BL + 1, inputs[1], MASK, inputs[2], inputs[3], "joint", None, None, None, None,
        True, max_window, backend,
    )  # fmt: skip
    start_B.copy_(inputs[2])
    end_B.copy_(inputs[3])
    return committed_BL.cpu()


def test_a_broken_promise_on_a_gpu(target: Target) -> None:
    tokens_BL, _ = masked_row(rows=2, length=40)
    start_B, end_B = torch.tensor([3, 20]), torch.tensor([23, 30])
    committed_BL = run_unchecked(target, tokens_BL, math.inf, start_B, end_B, 10)
    assert [row.nonzero()[:, 0].tolist() for row in committed_BL] == [list(range(3, 13)), list(range(20, 30))]
    assert (start_B.tolist(), end_B.tolist()) == ([3, 30], [23, 40])


def test_gamma_nan_on_a_gpu(target: Target) -> None:
    tokens_BL, _ = masked_row(rows=2, length=6)
    gamma_B = torch.tensor([math.nan, 1.0])
    committed_BL = run_unchecked(target, tokens_BL, gamma_B, torch.zeros(2, dtype=torch.int64), torch.full((2,), 6), 6)
    assert committed_BL.sum(dim=1).tolist() == [1, 2]


def test_max_window_leaves_the_result_alone(target: Target) -> None:
    expected = None
    for max_window in (4, 5, 16, 17, 50, 10**9, None):
        tokens_BL, proposal_BL = masked_row(rows=3, length=50)
        entropy_BL = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
        start_B = torch.tensor([0, 48, -2])
        commit(
            target,
            tokens_BL,
            proposal_BL,
            entropy_BL,
            entropy_BL,
            0.7,
            MASK,
            start_B,
            start_B + 4,
            max_window=max_window,
        )
        expected = tokens_BL if expected is None else expected
        assert torch.equal(tokens_BL, expected)


def test_float64_proxies_are_ordered_in_float64() -> None:
    proxy_BL = torch.tensor([[1.0, 1.0 - 1e-12, 1.0 + 1e-12]], dtype=torch.float64)
    for backend in ("reference", None):
        tokens_BL, proposal_BL = masked_row(length=3)
        entropy_bounded_commit_(tokens_BL, proposal_BL, proxy_BL, proxy_BL, 0.0, MASK, 0, 3, backend=backend)
        assert tokens_BL.tolist() == [[MASK, 1, MASK]]


@pytest.mark.parametrize(("dtype", "length", "message"), [
    (torch.float64, 8, "proxy must not be torch.float64"), (torch.float32, 2049, "at most 2048 positions, got max_window 2049"),
])  # fmt: skip
def test_what_a_gpu_kernel_cannot_take(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, length: int, message: str
) -> None:
    monkeypatch.setattr(backends, "select", lambda operator, device, backend: "triton")
    tokens_BL, proposal_BL = masked_row(length=length)
    values_BL = torch.zeros(1, length, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        entropy_bounded_commit_(tokens_BL, proposal_BL, values_BL, values_BL, 0.0, MASK, 0, length, backend="triton")
    assert (tokens_BL == MASK).all()
    assert entropy_bounded_commit_(
        tokens_BL, proposal_BL, values_BL, values_BL, 0.0, MASK, 0, length
    ).all()  # the reference


def test_the_number_of_threads_does_not_matter(target: Target) -> None:
    if INTERPRETED:
        pytest.skip("the interpreter has no threads")
    generator = torch.Generator().manual_seed(0)
    entropy_BL = torch.rand(96, 1024, generator=generator)
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        tokens_BL, proposal_BL = masked_row(rows=96, length=1024)
        torch.set_num_threads(threads)
        try:
            commit(target, tokens_BL, proposal_BL, entropy_BL, entropy_BL, 9.0, MASK, 0, 1024)
        finally:
            torch.set_num_threads(before)
        results.append(tokens_BL)
    assert torch.equal(*results)
    assert (results[0] != MASK).any(dim=1).all()


def compiled_arguments(device: str, backend: str) -> compiled.Arguments:
    tokens_BL, proposal_BL = (tensor.to(device) for tensor in masked_row(rows=2, length=6))
    values_BL = torch.rand(2, 6, device=device)
    per_row = [torch.tensor(values, device=device) for values in ([0, 2], [4, 6], [3, 3])]
    return compiled.Arguments(
        tokens_BL, proposal_BL, values_BL, values_BL.clone(), torch.rand(2, device=device), 0.0, MASK, per_row[0], 0, per_row[1], 0,
        "joint", values_BL.clone(), values_BL.clone(), tokens_BL.clone(), per_row[2], True, 4, backend,
    )  # fmt: skip


def test_registered_operator_passes_the_checks_of_torch(target: Target) -> None:
    backend, device = target
    if backend == "reference":
        pytest.skip("plain torch, not an operator of its own")
    full = compiled_arguments(device, backend)
    plain = full._replace(gamma=None, start=None, end=None, end_of_all=6, advance=False, rule="ranked", proposal_logprob=None,
                          logprob=None, commit_step=None, nfe=None)  # fmt: skip
    for arguments in (full, plain):
        torch.library.opcheck(torch.ops.diffpo_kernels.entropy_bounded_commit_.default, tuple(arguments))


@pytest.mark.parametrize(("rule", "compiler"), [("joint", "aot_eager"), ("ranked", "aot_eager"), ("joint", "inductor")])
def test_compiles_as_one_graph(target: Target, rule: str, compiler: str) -> None:
    backend, device = target
    if compiler == "inductor" and target != ("native", "cpu"):
        pytest.skip("slow to compile; one backend stands for all, which are one operator")

    def step(tokens_BL, proposal_BL, entropy_BL, gamma_B, start_B, end_B, commit_step_BL, nfe_B):
        committed_BL = entropy_bounded_commit_(
            tokens_BL, proposal_BL, entropy_BL * 2, entropy_BL * 2, gamma_B, MASK, start_B, end_B, rule=rule, commit_step=commit_step_BL,
            nfe=nfe_B, advance=True, max_window=4, backend=backend,
        )  # fmt: skip
        return committed_BL, tokens_BL + 1  # sees the mutation

    def arguments() -> list[Tensor]:
        tokens_BL, proposal_BL = masked_row(rows=2, length=6)
        entropy_BL = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))
        per_row = [torch.tensor(values) for values in ([0.3, 9.0], [0, 2], [4, 6], [0, 0])]
        return [
            x.to(device)
            for x in (tokens_BL, proposal_BL, entropy_BL, *per_row[:3], torch.zeros_like(tokens_BL), per_row[3])
        ]

    eager, traced = arguments(), arguments()
    expected = step(*eager)
    got = torch.compile(step, fullgraph=True, backend=compiler)(*traced)
    for a, b in zip((*expected, *eager), (*got, *traced), strict=True):
        assert torch.equal(a, b)


INT64_B, INT64_BL, VALUES_BL = torch.zeros(2).long(), torch.zeros(2, 3).long(), torch.zeros(2, 3)


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
        ({"mask_id": 10**30}, ValueError, "mask_id must lie in the range of int64, got 1000"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, ValueError, r"start must have shape \[2\]"),
        ({"end": 2.5}, TypeError, "end must be an int"),
        ({"tokens": torch.zeros(1, 3, dtype=torch.int64).expand(2, 3)}, ValueError, "tokens is written in place"),
        ({"rule": "threshold"}, ValueError, "rule must be one of joint, ranked, got 'threshold'"),
        ({"logprob": VALUES_BL}, ValueError, "must be given together, got no proposal_logprob"),
        ({"proposal_logprob": VALUES_BL}, ValueError, "must be given together, got no logprob"),
        (
            {"logprob": VALUES_BL, "proposal_logprob": VALUES_BL.double()},
            TypeError,
            "proposal_logprob must have dtype torch.float32",
        ),
        ({"logprob": VALUES_BL[:1], "proposal_logprob": VALUES_BL}, ValueError, r"logprob must have shape \[2, 3\]"),
        ({"commit_step": VALUES_BL.long()}, ValueError, "nfe must be given with commit_step"),
        ({"commit_step": VALUES_BL, "nfe": INT64_B}, TypeError, "commit_step must have dtype torch.int64"),
        ({"nfe": INT64_B.int()}, TypeError, "nfe must have dtype torch.int64"),
        ({"nfe": INT64_B[:1].expand(2)}, ValueError, "nfe is written in place"),
        ({"nfe": INT64_B[:1]}, ValueError, r"nfe must have shape \[2\]"),
        ({"advance": True}, TypeError, "start must be an int64 tensor .* where advance is True, got an int"),
        (
            {"advance": True, "start": INT64_B},
            TypeError,
            "end must be an int64 tensor .* where advance is True, got an int",
        ),
        ({"advance": True, "start": INT64_B, "end": INT64_B}, ValueError, "start and end .* not share memory"),
        (
            {"advance": True, "start": INT64_B, "end": INT64_B.view(2)},
            ValueError,
            "start and end .* not share memory",
        ),
        (
            {"tokens": INT64_BL, "commit_step": INT64_BL, "nfe": INT64_B},
            ValueError,
            "tokens and commit_step .* not share",
        ),
        ({"nfe": INT64_BL[0, :2], "tokens": INT64_BL}, ValueError, "tokens and nfe .* not share memory"),
        ({"tokens": torch.zeros(9).long().as_strided((2, 3), (1, 1))}, ValueError, "tokens is written in place"),
        ({"tokens": torch.zeros(9).long().as_strided((2, 3), (2, 1))}, ValueError, r"tokens is .* strides \[2, 1\]"),
        ({"advance": True, "start": INT64_B, "end": INT64_B[:1].expand(2)}, ValueError, "end is written in place"),
        ({"max_window": 2.0}, TypeError, "max_window must be an int, got float"),
        ({"max_window": -1}, ValueError, "max_window must be at least 0, got -1"),
        ({"max_window": 2}, ValueError, "max_window must be at least the longest window, 3 positions, got 2"),
        ({"max_window": 1, "start": torch.tensor([0, 1])}, ValueError, "the longest window, 3 positions, got 1"),
        ({"backend": "cuda"}, RuntimeError, "available: reference"),
        ({"backend": "numpy"}, ValueError, "backend must be None or one of"),
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
