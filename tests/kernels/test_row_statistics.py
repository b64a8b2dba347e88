"""row_statistics: both CPU backends against a row-by-row float64 computation, and the traps of fused softmax kernels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffpo_kernels import RowStatistics, backends, row_statistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT_FIELDS = ("logprob", "entropy", "top1", "top2", "lse")
CHUNK = 4096  # kChunk in csrc/row_statistics.h


def truth(logits_V: Tensor, banned: tuple[int, ...] = ()) -> dict[str, float]:
    """The T = 0 contract for one row in float64, written the slow way."""
    x = logits_V.double().tolist()
    kept = [i for i in range(len(x)) if i not in banned and x[i] > -math.inf]
    largest = max(x[i] for i in kept)
    lse = largest + math.log(math.fsum(math.exp(x[i] - largest) for i in kept))
    p = sorted((math.exp(x[i] - lse) for i in kept), reverse=True)
    return {
        "token": next(i for i in kept if x[i] == largest),
        "logprob": largest - lse,
        "entropy": -math.fsum((x[i] - lse) * math.exp(x[i] - lse) for i in kept),
        "top1": p[0],
        "top2": p[1] if len(p) > 1 else 0.0,
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


# V: 1 lane; below, at and above a vector; ragged; around one chunk; several ragged chunks.
@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 127, 128, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(cpu_backend: str, dtype: torch.dtype, vocabulary: int) -> None:
    logits_NV = (torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 4).to(dtype)
    assert_matches(row_statistics(logits_NV, backend=cpu_backend), logits_NV)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(2, 300),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_native_equals_reference(rows: int, vocabulary: int, scale: float, seed: int) -> None:
    if backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(rows, vocabulary, generator=generator) * scale
    temperature_N = torch.rand(rows, generator=generator).mul(3).floor()  # 0, 1 and 2 mixed in one call
    uniform_N = torch.rand(rows, generator=generator)
    banned = [seed % vocabulary]
    native, reference = (
        row_statistics(logits_NV, temperature_N, uniform_N, banned, backend=name) for name in ("native", "reference")
    )
    assert (native.token == reference.token).all()
    for field in FLOAT_FIELDS:
        torch.testing.assert_close(getattr(native, field), getattr(reference, field), rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lowest_index(cpu_backend: str, dtype: torch.dtype) -> None:
    logits_NV = torch.zeros(3, 2 * CHUNK + 9, dtype=dtype)
    logits_NV[1, [5, 5 + 16, CHUNK + 3]] = 2
    logits_NV[2, [CHUNK - 1, CHUNK]] = 2
    result = row_statistics(logits_NV, backend=cpu_backend)
    assert result.token.tolist() == [0, 5, CHUNK - 1]
    assert torch.equal(result.top1, result.top2)


def test_minus_infinity_is_probability_zero(cpu_backend: str) -> None:
    logits_NV = torch.full((3, 2 * CHUNK + 7), -torch.inf)
    logits_NV[0, 3] = -5.0  # one certain token: its entropy is exactly 0, so gamma = 0 may commit it with others
    logits_NV[1, [2, CHUNK + 1]] = 7.0
    logits_NV[2, -1] = 1e4
    result = row_statistics(logits_NV, backend=cpu_backend)
    assert_matches(result, logits_NV)
    assert result.entropy[0] == 0
    assert result.entropy[2] == 0


@pytest.mark.parametrize("offset", [-1e4, -3e38, 1e4])
def test_only_differences_of_logits_matter(cpu_backend: str, offset: float) -> None:
    logits_NV = torch.full((1, 100), offset)
    result = row_statistics(logits_NV, backend=cpu_backend)
    assert result.entropy.item() == pytest.approx(math.log(100), abs=1e-5)
    assert result.top1.item() == pytest.approx(0.01, rel=1e-5)
    assert result.token.item() == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 9, 40, CHUNK + 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_rows_are_flagged_and_do_not_spread(
    cpu_backend: str, dtype: torch.dtype, column: int, poison: float
) -> None:
    logits_NV = torch.randn(3, CHUNK + 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    clean = row_statistics(logits_NV, 1.0, torch.full((3,), 0.3), backend=cpu_backend)
    logits_NV[1, column] = poison
    result = row_statistics(logits_NV, 1.0, torch.full((3,), 0.3), backend=cpu_backend)
    assert result.valid.tolist() == [True, False, True]
    assert result.token[1] == -1
    for field in FLOAT_FIELDS:
        assert getattr(result, field)[1].isnan()
        assert torch.equal(getattr(result, field)[[0, 2]], getattr(clean, field)[[0, 2]])


def test_a_row_without_a_finite_logit_is_invalid(cpu_backend: str) -> None:
    logits_NV = torch.zeros(2, 20)
    logits_NV[0] = -torch.inf
    logits_NV[0, 7] = torch.nan
    logits_NV[1, 1:] = -torch.inf
    assert row_statistics(logits_NV, banned_ids=[0], backend=cpu_backend).valid.tolist() == [False, False]
    assert row_statistics(logits_NV, banned_ids=[7], backend=cpu_backend).valid.tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_banned_ids_are_excluded_from_everything(cpu_backend: str, dtype: torch.dtype) -> None:
    logits_NV = torch.randn(3, CHUNK + 50, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits_NV[0, 11] = 20  # the argmax is banned
    logits_NV[1, CHUNK + 4] = torch.nan  # not seen
    logits_NV[2, 11] = torch.inf
    banned = (CHUNK + 4, 11, 11)
    result = row_statistics(logits_NV, banned_ids=banned, backend=cpu_backend)
    assert_matches(result, logits_NV, banned)
    drawn = row_statistics(logits_NV, 1.0, torch.rand(3), banned, backend=cpu_backend)
    assert not set(drawn.token.tolist()) & set(banned)


def test_rows_may_be_strided_permuted_or_repeated(cpu_backend: str) -> None:
    base = torch.randn(6, 70, 3, generator=torch.Generator().manual_seed(3))
    for logits_NV in (
        base[::2, :, 0],
        base[:, 5:60, 1],
        base[0].T,
        base[:, :, 2][:, ::3],
        base[:1, :, 0].expand(4, 70),
    ):
        expected = row_statistics(logits_NV.contiguous(), backend="reference")
        result = row_statistics(logits_NV, backend=cpu_backend)
        torch.testing.assert_close(result.entropy, expected.entropy, rtol=3e-6, atol=1e-5)
        assert torch.equal(result.token, expected.token)


def test_no_rows_and_one_token(cpu_backend: str) -> None:
    empty = row_statistics(torch.zeros(0, 9), 1.0, torch.zeros(0), backend=cpu_backend)
    assert [len(field) for field in empty] == [0] * 7
    single = row_statistics(torch.full((2, 1), -3.0), 0.7, torch.tensor([0.0, 0.99]), backend=cpu_backend)
    assert single.token.tolist() == [0, 0]
    assert single.top2.tolist() == [0.0, 0.0]
    assert single.logprob.tolist() == [0.0, 0.0]
    assert single.lse.tolist() == [-3.0, -3.0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draw_inverts_the_distribution_function(cpu_backend: str, temperature: float) -> None:
    logits_NV = torch.randn(40, 2 * CHUNK + 11, generator=torch.Generator().manual_seed(4)) * 3
    uniform_N = torch.rand(40, generator=torch.Generator().manual_seed(5))
    result = row_statistics(logits_NV, temperature, uniform_N, backend=cpu_backend)
    log_q_NV = (logits_NV.double() / temperature).log_softmax(dim=1)
    above_N1 = log_q_NV.exp().cumsum(dim=1).gather(1, result.token[:, None])
    chosen_N1 = log_q_NV.gather(1, result.token[:, None])
    uniform_N1 = uniform_N.double()[:, None]
    assert (uniform_N1 <= above_N1 + 1e-6).all()
    assert (uniform_N1 >= above_N1 - chosen_N1.exp() - 1e-6).all()
    torch.testing.assert_close(result.logprob[:, None].double(), chosen_N1, rtol=3e-6, atol=1e-5)
    untempered = row_statistics(logits_NV, backend=cpu_backend)
    for field in ("entropy", "top1", "top2", "lse"):
        torch.testing.assert_close(getattr(result, field), getattr(untempered, field), rtol=0, atol=0)


@pytest.mark.parametrize("temperature", [1e-3, 0.8, 1.0, 100.0])
@pytest.mark.parametrize("vocabulary", [40, CHUNK + 40])
def test_draw_at_the_ends_never_leaves_the_support(cpu_backend: str, vocabulary: int, temperature: float) -> None:
    logits_NV = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(6))
    logits_NV[:, :7] = -torch.inf
    logits_NV[:, -30:] = -torch.inf
    uniform_N = torch.tensor([0.0, 1 - 2**-24, 1 - 2**-53, 5e-324], dtype=torch.float64)
    token_N = row_statistics(logits_NV, temperature, uniform_N, banned_ids=[7], backend=cpu_backend).token
    assert ((token_N > 7) & (token_N < vocabulary - 30)).all()
    if temperature >= 0.8:
        assert token_N[0] == 8
        assert token_N[2] == vocabulary - 31


def test_draws_follow_the_distribution(cpu_backend: str) -> None:
    vocabulary, draws = 24, 20000
    row_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(7))
    uniform_N = torch.rand(draws, generator=torch.Generator().manual_seed(8))
    token_N = row_statistics(row_V.expand(draws, vocabulary), 0.7, uniform_N, [3], backend=cpu_backend).token
    expected_V = (row_V / 0.7).index_fill(0, torch.tensor(3), -torch.inf).softmax(0) * draws
    seen_V = torch.bincount(token_N, minlength=vocabulary)
    assert seen_V[3] == 0
    kept = expected_V > 0
    chi_square = ((seen_V - expected_V)[kept].square() / expected_V[kept]).sum().item()
    assert chi_square < 51.2  # 22 degrees of freedom: exceeded with probability 4e-4, and the seed is fixed


def test_temperature_per_row(cpu_backend: str) -> None:
    logits_NV = torch.randn(3, 50, generator=torch.Generator().manual_seed(9))
    uniform_N = torch.tensor([0.9, 0.9, 0.9])
    mixed = row_statistics(logits_NV, torch.tensor([0.0, 0.5, 2.0]), uniform_N, backend=cpu_backend)
    for n, temperature in enumerate((0.0, 0.5, 2.0)):
        alone = row_statistics(logits_NV[n : n + 1], temperature, uniform_N[:1], backend=cpu_backend)
        assert [field[n].item() for field in mixed] == [field.item() for field in alone]


def test_native_does_not_depend_on_the_number_of_threads() -> None:
    if backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())
    logits_NV = torch.randn(9, 40 * CHUNK + 3, generator=torch.Generator().manual_seed(10))
    uniform_N = torch.rand(9, generator=torch.Generator().manual_seed(11))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(row_statistics(logits_NV, 0.9, uniform_N, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


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
        ({"backend": "fastest"}, ValueError, "backend must be None or one of reference, native, triton, cuda"),
        ({"backend": "triton"}, RuntimeError, "triton.*not written yet; available: reference"),
        ({"backend": "cuda"}, RuntimeError, "it runs on cuda tensors only"),
    ],
)
def test_bad_input_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        row_statistics(**({"logits": torch.zeros(2, 3)} | arguments))
