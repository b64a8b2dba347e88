"""row_statistics: every backend against a row-by-row float64 computation, and the traps of fused softmax kernels."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from diffpo_kernels import RowStatistics, backends, row_statistics

OPERATOR = "row_statistics"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT_FIELDS = ("logprob", "entropy", "confidence", "top1", "top2", "odds", "lse")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# How each backend cuts short rows: kChunk in csrc/row_statistics.cpp and .cu, chunk_size in triton_kernels.py.
CHUNKS = {"reference": 512, "native": 4096, "triton": 512, "cuda": 2048}


def run(target, logits_NV: Tensor, temperature=0.0, uniform_N=None, banned_ids=None) -> RowStatistics:
    """The result on the CPU of a call on the target's device."""

    def there(value):
        return value.to(target.device) if isinstance(value, Tensor) else value

    result = row_statistics(there(logits_NV), there(temperature), there(uniform_N), banned_ids, backend=target.backend)
    return RowStatistics(*(field.cpu() for field in result))


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def uniforms(rows: int, seed: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed))


def truth(logits_V: Tensor, banned: tuple[int, ...] = ()) -> dict[str, float]:
    """The T = 0 contract for one row in float64, written the slow way."""
    x = logits_V.double().tolist()
    kept = [i for i in range(len(x)) if i not in banned and x[i] > -math.inf]
    largest = max(x[i] for i in kept)
    lse = largest + math.log(math.fsum(math.exp(x[i] - largest) for i in kept))
    token = next(i for i in kept if x[i] == largest)
    weights = {i: math.exp(x[i] - largest) for i in kept}
    odds = math.fsum(
        weights[i] for i in kept if i != token
    )  # without the largest, so that a small sum keeps its digits
    return {
        "token": token,
        "logprob": -math.log1p(odds),
        "entropy": math.log1p(odds) - math.fsum((x[i] - largest) * weights[i] for i in kept) / (1 + odds),
        "confidence": 1 / (1 + odds),
        "top1": 1 / (1 + odds),
        "top2": max((weights[i] for i in kept if i != token), default=0.0) / (1 + odds),
        "odds": odds,
        "lse": lse,
    }


def assert_matches(result: RowStatistics, logits_NV: Tensor, banned: tuple[int, ...] = ()) -> None:
    for n, row in enumerate(logits_NV):
        expected = truth(row, banned)
        assert result.valid[n]
        assert result.token[n] == expected["token"]
        for field in FLOAT_FIELDS:
            got = getattr(result, field)[n].item()
            assert got == pytest.approx(expected[field], rel=3e-6, abs=1e-5), (n, field)


def assert_inverts(result: RowStatistics, logits_NV: Tensor, temperature_N: Tensor, uniform_N: Tensor) -> None:
    """Each token's interval of the distribution function, in float64, holds the row's number, but for the rounding of float32."""
    log_q_NV = (logits_NV.double() / temperature_N.double()[:, None]).log_softmax(dim=1)
    above_N1 = log_q_NV.exp().cumsum(dim=1).gather(1, result.token[:, None])
    chosen_N1 = log_q_NV.gather(1, result.token[:, None])
    uniform_N1 = uniform_N.double()[:, None]
    assert (uniform_N1 <= above_N1 + 1e-6).all()
    assert (uniform_N1 >= above_N1 - chosen_N1.exp() - 1e-6).all()
    torch.testing.assert_close(result.logprob[:, None].double(), chosen_N1, rtol=3e-6, atol=1e-5)


# V: one lane; below, at and above a vector; ragged; around one chunk; several ragged chunks.
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 127, 128, "C - 1", "C", "C + 1", "3 C + 5"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(target, dtype: torch.dtype, vocabulary: int | str) -> None:
    chunk = CHUNKS[target.backend]
    sizes = {"C - 1": chunk - 1, "C": chunk, "C + 1": chunk + 1, "3 C + 5": 3 * chunk + 5}
    vocabulary = sizes.get(vocabulary, vocabulary)
    logits_NV = random(3, vocabulary, seed=vocabulary, scale=4).to(dtype)
    assert_matches(run(target, logits_NV), logits_NV)


ADVERSARIAL = {
    "flat": lambda V: torch.zeros(V),
    "very negative": lambda V: random(V, seed=1) - 1e4,
    "very positive": lambda V: random(V, seed=2, scale=0.1) + 1e4,
    "certain": lambda V: torch.zeros(V).index_fill(0, torch.tensor(V // 2), 80.0),
    "certain but for many": lambda V: torch.zeros(V).index_fill(0, torch.tensor(V // 2), 12.0),
    "two of them": lambda V: torch.zeros(V).index_fill(0, torch.tensor([1, V - 1]), 30.0),
    "wide": lambda V: random(V, seed=3, scale=30),
    "steps": lambda V: torch.arange(V) * -0.05,
    "mostly impossible": lambda V: torch.where(torch.arange(V) % 7 == 0, random(V, seed=4), -torch.inf),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_accurate_than_torch(target, dtype: torch.dtype) -> None:
    """Error against float64 <= error of plain torch in float32 + 1e-5, in every field."""
    vocabulary = 2 * CHUNKS[target.backend] + 100
    logits_NV = torch.stack([make(vocabulary) for make in ADVERSARIAL.values()]).to(dtype)
    temperature_N = torch.full((len(ADVERSARIAL),), 0.6)
    untempered = [field for field in FLOAT_FIELDS if field not in ("logprob", "confidence")]
    for temperature, uniform_N in ((0.0, None), (temperature_N, uniforms(len(ADVERSARIAL), seed=5))):
        result = run(target, logits_NV, temperature, uniform_N)
        own = row_statistics(logits_NV, temperature, uniform_N, backend="reference")
        if uniform_N is not None:
            assert_inverts(result, logits_NV, temperature_N, uniform_N)
        exact = [truth(row) for row in logits_NV]
        for field in FLOAT_FIELDS if uniform_N is None else untempered:
            exact_N = torch.tensor([row[field] for row in exact], dtype=torch.float64)
            error_N = (getattr(result, field).double() - exact_N).abs()
            allowed_N = (getattr(own, field).double() - exact_N).abs() + 1e-5
            assert (error_N <= allowed_N).all(), (field, dict(zip(ADVERSARIAL, error_N.tolist(), strict=True)))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(2, 700),
    row_step=st.integers(1, 3),
    padding=st.integers(0, 9),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    banned=st.lists(st.integers(0, 699), max_size=4),
    seed=st.integers(0, 99),
)
def test_equals_reference(target, rows, vocabulary, row_step, padding, scale, dtype, banned, seed) -> None:
    base = random(rows * row_step, vocabulary + padding, seed=seed, scale=scale).to(dtype).to(target.device)
    logits_NV = base[::row_step, padding // 2 : padding // 2 + vocabulary]
    temperature_N = uniforms(rows, seed).mul(3).floor()  # 0, 1 and 2 mixed in one call
    uniform_N = uniforms(rows, seed + 100)
    banned = sorted({i % vocabulary for i in banned})[: vocabulary - 1]
    result = run(target, logits_NV, temperature_N, uniform_N, banned)
    logits_NV = logits_NV.cpu()
    reference = row_statistics(logits_NV, temperature_N, uniform_N, banned, backend="reference")
    drawn_N = temperature_N > 0
    assert (result.token == reference.token)[~drawn_N].all()
    allowed_NV = logits_NV.float().index_fill(1, torch.tensor(banned, dtype=torch.int64), -torch.inf)
    drawn = RowStatistics(*(field[drawn_N] for field in result))
    assert_inverts(drawn, allowed_NV[drawn_N], temperature_N[drawn_N], uniform_N[drawn_N])
    for field in FLOAT_FIELDS:
        rows_compared = ~drawn_N if field in ("logprob", "confidence") else slice(None)  # the drawn tokens may differ
        got, expected = (getattr(statistics, field)[rows_compared] for statistics in (result, reference))
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(target, dtype: torch.dtype) -> None:
    chunk = CHUNKS[target.backend]
    logits_NV = torch.zeros(3, 2 * chunk + 9, dtype=dtype)
    logits_NV[1, [5, 5 + 16, chunk + 3]] = 2
    logits_NV[2, [chunk - 1, chunk]] = 2
    result = run(target, logits_NV)
    assert result.token.tolist() == [0, 5, chunk - 1]
    assert torch.equal(result.top1, result.top2)


def test_the_runner_up_may_be_in_any_chunk(target) -> None:
    chunk = CHUNKS[target.backend]
    logits_NV = torch.zeros(4, 3 * chunk)
    for n, (first, second) in enumerate([(7, 9), (9, 7), (7, 2 * chunk), (2 * chunk, 7)]):
        logits_NV[n, first], logits_NV[n, second] = 12.0, 11.0
    assert_matches(run(target, logits_NV), logits_NV)
    banned = (7,)  # the best, or the second best
    assert_matches(run(target, logits_NV, banned_ids=banned), logits_NV, banned)


def test_minus_infinity_is_probability_zero(target) -> None:
    chunk = CHUNKS[target.backend]
    logits_NV = torch.full((3, 2 * chunk + 7), -torch.inf)
    logits_NV[0, 3] = -5.0  # one certain token: its entropy is exactly 0, so gamma = 0 may commit it with others
    logits_NV[1, [2, chunk + 1]] = 7.0
    logits_NV[2, -1] = 1e4
    result = run(target, logits_NV)
    assert_matches(result, logits_NV)
    assert result.entropy[0] == 0
    assert result.entropy[2] == 0


@pytest.mark.parametrize("offset", [-1e4, -3e38, 1e4])
def test_only_differences_of_logits_matter(target, offset: float) -> None:
    result = run(target, torch.full((1, 100), offset))
    assert result.entropy.item() == pytest.approx(math.log(100), abs=1e-5)
    assert result.top1.item() == pytest.approx(0.01, rel=1e-5)
    assert result.token.item() == 0


CERTAIN = {
    "reported": [104.0, 91.38, -50.0, -50.0],
    "reported, a little less sure": [104.0, 91.0, -50.0, -50.0],
    "odds below the spacing of float32": [-3.0, 17.5, 0.25, -1.0],
    "far above": [1e4, 9988.0, 9985.5, -1e4],
    "far below": [-1e4, -9987.5, -10003.0, -9999.0],
    "odds below the spacing of float64": [60.0, 12.0, 20.0, -math.inf],
    "in one token": [-2.0, -7.5, -math.inf, -math.inf],
    "a tie": [250.0, 250.0, 249.0, -250.0],
    "nearly a tie": [1e4 + 2**-9, 1e4, -math.inf, 0.0],
}


@pytest.mark.parametrize("vocabulary", [4, "C + 9"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_depend_neither_on_the_size_of_logits_nor_on_certainty(target, dtype, vocabulary: int | str) -> None:
    """Relative errors, with nothing added: entropy and odds of a sure row are tiny, and the order of sure rows is theirs."""
    chunk = CHUNKS[target.backend]
    logits_NV = torch.full((len(CERTAIN), 4 if vocabulary == 4 else chunk + 9), -torch.inf)
    columns = [0, 1, 2, 3] if vocabulary == 4 else [chunk + 7, 3, chunk - 1, 300]
    logits_NV[:, columns] = torch.tensor(list(CERTAIN.values()))
    logits_NV = logits_NV.to(dtype)
    result = run(target, logits_NV)
    for n, name in enumerate(CERTAIN):
        for field, exact in truth(logits_NV[n]).items():
            assert getattr(result, field)[n].item() == pytest.approx(exact, rel=4e-6, abs=1e-37), (name, field)
    assert torch.equal(result.confidence, result.top1)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confidence_of_a_drawn_token_is_its_untempered_probability(target, dtype: torch.dtype, offset: float) -> None:
    chunk, rows = CHUNKS[target.backend], 6
    logits_NV = (random(rows, chunk + 50, seed=21, scale=9) + offset).to(dtype)
    logits_NV[:, 40:60] = -torch.inf
    temperature_N = torch.tensor([0.0, 0.7, 1.0, 4.0, 30.0, 1e30])
    result = run(target, logits_NV, temperature_N, uniforms(rows, seed=22), [3])
    assert len(set(result.token.tolist())) > 1
    allowed_NV = logits_NV.double().index_fill(1, torch.tensor(3), -torch.inf)
    log_p_N = allowed_NV.log_softmax(dim=1).gather(1, result.token[:, None])[:, 0]
    shifted_N = log_p_N.abs() + 1  # float32 rounds a difference of logits, and the exponential multiplies that error
    assert ((result.confidence.double() / log_p_N.exp() - 1).abs() <= 3e-7 * shifted_N + 1e-6).all()
    assert result.confidence[0] == result.top1[0]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 9, 40, "C + 2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_rows_are_flagged_and_do_not_spread(target, dtype: torch.dtype, column: int | str, poison: float) -> None:
    chunk = CHUNKS[target.backend]
    logits_NV = random(3, chunk + 3, seed=1).to(dtype)
    clean = run(target, logits_NV, 1.0, torch.full((3,), 0.3))
    logits_NV[1, chunk + 2 if column == "C + 2" else column] = poison
    result = run(target, logits_NV, 1.0, torch.full((3,), 0.3))
    assert result.valid.tolist() == [True, False, True]
    assert result.token[1] == -1
    for field in FLOAT_FIELDS:
        assert getattr(result, field)[1].isnan()
        assert torch.equal(getattr(result, field)[[0, 2]], getattr(clean, field)[[0, 2]])


def test_a_row_without_a_finite_logit_is_invalid(target) -> None:
    logits_NV = torch.zeros(3, 20)
    logits_NV[0] = -torch.inf
    logits_NV[0, 7] = torch.nan
    logits_NV[1, 1:] = -torch.inf
    logits_NV[2] = torch.nan
    assert run(target, logits_NV, banned_ids=[0]).valid.tolist() == [False, False, False]
    assert run(target, logits_NV, banned_ids=[7]).valid.tolist() == [False, True, False]
    assert run(target, logits_NV, torch.tensor([0.0, 1.0, 1.0]), torch.full((3,), 0.5), [0]).token.tolist() == [-1] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_ids_are_excluded_from_everything(target, dtype: torch.dtype) -> None:
    chunk = CHUNKS[target.backend]
    logits_NV = random(3, chunk + 50, seed=2).to(dtype)
    logits_NV[0, 11] = 20  # the argmax is banned
    logits_NV[1, chunk + 4] = torch.nan  # not seen
    logits_NV[2, 11] = torch.inf
    banned = (chunk + 4, 11, 11)
    result = run(target, logits_NV, banned_ids=banned)
    assert_matches(result, logits_NV, banned)
    drawn = run(target, logits_NV, 1.0, torch.rand(3), banned)
    assert not set(drawn.token.tolist()) & set(banned)


def test_all_but_one_token_banned(target) -> None:
    vocabulary = CHUNKS[target.backend] + 20
    kept = vocabulary - 3
    banned = [i for i in range(vocabulary) if i != kept]
    logits_NV = random(1, vocabulary, seed=3)
    result = run(target, logits_NV, 0.5, torch.tensor([0.999]), banned)
    assert (result.token.item(), result.entropy.item(), result.top2.item()) == (kept, 0.0, 0.0)


def test_rows_may_be_strided_permuted_or_repeated(target) -> None:
    base = random(6, 70, 3, seed=3).to(target.device)
    for logits_NV in (
        base[::2, :, 0],
        base[:, 5:60, 1],
        base[0].T,
        base[:, :, 2][:, ::3],
        base[:1, :, 0].expand(4, 70),
    ):
        expected = row_statistics(logits_NV.contiguous(), backend="reference")
        result = row_statistics(logits_NV, backend=target.backend)
        torch.testing.assert_close(result.entropy, expected.entropy, rtol=3e-6, atol=1e-5)
        assert torch.equal(result.token, expected.token)


def test_row_offsets_pass_two_to_the_31(target, tmp_path: Path) -> None:
    """Three rows, in a file that is a hole but for the pages they lie on; their distance fits 32 bits, twice that does not."""
    if target.device != "cpu":
        pytest.skip("tests/gpu has its own")
    stride, vocabulary = 2**30 + 8, 40
    file = np.memmap(tmp_path / "sparse", dtype=np.float16, mode="w+", shape=(2 * stride + vocabulary,))
    logits_NV = torch.from_numpy(file).as_strided((3, vocabulary), (stride, 1))
    logits_NV.copy_(random(3, vocabulary, seed=12, scale=3))
    assert_matches(run(target, logits_NV), logits_NV)
    temperature_N, uniform_N = torch.full((3,), 0.7), torch.tensor([0.2, 0.5, 0.9])
    drawn = run(target, logits_NV, temperature_N, uniform_N, [1])
    allowed_NV = logits_NV.float().index_fill(1, torch.tensor(1), -torch.inf)
    assert_inverts(drawn, allowed_NV, temperature_N, uniform_N)


def test_no_rows_and_one_token(target) -> None:
    empty = run(target, torch.zeros(0, 9), 1.0, torch.zeros(0))
    assert [len(field) for field in empty] == [0] * len(RowStatistics._fields)
    single = run(target, torch.full((2, 1), -3.0), 0.7, torch.tensor([0.0, 0.99]))
    assert single.token.tolist() == [0, 0]
    assert single.top2.tolist() == [0.0, 0.0]
    assert single.logprob.tolist() == [0.0, 0.0]
    assert single.lse.tolist() == [-3.0, -3.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_inverts_the_distribution_function(target, temperature: float) -> None:
    rows = 8 if INTERPRETED else 40
    logits_NV = random(rows, 2 * CHUNKS[target.backend] + 11, seed=4, scale=3)
    uniform_N = uniforms(rows, seed=5)
    result = run(target, logits_NV, temperature, uniform_N)
    assert_inverts(result, logits_NV, torch.full((rows,), temperature), uniform_N)
    untempered = run(target, logits_NV)
    for field in ("entropy", "top1", "top2", "odds", "lse"):
        torch.testing.assert_close(getattr(result, field), getattr(untempered, field), rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1e-3, 0.8, 1.0, 100.0])
@pytest.mark.parametrize("vocabulary", [40, "C + 40"])
def test_draw_at_the_ends_never_leaves_the_support(target, vocabulary: int | str, temperature: float) -> None:
    vocabulary = CHUNKS[target.backend] + 40 if vocabulary == "C + 40" else vocabulary
    logits_NV = random(4, vocabulary, seed=6)
    logits_NV[:, :7] = -torch.inf
    logits_NV[:, -30:] = -torch.inf
    uniform_N = torch.tensor([0.0, 1 - 2**-24, 1 - 2**-53, 5e-324], dtype=torch.float64)
    token_N = run(target, logits_NV, temperature, uniform_N, [7]).token
    assert ((token_N > 7) & (token_N < vocabulary - 30)).all()
    if temperature >= 0.8:
        assert token_N[0] == 8
        assert token_N[2] == vocabulary - 31


def test_draws_follow_the_distribution(target, chi_square) -> None:
    vocabulary, draws = 24, 150 if INTERPRETED else 20000
    row_V = random(vocabulary, seed=7)
    uniform_N = uniforms(draws, seed=8)
    token_N = run(target, row_V.expand(draws, vocabulary), 0.7, uniform_N, [3]).token
    expected_V = (row_V / 0.7).index_fill(0, torch.tensor(3), -torch.inf).softmax(0)
    assert chi_square(torch.bincount(token_N, minlength=vocabulary), expected_V) > 4e-4  # and the seed is fixed


def test_evenly_spaced_numbers_give_each_token_its_share(target) -> None:
    """To one draw, which no independent sampling would."""
    vocabulary, draws = 9, 100
    row_V = random(vocabulary, seed=7)
    uniform_N = (torch.arange(draws) + 0.5) / draws
    token_N = run(target, row_V.expand(draws, vocabulary), 1.3, uniform_N).token
    share_V = (row_V / 1.3).softmax(0) * draws
    assert ((torch.bincount(token_N, minlength=vocabulary) - share_V).abs() <= 1).all()
    assert (token_N.diff() >= 0).all()


def test_temperature_per_row(target) -> None:
    logits_NV = random(3, 50, seed=9)
    uniform_N = torch.tensor([0.9, 0.9, 0.9])
    mixed = run(target, logits_NV, torch.tensor([0.0, 0.5, 2.0]), uniform_N)
    for n, temperature in enumerate((0.0, 0.5, 2.0)):
        alone = run(target, logits_NV[n : n + 1], temperature, uniform_N[:1])
        assert [field[n].item() for field in mixed] == [field.item() for field in alone]


@pytest.mark.parametrize("dtype", [float, torch.float32, torch.float64])
def test_a_temperature_too_small_for_float32_still_draws(target, dtype: type | torch.dtype) -> None:
    temperature = 1e-46 if dtype is float else torch.full((2,), 1e-45 if dtype == torch.float32 else 1e-46, dtype=dtype)
    result = run(target, torch.tensor([[3.0, 3.0, 1.0]] * 2), temperature, torch.tensor([0.1, 0.9]))
    assert result.token.tolist() == [0, 1]
    assert result.logprob.tolist() == pytest.approx([-math.log(2)] * 2)


@pytest.mark.parametrize("temperature", [1e37, 3e38, 1e39, 1e300])
@pytest.mark.parametrize("dtype", [float, torch.float32, torch.float64])
def test_a_huge_temperature_draws_evenly(target, dtype: type | torch.dtype, temperature: float) -> None:
    if dtype == torch.float32 and temperature > 3.4e38:
        pytest.skip("infinite in float32, which is refused")
    logits_NV = torch.tensor([[3.0, -torch.inf, 1.0, 9.0, -20.0]] * 4)
    given = temperature if dtype is float else torch.full((4,), temperature, dtype=dtype)
    result = run(target, logits_NV, given, torch.tensor([0.1, 0.3, 0.6, 0.9]), [3])
    assert result.valid.all()
    assert result.token.tolist() == [0, 0, 2, 4]
    assert result.logprob.tolist() == pytest.approx([-math.log(3)] * 4, rel=1e-6)


@pytest.mark.parametrize("temperature", [1e-30, 1e-38])
def test_a_tiny_temperature_takes_the_most_probable(target, temperature: float) -> None:
    logits_NV = torch.cat([random(4, 700, seed=23), random(4, 700, seed=24) + 1e4])
    result = run(target, logits_NV, temperature, uniforms(8, seed=25))
    greedy = run(target, logits_NV)
    assert torch.equal(result.token, greedy.token)
    assert (result.logprob == 0).all()
    assert torch.equal(result.confidence, greedy.confidence)


def test_native_does_not_depend_on_the_number_of_threads() -> None:
    if backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())
    logits_NV = random(9, 40 * CHUNKS["native"] + 3, seed=10)
    uniform_N = uniforms(9, seed=11)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(row_statistics(logits_NV, 0.9, uniform_N, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("chunk", [512, 1024, 2048])
def test_the_chunk_size_of_triton_changes_nothing(monkeypatch, chunk: int) -> None:
    """Few and many rows are cut differently."""
    device = "cpu" if INTERPRETED else "cuda"
    reason = backends.unavailable_reason(OPERATOR, "triton", device)
    if reason is not None or not (INTERPRETED or torch.cuda.is_available()):
        pytest.skip(reason or "no GPU")
    from diffpo_kernels.row_statistics import triton_kernels

    logits_NV, uniform_N = random(2, 4500, seed=13, scale=4).to(device), uniforms(2, seed=14).to(device)
    arguments = (logits_NV, torch.tensor([0.0, 0.8], device=device), uniform_N, [4, 4499])
    expected = row_statistics(*arguments, backend="reference")
    monkeypatch.setattr(triton_kernels, "chunk_size", lambda rows, vocabulary: chunk)
    for got, wanted in zip(row_statistics(*arguments, backend="triton"), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=3e-6, atol=1e-5)


def test_triton_takes_rows_in_batches_of_a_grid(monkeypatch) -> None:
    if not INTERPRETED:
        pytest.skip("under the interpreter")
    from diffpo_kernels.row_statistics import triton_kernels

    logits_NV, uniform_N = random(5, 600, seed=15), uniforms(5, seed=16)
    arguments = (logits_NV, torch.tensor([0.0, 0.8, 0.0, 1.0, 1.2]), uniform_N, [4])
    expected = row_statistics(*arguments, backend="triton")
    monkeypatch.setattr(triton_kernels, "_GRID_LIMIT", 4)  # two chunks: two rows at a time
    result = row_statistics(*arguments, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_registered_operator_passes_the_checks_of_torch(target) -> None:
    if target.backend == "reference":
        pytest.skip("not a registered operator")
    operator = torch.ops.diffpo_kernels.row_statistics.default
    logits_NV, temperature_N = random(3, 20, seed=17).to(target.device), torch.ones(3, device=target.device)
    uniform_N = torch.rand(3, dtype=torch.float64, device=target.device)
    torch.library.opcheck(operator, (logits_NV, temperature_N, uniform_N, [2], target.backend))
    torch.library.opcheck(operator, (logits_NV.bfloat16(), None, None, [], target.backend))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_compiles_as_one_graph(target, temperature: float) -> None:
    def call(logits_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, ...]:
        return tuple(row_statistics(logits_NV * 2, temperature, uniform_N, [1], backend=target.backend))

    logits_NV, uniform_N = random(4, 30, seed=18).to(target.device), uniforms(4, seed=19).to(target.device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(logits_NV, uniform_N), call(logits_NV, uniform_N), strict=True):
        torch.testing.assert_close(got, expected)


def test_compiled_once_for_all_temperatures(target) -> None:
    """Once for a first number that is taken for a constant, and once more for every other."""

    def call(logits_NV: Tensor, temperature: float, uniform_N: Tensor) -> tuple[Tensor, ...]:
        return tuple(row_statistics(logits_NV * 2, temperature, uniform_N, backend=target.backend))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    logits_NV, uniform_N = random(4, 30, seed=18).to(target.device), uniforms(4, seed=19).to(target.device)
    for temperature in (0.5, 0.7, 0.9, 1.0, 1.3):
        arguments = (logits_NV, temperature, uniform_N)
        for got, expected in zip(compiled(*arguments), call(*arguments), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "logits must have dtype .*got torch.float64"),
        ({"logits": torch.zeros(3)}, ValueError, r"logits must have shape \[N, V\], got \[3\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "logits must have V >= 1"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number >= 0, got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be .*got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be .*got inf"),
        ({"temperature": torch.tensor([1.0, math.nan])}, ValueError, "temperature must be .* in every row, got nan"),
        ({"temperature": "1"}, TypeError, "temperature must be a real number, got str"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \[2\], got \[3\]"),
        ({"temperature": 1.0}, ValueError, "uniform must be a tensor .*got None"),
        ({"temperature": torch.tensor([0.0, 1.0])}, ValueError, "uniform must be a tensor .*got None"),
        ({"uniform": torch.tensor([0.0, 1.0])}, ValueError, r"uniform must lie in \[0, 1\)"),
        ({"uniform": torch.tensor([0.0, math.nan])}, ValueError, r"uniform must lie in \[0, 1\)"),
        ({"uniform": torch.zeros(2, device="meta")}, ValueError, "uniform must be on cpu .*got meta"),
        ({"banned_ids": [3]}, ValueError, r"banned_ids must lie in \[0, 3\)"),
        ({"banned_ids": [0, 1, 2]}, ValueError, "banned_ids must leave at least one"),
        ({"banned_ids": 1}, TypeError, "banned_ids must be a sequence of ints"),
        ({"banned_ids": [1.9]}, TypeError, r"banned_ids must be a sequence of ints or None, got \[1.9\]"),
        ({"banned_ids": "12"}, TypeError, "banned_ids must be a sequence of ints or None, got '12'"),
        ({"backend": "fastest"}, ValueError, "backend must be None or one of reference, native, triton, cuda"),
        ({"backend": "cuda"}, RuntimeError, "it runs on cuda tensors only; available: reference"),
    ],
)
def test_bad_input_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        row_statistics(**({"logits": torch.zeros(2, 3)} | arguments))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_needs_a_gpu() -> None:
    with pytest.raises(RuntimeError, match=r"triton.*it runs on cuda tensors only; available: reference"):
        row_statistics(torch.zeros(2, 3), backend="triton")
