"""skinny_linear: every backend against float64, and what the native one promises: bits that depend on the two rows alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpo_kernels import backends, skinny_linear
from diffpo_kernels.skinny_linear import LEAST_WEIGHTS, ROWS

OPERATOR = "skinny_linear"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

needs_native = pytest.mark.skipif(backends.native_module() is None, reason="the compiled extension is missing")


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def native(hidden: Tensor, weight: Tensor) -> Tensor:
    return skinny_linear(hidden, weight, backend="native")


def assert_no_less_accurate_than_torch(got: Tensor, hidden_ND: Tensor, weight_VD: Tensor) -> None:
    exact = hidden_ND.double() @ weight_VD.double().T
    allowed = (F.linear(hidden_ND, weight_VD) - exact).abs().max() + 1e-5 * max(1.0, exact.abs().max().item())
    assert got.shape == exact.shape
    assert got.dtype == hidden_ND.dtype
    assert got.is_contiguous()
    assert (got - exact).abs().max() <= allowed


# N: around a vector and a group of 32; V: around a tile, a vector and a block of 64; D: around a cache line and a run of 512.
@pytest.mark.parametrize("vocabulary", [1, 7, 8, 16, 63, 64, 65, 203])
@pytest.mark.parametrize("depth", [1, 15, 16, 33, 512, 513])
def test_matches_float64(target, vocabulary: int, depth: int) -> None:
    weight_VD = random(vocabulary, depth, seed=vocabulary, scale=depth**-0.5)
    for rows in (1, 2, 15, 16, 17, 31, 32, 33, 48, 65, 100):
        hidden_ND = random(rows, depth, seed=rows)
        got = skinny_linear(hidden_ND.to(target.device), weight_VD.to(target.device), backend=target.backend).cpu()
        assert_no_less_accurate_than_torch(got, hidden_ND, weight_VD)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("vocabulary", [0, 5])
@pytest.mark.parametrize("depth", [0, 6])
def test_empty_sizes(target, rows: int, vocabulary: int, depth: int) -> None:
    got = skinny_linear(torch.ones(rows, depth), torch.ones(vocabulary, depth), backend=target.backend)
    assert torch.equal(got, torch.full((rows, vocabulary), float(depth)))


ADVERSARIAL = {
    "equal terms": lambda *shape: torch.full(shape, 0.1),
    "large": lambda *shape: random(*shape, seed=1) + 1e3,
    "wide": lambda *shape: random(*shape, seed=2) * 10 ** random(*shape, seed=3),
    "tiny": lambda *shape: random(*shape, seed=4) * 1e-20,
    "mostly zero": lambda *shape: random(*shape, seed=5) * (random(*shape, seed=6) > 2),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("depth", [256, 5000])
def test_no_less_accurate_than_torch(target, name: str, depth: int) -> None:
    hidden_ND, weight_VD = ADVERSARIAL[name](9, depth), random(150, depth, seed=7)
    for weight in (weight_VD, ADVERSARIAL[name](150, depth)):
        assert_no_less_accurate_than_torch(skinny_linear(hidden_ND, weight, backend=target.backend), hidden_ND, weight)


@needs_native
def test_a_row_depends_on_nothing_but_itself_to_the_last_bit() -> None:
    hidden_ND, weight_VD = random(100, 700, seed=8), random(333, 700, seed=9)
    whole = native(hidden_ND, weight_VD)
    for n in range(1, 100):  # every number of rows
        assert torch.equal(native(hidden_ND[:n], weight_VD), whole[:n])
    for n in range(100):  # every place in a group, other neighbours
        assert torch.equal(native(hidden_ND[n:].flip(0), weight_VD), whole[n:].flip(0))
    noisy = hidden_ND.clone()
    noisy[::2] = math.nan
    assert torch.equal(native(noisy, weight_VD)[1::2], whole[1::2])


@needs_native
def test_a_token_depends_on_nothing_but_itself_to_the_last_bit() -> None:
    hidden_ND, weight_VD = random(20, 100, seed=10), random(200, 100, seed=11)
    whole = native(hidden_ND, weight_VD)
    for v in range(1, 200):
        assert torch.equal(native(hidden_ND, weight_VD[:v]), whole[:, :v])
        assert torch.equal(native(hidden_ND, weight_VD[v:]), whole[:, v:])


@needs_native
def test_native_does_not_depend_on_the_number_of_threads() -> None:
    hidden_ND, weight_VD = random(40, 256, seed=12), random(5001, 256, seed=13)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(hidden_ND, weight_VD))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_strided_inputs(target) -> None:
    hidden_ND, weight_VD = random(21, 40, seed=14), random(75, 40, seed=15)
    expected = skinny_linear(hidden_ND, weight_VD, backend=target.backend)
    strided = [
        (hidden_ND.repeat(1, 2)[:, :40], weight_VD),
        (hidden_ND.T.contiguous().T, weight_VD),
        (hidden_ND.repeat_interleave(3, dim=1)[:, ::3], weight_VD),
        (hidden_ND, torch.cat([weight_VD, torch.full_like(weight_VD, math.nan)], dim=1)[:, :40]),
        (hidden_ND, weight_VD.repeat_interleave(2, dim=0)[::2]),
        (F.pad(hidden_ND.flatten(), (1, 0))[1:].view(21, 40), F.pad(weight_VD.flatten(), (1, 0))[1:].view(75, 40)),
    ]
    for hidden, weight in strided:
        got = skinny_linear(hidden, weight, backend=target.backend)
        assert torch.equal(got, expected) if target.backend == "native" else torch.allclose(got, expected, atol=1e-5)
    rows = skinny_linear(hidden_ND[:1].expand(9, 40), weight_VD[:1].expand(70, 40), backend=target.backend)
    torch.testing.assert_close(rows, expected[:1, :1].expand(9, 70))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_spread_as_in_a_matmul(target, value: float) -> None:
    hidden_ND, weight_VD = random(5, 30, seed=16).abs(), random(70, 30, seed=17).abs()
    clean = skinny_linear(hidden_ND, weight_VD, backend=target.backend)
    hidden_ND[2, 7] = value
    weight_VD[40, 29] = value
    got = skinny_linear(hidden_ND, weight_VD, backend=target.backend)
    touched = torch.zeros(5, 70, dtype=torch.bool)
    touched[2], touched[:, 40] = True, True
    torch.testing.assert_close(got[~touched], clean[~touched])
    torch.testing.assert_close(got[touched], torch.full_like(got[touched], value), equal_nan=True)


@needs_native
def test_offsets_beyond_two_to_the_31(tmp_path) -> None:
    """Rows of weight 2^28 bytes apart, in a sparse file."""
    stride, rows = 1 << 26, 40
    weight_VD = torch.from_file(str(tmp_path / "weight"), shared=True, size=stride * rows).view(rows, stride)[:, :3]
    weight_VD.copy_(random(rows, 3, seed=27))
    hidden_ND = random(2, 3, seed=28)
    assert torch.equal(native(hidden_ND, weight_VD), native(hidden_ND, weight_VD.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_none_takes_every_dtype_and_any_number_of_rows(dtype: torch.dtype) -> None:
    weight_VD = random(90, 24, seed=18).to(dtype)
    for rows in (1, ROWS[0], ROWS[-1], ROWS[-1] + 1):
        hidden_ND = random(rows, 24, seed=19).to(dtype)
        got = skinny_linear(hidden_ND, weight_VD)
        assert got.dtype == dtype
        torch.testing.assert_close(got, F.linear(hidden_ND, weight_VD))


@needs_native
def test_none_picks_native_where_it_is_faster() -> None:
    hidden_ND, weight_VD = random(100, 512, seed=20), random(LEAST_WEIGHTS // 512, 512, seed=21)
    few_ND = hidden_ND[: ROWS[-1]]
    for rows in (ROWS[0], ROWS[-1]):
        assert torch.equal(skinny_linear(hidden_ND[:rows], weight_VD), native(hidden_ND[:rows], weight_VD))
    others = [(hidden_ND[:rows], weight_VD) for rows in (ROWS[0] - 1, ROWS[-1] + 1)]
    for hidden, weight in [*others, (few_ND, weight_VD[1:]), (few_ND, weight_VD.T.contiguous().T)]:
        assert torch.equal(skinny_linear(hidden, weight), F.linear(hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert skinny_linear(few_ND, weight_VD).dtype == F.linear(few_ND, weight_VD).dtype == torch.bfloat16


@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_dtypes_that_differ_are_cast_under_autocast_as_a_linear_layer_casts_them(wide: str) -> None:
    operands = {"hidden": random(3, 8, seed=24), "weight": random(10, 8, seed=25)}
    for name in operands.keys() - {wide}:
        operands[name] = operands[name].bfloat16()
    with pytest.raises(TypeError, match="weight must have dtype"):
        skinny_linear(**operands)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = skinny_linear(**operands), F.linear(*operands.values())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_a_gradient_comes_from_torch_or_is_refused() -> None:
    hidden_ND, weight_VD = random(3, 8, seed=22), random(10, 8, seed=23).requires_grad_()
    (gradient_VD,) = torch.autograd.grad(skinny_linear(hidden_ND, weight_VD).sum(), weight_VD)
    torch.testing.assert_close(gradient_VD, hidden_ND.sum(0).expand(10, 8))
    if backends.native_module() is None:
        return
    with pytest.raises(RuntimeError, match="'native' of skinny_linear has no gradient"):
        native(hidden_ND, weight_VD)
    with torch.no_grad():
        assert not native(hidden_ND, weight_VD).requires_grad


@needs_native
def test_registered_operator_passes_the_checks_of_torch() -> None:
    operator = torch.ops.diffpo_kernels.skinny_linear.default
    torch.library.opcheck(operator, (random(3, 20, seed=24), random(50, 20, seed=25)))
    torch.library.opcheck(operator, (random(20, 3, seed=24).T, random(50, 40, seed=25)[:, :20]))


@pytest.mark.parametrize("backend", [None, "reference", "native"])
def test_compiles_as_one_graph(backend: str | None) -> None:
    if backend == "native" and backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())

    def call(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return skinny_linear(hidden_ND * 2, weight_VD, backend=backend) + 1

    torch._dynamo.reset()
    compiled, weight_VD = torch.compile(call, fullgraph=True, backend="aot_eager"), random(50, 20, seed=26)
    for rows in (3, 4, 5):
        hidden_ND = random(rows, 20, seed=rows)
        torch.testing.assert_close(compiled(hidden_ND, weight_VD), call(hidden_ND, weight_VD))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": [[1.0]]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"hidden": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "hidden must have dtype .*got torch.int64"),
        ({"hidden": torch.ones(3)}, ValueError, r"hidden must have shape \[N, D\], got \[3\]"),
        ({"weight": torch.ones(5, 4)}, ValueError, r"weight must have shape \[V, 3\], got \[5, 4\]"),
        ({"weight": torch.ones(5, 3).double()}, TypeError, "weight must have dtype torch.float32, got torch.float64"),
        ({"weight": torch.ones(5, 3, device="meta")}, ValueError, "weight must be on cpu .*got meta"),
        ({"backend": "fastest"}, ValueError, "backend must be None or one of reference, native, triton, cuda"),
        ({"backend": "triton"}, RuntimeError, "not written for this operator; available: reference"),
    ],
)
def test_bad_input_is_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        skinny_linear(**({"hidden": torch.ones(2, 3), "weight": torch.ones(5, 3)} | arguments))


@needs_native
def test_what_native_does_not_take_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"hidden must have dtype torch\.float32 for backend 'native', got torch.bfloat16"
    ):
        native(torch.ones(2, 3).bfloat16(), torch.ones(5, 3).bfloat16())
    with pytest.raises(ValueError, match=r"weight must have contiguous columns .*got strides \[1, 5\]"):
        native(torch.ones(2, 3), torch.ones(3, 5).T)
