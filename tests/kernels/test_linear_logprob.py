"""linear_logprob: values and gradients against float64, with non-uniform upstream gradients (a gradient of ones hides a wrong dW)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from diffpo_kernels import backends, linear_logprob
from diffpo_kernels.linear_logprob import chunked, fused

if TYPE_CHECKING:
    from tests.kernels.conftest import Target

OPERATOR = "linear_logprob"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ONE_ROW = 1  # as chunk_bytes: the smallest chunk there is


class Problem:
    """Inputs, and the upstream gradients of logprob and entropy."""

    def __init__(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        rows: int = 5,
        width: int = 8,
        vocabulary: int = 37,
        bias: bool = True,
        train: str = "hidden head bias",
        **options: object,
    ) -> None:
        generator = torch.Generator().manual_seed(rows + vocabulary)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.tensors = {"hidden": draw(rows, width).to(dtype), "head": draw(vocabulary, width).to(dtype)}
        if bias:
            self.tensors["bias"] = draw(vocabulary).to(torch.float32)
        self.rows = torch.as_tensor(options.pop("rows_of", torch.arange(rows)))
        self.target = torch.randint(vocabulary, (len(self.rows),), generator=generator)
        self.upstream = draw(2, len(self.rows))
        self.train = [name for name in train.split() if name in self.tensors]
        self.device, self.options = device, {"temperature": 0.7, "banned_ids": [3], "return_entropy": True} | options

    def run(self, backend: str | None, precise: bool = False, **changes: object) -> dict[str, Tensor]:
        """Outputs and gradients on the CPU in float64; `precise`: computed in float64 from the same inputs."""
        options = self.options | changes
        tensors = {}
        for name, tensor in self.tensors.items():
            tensor = (tensor.double() if precise else tensor).to(self.device)
            tensors[name] = tensor.clone(memory_format=torch.preserve_format).requires_grad_(name in self.train)
        options = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        out = linear_logprob(
            **tensors, target=self.target.to(self.device), rows=self.rows.to(self.device), backend=backend, **options
        )
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [up.to(one) for up, one in zip(self.upstream, out, strict=False)])
        results = dict(zip(("logprob", "entropy"), out, strict=False))
        results |= {f"d_{name}": tensors[name].grad for name in self.train}
        return {name: tensor.detach().cpu().double() for name, tensor in results.items()}


def assert_accurate(got: dict, working: dict, exact: dict, slack: float = 1.0) -> None:
    """Each error at most `slack` times that of plain torch in the same dtype, plus 1e-5 (of the largest entry, where that is above 1)."""
    assert got.keys() == exact.keys()
    for name, truth in exact.items():
        finite = truth.isfinite()
        assert torch.equal(got[name][~finite], truth[~finite]), name
        if finite.any():
            scale = truth[finite].abs().max().clamp(min=1.0)
            error, allowed = ((one[name] - truth)[finite].abs().max() for one in (got, working))
            assert error <= slack * allowed + 1e-5 * scale, (name, error, allowed)


def check(problem: Problem, backend: str, **changes: object) -> dict:
    got = problem.run(backend, **changes)
    changes.pop("chunk_bytes", None)
    dtype = problem.tensors["hidden"].dtype
    # Sums of a few numbers rounded to 16 bits, in another order; and the interpreter truncates where it should round.
    slack = 1.0 if dtype == torch.float32 else 2.5 if INTERPRETED else 1.3
    assert_accurate(got, problem.run("reference", **changes), problem.run("reference", precise=True, **changes), slack)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_values(target: Target, dtype: torch.dtype, temperature: float) -> None:
    problem = Problem(target.device, dtype)
    out = problem.run(target.backend, temperature=temperature)
    logits_NV = (problem.tensors["hidden"] @ problem.tensors["head"].T).double() + problem.tensors["bias"].double()
    logits_NV[:, 3] = -torch.inf
    log_p_NV = (logits_NV / temperature).log_softmax(1)
    expected_N = log_p_NV.gather(1, problem.target[:, None])[:, 0]
    torch.testing.assert_close(out["logprob"], expected_N, rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(out["entropy"], torch.special.entr(log_p_NV.exp()).sum(1), rtol=3e-6, atol=1e-5)


def test_results_are_float32(target: Target) -> None:
    hidden_ND, head_VD = (
        torch.ones(2, 3, device=target.device).bfloat16(),
        torch.ones(4, 3, device=target.device).bfloat16(),
    )
    target_N = torch.tensor([0, 1], device=target.device)
    both = linear_logprob(hidden_ND, head_VD, target_N, return_entropy=True, backend=target.backend)
    assert [one.dtype for one in both] == [torch.float32] * 2


@pytest.mark.parametrize("banned", [None, [0, 7]])
def test_gradients_of_the_reference(banned: list[int] | None) -> None:
    problem = Problem(dtype=torch.float64)
    tensors = [tensor.double().requires_grad_() for tensor in problem.tensors.values()]
    temperature_N = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7], dtype=torch.float64)
    target_N = torch.tensor([1, 1, 2, 10, 6])

    def both(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, ...]:
        out = linear_logprob(hidden_ND, head_VD, target_N, temperature_N, bias_V, banned, True)
        return tuple(one * up for one, up in zip(out, problem.upstream, strict=True))

    assert torch.autograd.gradcheck(both, tensors)


def test_gradient_of_the_head_by_hand() -> None:
    problem = Problem(dtype=torch.float64, banned_ids=None, return_entropy=False, temperature=0.5)
    hidden_ND, head_VD, bias_V = (tensor.double() for tensor in problem.tensors.values())
    p_NV = ((hidden_ND @ head_VD.T + bias_V) / 0.5).softmax(1)
    d_logits_NV = (torch.nn.functional.one_hot(problem.target, 37) - p_NV) * problem.upstream[0][:, None] / 0.5
    out = problem.run(None)
    torch.testing.assert_close(out["d_head"], d_logits_NV.T @ hidden_ND)
    torch.testing.assert_close(out["d_bias"], d_logits_NV.sum(0), rtol=1e-5, atol=1e-6)  # the bias is float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("train", ["hidden head bias", "hidden head", "hidden", "head", "bias"])
def test_matches_float64(target: Target, dtype: torch.dtype, entropy: bool, train: str) -> None:
    problem = Problem(target.device, dtype, train=train, return_entropy=entropy)
    check(problem, target.backend)


# V: one token; around a vector; ragged; around one tile of the C++ passes and one block of the kernels.
@pytest.mark.parametrize("vocabulary", [1, 2, 16, 17, 127, 2049, 4096, 4097])
def test_every_vocabulary(target: Target, vocabulary: int) -> None:
    problem = Problem(target.device, rows=3, vocabulary=vocabulary, banned_ids=[1] if vocabulary > 3 else None)
    check(problem, target.backend)


@pytest.mark.parametrize("train", ["hidden head bias", "hidden"])
@pytest.mark.parametrize("chunk_bytes", [ONE_ROW, 2 * 300 * 4, 4 * 300 * 4])
@pytest.mark.parametrize("entropy", [False, True])
def test_several_chunks_give_what_one_does(target: Target, train: str, chunk_bytes: int, entropy: bool) -> None:
    vocabulary = 12 if chunk_bytes == ONE_ROW else 300  # one row per chunk forward is one column per chunk backward
    problem = Problem(target.device, vocabulary=vocabulary, train=train, return_entropy=entropy, banned_ids=[2, 11])
    one, several = problem.run(target.backend), problem.run(target.backend, chunk_bytes=chunk_bytes)
    for name, expected in one.items():
        torch.testing.assert_close(several[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_chunks_in_16_bits(target: Target, dtype: torch.dtype) -> None:
    problem = Problem(target.device, dtype, vocabulary=300)
    check(problem, target.backend, chunk_bytes=2 * 300 * 2)


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_a_nearly_certain_token_beside_many(target: Target, temperature: float) -> None:
    """A running sum of equal small terms drifts."""
    problem = Problem(
        target.device, rows=1, width=1, vocabulary=4096, bias=False, temperature=temperature, banned_ids=None
    )
    problem.tensors = {"hidden": torch.ones(1, 1), "head": torch.zeros(4096, 1).index_fill(0, torch.tensor(0), 13.5)}
    problem.target[0] = 0
    check(problem, target.backend)


def test_no_probability_above_one_where_the_logits_are_formed_again(target: Target) -> None:
    """The product of another shape may round a logit above the max of forward, and a low temperature makes much of it."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND, head_VD = (torch.randn(n, 512, generator=generator).to(target.device) for n in (16, 1000))
    top_N = (hidden_ND @ head_VD.T).argmax(1)
    for chunk_bytes in (None, 16 * 128 * 4):
        bias_V = torch.zeros(1000, device=target.device, requires_grad=True)
        options = {"chunk_bytes": chunk_bytes, "backend": target.backend}
        linear_logprob(hidden_ND, head_VD, (top_N + 1) % 1000, 1e-4, bias_V, **options).sum().backward()
        assert (bias_V.grad * 1e-4 >= -top_N.bincount(minlength=1000) - 1e-5).all()


def test_no_gradient_for_the_temperature(target: Target) -> None:
    problem = Problem(target.device, train="", temperature=torch.ones(5, device=target.device, requires_grad=True))
    tensors = {k: v.to(target.device) for k, v in problem.tensors.items()}
    both = linear_logprob(**tensors, target=problem.target.to(target.device), backend=target.backend, **problem.options)
    assert not any(one.requires_grad for one in both)


def test_hooks_see_what_forward_keeps_for_hidden(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("autograd keeps what it likes")
    problem = Problem(target.device, return_entropy=False)
    hidden_MD, head_VD, bias_V = (tensor.to(target.device) for tensor in problem.tensors.values())
    rows_N = torch.tensor([0, 2, 4], device=target.device)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: shapes.append(one.shape) or one, lambda one: one):
        linear_logprob(hidden_MD.requires_grad_(), head_VD, rows_N, 1.0, bias_V, rows=rows_N, backend=target.backend)
    assert (3, 8) in shapes


def test_rows_of_no_source_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the index is not looked at."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    torch.zeros(4, 3)  # leaves its memory to the next of its size
    sources = torch.ones(2, 3), torch.ones(1, 3)
    gathered_RD = chunked.gather(sources, torch.tensor([0, 3, 2, -1]))
    assert gathered_RD.isnan().all(1).tolist() == [False, True, False, True]


def test_temperature_per_row(target: Target) -> None:
    check(Problem(target.device, temperature=torch.tensor([0.5, 1.0, 2.0, 1e-3, 30.0])), target.backend)


def test_no_bias_nothing_banned(target: Target) -> None:
    check(Problem(target.device, bias=False, banned_ids=None), target.backend)


@pytest.mark.parametrize("train", ["hidden head bias", "hidden"])
def test_backward_twice(target: Target, train: str) -> None:
    problem = Problem(target.device, train=train, return_entropy=False)
    tensors = {k: v.to(problem.device).requires_grad_(k in problem.train) for k, v in problem.tensors.items()}
    trained = [tensors[name] for name in problem.train]
    logprob_N = linear_logprob(**tensors, target=problem.target.to(problem.device), backend=target.backend)
    upstream_N = problem.upstream[0].to(logprob_N)
    first = torch.autograd.grad(logprob_N, trained, upstream_N, retain_graph=True)
    second = torch.autograd.grad(logprob_N, trained, upstream_N)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


def test_a_second_derivative_is_refused(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("plain torch has second derivatives")
    hidden_ND = torch.ones(2, 3, device=target.device, requires_grad=True)
    head_VD, target_N = torch.ones(4, 3, device=target.device), torch.tensor([0, 1], device=target.device)
    logprob_N = linear_logprob(hidden_ND, head_VD, target_N, backend=target.backend)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        torch.autograd.grad(logprob_N.sum(), hidden_ND, create_graph=True)


# Both results unused in turn: autograd then passes no gradient for the other.
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_result_is_used(target: Target, used: int) -> None:
    problem = Problem(target.device)
    problem.upstream[1 - used] = 0
    expected = problem.run("reference")
    tensors = {k: v.to(target.device).requires_grad_() for k, v in problem.tensors.items()}
    out = linear_logprob(**tensors, target=problem.target.to(target.device), backend=target.backend, **problem.options)[
        used
    ]
    out.backward(problem.upstream[used].to(out))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad.cpu().double(), expected[f"d_{name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", ["hidden head bias", "hidden"])
@pytest.mark.parametrize("chunk_bytes", [None, 20 * 6 * 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_rows(target: Target, train: str, chunk_bytes: int | None, dtype: torch.dtype) -> None:
    rows = torch.tensor([4, 0, 0, 2, 0, 4])
    problem = Problem(target.device, dtype, rows_of=rows, train=train, return_entropy=train != "hidden")
    got = check(problem, target.backend, chunk_bytes=chunk_bytes)
    assert (got["d_hidden"][[1, 3]] == 0).all()


@pytest.mark.parametrize("sizes", [(3, 2), (0, 4, 0, 1)])
@pytest.mark.parametrize("chunk_bytes", [None, ONE_ROW])
def test_two_sources_of_rows(target: Target, sizes: tuple[int, ...], chunk_bytes: int | None) -> None:
    rows = torch.tensor([4, 0, 3, 0, 1, 2])
    problem = Problem(target.device, rows_of=rows)
    expected = problem.run("reference")
    tensors = {k: v.to(target.device) for k, v in problem.tensors.items()}
    sources = [part.clone().requires_grad_() for part in tensors.pop("hidden").split(sizes)]
    both = linear_logprob(
        sources,
        **tensors,
        target=problem.target.to(target.device),
        rows=rows.to(target.device),
        chunk_bytes=chunk_bytes,
        backend=target.backend,
        **problem.options,
    )
    torch.autograd.backward(both, [up.to(one) for up, one in zip(problem.upstream, both, strict=True)])
    torch.testing.assert_close(both[0].cpu().double(), expected["logprob"], rtol=1e-5, atol=1e-5)
    gradient_MD = torch.cat([source.grad for source in sources]).cpu().double()
    torch.testing.assert_close(gradient_MD, expected["d_hidden"], rtol=1e-5, atol=1e-6)


def test_strided_inputs(target: Target) -> None:
    problem = Problem(target.device)
    expected = problem.run(target.backend)
    wide = {name: torch.stack([tensor] * 2, dim=-1)[..., 0] for name, tensor in problem.tensors.items()}
    transposed = {name: tensor.T.contiguous().T for name, tensor in problem.tensors.items() if name != "bias"}
    for changed in (wide, problem.tensors | transposed):
        strided = Problem(target.device)
        strided.tensors = changed
        for name, got in strided.run(target.backend).items():
            torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("poison", [0.0, torch.nan, torch.inf])
def test_banned_targets_are_impossible_and_banned_columns_get_no_gradient(target: Target, poison: float) -> None:
    problem = Problem(target.device)
    problem.target[1] = 3
    problem.tensors["bias"][3] = poison  # not seen
    got = check(problem, target.backend)
    assert got["logprob"][1] == -math.inf
    assert (got["d_head"][3] == 0).all()
    assert got["d_bias"][3] == 0


def test_a_bias_of_minus_infinity_is_probability_zero(target: Target) -> None:
    problem = Problem(target.device)
    problem.tensors["bias"][[0, 5, 6]] = -torch.inf
    problem.target[:2] = torch.tensor([5, 7])
    got = check(problem, target.backend)
    assert got["logprob"][0] == -math.inf
    assert got["entropy"].isfinite().all()


@pytest.mark.parametrize("offset", [-1e4, 1e4, -3e38])
def test_only_differences_of_logits_matter(target: Target, offset: float) -> None:
    problem = Problem(target.device, temperature=1.0)
    problem.tensors["head"].zero_()
    problem.tensors["bias"].fill_(offset)
    got = check(problem, target.backend)
    assert got["entropy"].tolist() == pytest.approx([math.log(36)] * 5, abs=1e-5)


def test_a_row_without_a_possible_token_is_nan(target: Target) -> None:
    problem = Problem(target.device)
    problem.tensors["bias"].fill_(-torch.inf)
    got = problem.run(target.backend)
    assert got["logprob"].isnan().all()
    assert got["entropy"].isnan().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("train", ["hidden head bias", "hidden"])
def test_a_bad_row_is_flagged_and_leaves_the_others_alone(target: Target, poison: float, train: str) -> None:
    problem = Problem(target.device, train=train, return_entropy=train != "hidden")
    clean = problem.run(target.backend)
    problem.tensors["hidden"][1, 2] = poison
    got = problem.run(target.backend)
    others = [0, 2, 3, 4]
    for name in ("logprob", "entropy", "d_hidden"):
        if name in got:
            assert got[name][1].isnan().all(), name
            assert torch.equal(got[name][others], clean[name][others]), name


def test_a_certain_token_has_a_finite_gradient(target: Target) -> None:
    hidden_ND = torch.tensor([[1000.0]], device=target.device, requires_grad=True)
    head_VD = torch.tensor([[1.0], [-1.0]], device=target.device, requires_grad=True)
    target_N = torch.tensor([0], device=target.device)
    both = linear_logprob(hidden_ND, head_VD, target_N, return_entropy=True, backend=target.backend)
    sum(both).sum().backward()
    assert both[0].item() == both[1].item() == 0
    assert (hidden_ND.grad == 0).all()
    assert (head_VD.grad == 0).all()


@pytest.mark.parametrize("gap", [5.0, 9.0, 14.0])
def test_the_gradient_of_a_nearly_certain_target(target: Target, gap: float) -> None:
    """1 - p in bfloat16 would be 0 from a gap of 6 on."""
    hidden_ND = torch.tensor([[1.0, 0.0]], device=target.device, dtype=torch.bfloat16, requires_grad=True)
    head_VD = torch.tensor([[gap, 1.0], [0.0, 0.0]], device=target.device, dtype=torch.bfloat16, requires_grad=True)
    target_N = torch.tensor([0], device=target.device)
    linear_logprob(hidden_ND, head_VD, target_N, backend=target.backend).backward()
    missing = 1 / (1 + math.exp(gap))
    assert hidden_ND.grad[0, 1].item() == pytest.approx(missing, rel=0.03 if gap > 10 else 0.012)
    assert head_VD.grad[:, 0].tolist() == pytest.approx([missing, -missing], rel=0.03 if gap > 10 else 0.012)


@pytest.mark.parametrize("train", ["hidden head bias", "hidden"])
def test_float16_with_tiny_upstream_gradients(target: Target, train: str) -> None:
    """Gradients of logits below 6e-8 are lost in float16, as in plain torch; what survives is right."""
    problem = Problem(target.device, torch.float16, train=train, return_entropy=False)
    problem.upstream *= 1e-4
    got, working, exact = (
        problem.run("reference", precise=p) if p is not None else problem.run(target.backend)
        for p in (None, False, True)
    )
    for name, truth in exact.items():
        allowed = (working[name] - truth).abs().max() + 2e-7
        assert (got[name] - truth).abs().max() <= 2 * allowed, name


def test_no_rows(target: Target) -> None:
    for train in ("hidden head bias", "hidden"):
        out = Problem(target.device, rows=0, train=train, return_entropy=train != "hidden").run(target.backend)
        assert out["logprob"].shape == (0,)
        assert all((out[name] == 0).all() for name in out if name.startswith("d_"))


@pytest.mark.parametrize("train", ["hidden head bias", "hidden"])
def test_two_runs_are_bitwise_equal(target: Target, train: str) -> None:
    rows = torch.tensor([0, 1, 1, 4, 1, 0])
    problem = Problem(target.device, rows_of=rows, vocabulary=300, train=train, return_entropy=train != "hidden")
    first, second = (problem.run(target.backend, chunk_bytes=2000) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    width=st.integers(1, 9),
    vocabulary=st.integers(2, 200),
    chunk_bytes=st.integers(1, 4000),
    train=st.sampled_from(["hidden head bias", "hidden", "head"]),
    entropy=st.booleans(),
)
def test_any_shape_in_any_chunks(
    rows: int, width: int, vocabulary: int, chunk_bytes: int, train: str, entropy: bool
) -> None:
    options = {"return_entropy": entropy, "banned_ids": [1]}
    problem = Problem("cpu", torch.float32, rows, width, vocabulary, train=train, **options)
    check(problem, None, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(3, 8, 37), (70, 70, 1100), (2, 5, 2)])
def test_without_any_logits(
    target: Target, dtype: torch.dtype, rows: int, width: int, vocabulary: int, bias: bool
) -> None:
    if target.backend != "triton":
        pytest.skip("the other backends form logits")
    banned = [3] if vocabulary > 3 else None
    problem = Problem(target.device, dtype, rows, width, vocabulary, bias, train="", banned_ids=banned)
    problem.rows = problem.rows.flip(0)

    def values(precise: bool, **options: object) -> dict[str, Tensor]:
        tensors = {k: (v.double() if precise else v).to(target.device) for k, v in problem.tensors.items()}
        options |= {"target": problem.target.to(target.device), "rows": problem.rows.to(target.device)}
        both = linear_logprob(**tensors, **options, **problem.options)
        return {name: one.cpu().double() for name, one in zip(("logprob", "entropy"), both, strict=True)}

    assert_accurate(
        values(False, backend="triton", chunk_bytes=0), values(False, backend="reference"), values(True), slack=1.3
    )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_without_any_logits_banned_columns_are_not_seen(target: Target, poison: float) -> None:
    if target.backend != "triton":
        pytest.skip("the other backends form logits")
    problem = Problem(target.device, train="")
    tensors = {name: tensor.to(target.device) for name, tensor in problem.tensors.items()}
    options = {"target": problem.target.to(target.device), "chunk_bytes": 0, "backend": "triton", **problem.options}
    expected = linear_logprob(**tensors, **options)
    tensors["head"][3] = poison
    for got_N, expected_N in zip(linear_logprob(**tensors, **options), expected, strict=True):
        assert torch.equal(got_N, expected_N)


def beyond_32_bits(path: Path, dtype: type, elements: int) -> tuple[np.memmap, Tensor]:
    """A file with holes, and a tensor of its first entry alone: the interpreter copies what it is given, but reads by address."""
    memory = np.memmap(path, dtype, "w+", shape=(elements,))
    return memory, torch.from_numpy(memory[:1])


@pytest.mark.skipif(not INTERPRETED, reason="calls interpreted kernels; tests/gpu has real ones")
class TestOffsetsBeyond32BitsTriton:
    """Each factor of an offset fits into 32 bits; the kernels see the first columns of a few very long rows."""

    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))  # [R, C]
    stride = 2**30  # of a row; the third begins at 2^31

    def logits(self, path: Path) -> tuple[np.memmap, Tensor]:
        memory, first = beyond_32_bits(path / "logits", np.float32, 2 * self.stride + 128)
        for row in range(3):
            memory[row * self.stride :][:128] = self.x[row].numpy()
        return memory, first

    def test_statistics(self, tmp_path: Path) -> None:
        from diffpo_kernels.linear_logprob import triton_kernels as kernels

        _memory, first = self.logits(tmp_path)  # held, or the file is unmapped
        ones, partials, at_target = torch.ones(3), torch.zeros(3, 3, 1), torch.zeros(3)
        target_N = torch.tensor([5, 6, 7])
        kernels.part_of_row[(3,)](
            first, first, ones, target_N, partials, at_target, self.stride, 1, HAS_BIAS=False, BLOCK=128
        )
        assert torch.equal(partials[:, 0, 0], self.x.amax(1))
        assert torch.equal(at_target, self.x.gather(1, target_N[:, None])[:, 0])

    def test_gradient(self, tmp_path: Path) -> None:
        from diffpo_kernels.linear_logprob import triton_kernels as kernels

        memory, first = self.logits(tmp_path)
        ones, zeros, target_N = torch.ones(3), torch.zeros(3), torch.tensor([200, 200, 200])
        top_N = self.x.amax(1)
        rows = ones, target_N, zeros, zeros, top_N, zeros, ones, zeros, ones
        options = {"HAS_BIAS": False, "HAS_ENTROPY": False, "SUM_ROWS": False, "ROWS": 3, "BLOCK": 128}
        kernels.gradient_in_place[(1,)](first, first, *rows, 3, self.stride, 0, **options)
        for row in range(3):
            got_C = torch.from_numpy(memory[row * self.stride :][:128].copy())
            torch.testing.assert_close(got_C, -(self.x[row] - top_N[row]).exp())

    @pytest.mark.parametrize("long", ["hidden", "head"])
    def test_from_hidden(self, tmp_path: Path, long: str) -> None:
        from diffpo_kernels.linear_logprob import triton_kernels as kernels

        short_48D, stride = torch.randn(48, 16, generator=torch.Generator().manual_seed(1)), 2**26
        memory, first = beyond_32_bits(tmp_path / "rows", np.float32, 47 * stride + 16)
        long_48D = torch.randn(48, 16, generator=torch.Generator().manual_seed(2))
        for row in range(48):
            memory[row * stride :][:16] = long_48D[row].numpy()
        inputs = (first, short_48D) if long == "hidden" else (short_48D, first)
        strides = (stride, 16) if long == "hidden" else (16, stride)
        partials, at_target = torch.zeros(48, 3, 3), torch.zeros(48)
        rows = torch.ones(48), torch.arange(48), partials, at_target
        options = {"D": 16, "HAS_BIAS": False, "EMULATED": True, "BLOCKS": 1}
        options |= dict.fromkeys(("BLOCK_N", "BLOCK_C", "BLOCK_D"), 16)
        kernels.part_of_rows_from_hidden[(9,)](*inputs, first, *rows, 48, 48, 3, *strides, **options)
        logits_NC = long_48D @ short_48D.T if long == "hidden" else short_48D @ long_48D.T
        torch.testing.assert_close(at_target, logits_NC.diagonal())
        torch.testing.assert_close(partials[:, 0], logits_NC.view(48, 3, 16).amax(2))

    def test_merge(self, tmp_path: Path) -> None:
        from diffpo_kernels.linear_logprob import triton_kernels as kernels

        parts = 2**29
        memory, first = beyond_32_bits(tmp_path / "partials", np.float32, 9 * parts)
        for row in range(3):
            memory[3 * row * parts] = 1.0 + row  # max
            memory[(3 * row + 1) * parts] = 2.0  # sum
        outputs = [torch.zeros(3) for _ in range(4)]
        kernels.merge_parts[(3,)](first, torch.zeros(3), torch.ones(3), *outputs, parts, PARTS=4)
        assert outputs[2].tolist() == [1.0, 2.0, 3.0]


def test_products_keep_their_dtype_under_autocast(target: Target) -> None:
    problem = Problem(target.device)
    expected = problem.run(target.backend)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        got = problem.run(target.backend)
    names = ["logprob", "entropy"] if target.backend == "reference" else got  # torch's own backward may be cast
    assert all(torch.equal(got[name], expected[name]) for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", ["head", "hidden"])
@pytest.mark.parametrize("train", ["hidden head", "hidden"])
def test_dtypes_that_differ_are_cast_under_autocast_as_a_linear_layer_casts_them(
    target: Target, dtype: torch.dtype, wide: str, train: str
) -> None:
    problem = Problem(target.device, dtype, bias=False, train=train)
    expected = problem.run(target.backend)
    problem.tensors[wide] = problem.tensors[wide].float()
    with pytest.raises(TypeError, match="head must have dtype"):
        problem.run(target.backend)
    with torch.autocast(target.device, dtype=dtype):
        got = problem.run(target.backend)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # torch's own backward is not run in autocast by everyone, and may be cast there
        tolerance = 0.02 if target.backend == "reference" and name.startswith("d_") else 0.0
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_head_cast_under_autocast_has_the_heads_dtype(target: Target) -> None:
    hidden_ND = torch.randn(4, 8, device=target.device).bfloat16().requires_grad_()
    head_VD = torch.randn(9, 8, device=target.device, requires_grad=True)
    rows_N, target_N = torch.tensor([3, 0, 1], device=target.device), torch.arange(3, device=target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        out_N = linear_logprob([hidden_ND[:1], hidden_ND[1:]], head_VD, target_N, rows=rows_N, backend=target.backend)
    assert out_N.dtype == torch.float32
    out_N.sum().backward()
    assert (hidden_ND.grad.dtype, head_VD.grad.dtype) == (torch.bfloat16, torch.float32)
    logits_NV = (hidden_ND.detach()[rows_N].float() @ head_VD.detach().T).log_softmax(1)
    torch.testing.assert_close(out_N.detach(), logits_NV.gather(1, target_N[:, None])[:, 0], rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_alone(target: Target) -> None:
    head_VD = torch.randn(9, 8, device=target.device, dtype=torch.float64)
    hidden_ND, target_N = torch.randn(3, 8, device=target.device), torch.arange(3, device=target.device)
    with torch.autocast(target.device, dtype=torch.bfloat16), pytest.raises(TypeError, match="head must have dtype"):
        linear_logprob(hidden_ND, head_VD, target_N, backend=target.backend)


def test_compiles_under_autocast(target: Target) -> None:
    hidden_ND, target_N = torch.randn(3, 8, device=target.device).bfloat16(), torch.arange(3, device=target.device)
    head_VD = torch.randn(9, 8, device=target.device)

    def call() -> Tensor:
        with torch.autocast(target.device, dtype=torch.bfloat16):
            return linear_logprob(hidden_ND, head_VD, target_N, backend=target.backend)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())


@pytest.mark.parametrize("chunk_bytes", [None, 400])
@pytest.mark.parametrize("train", ["hidden head bias", "hidden"])
def test_compiles_as_one_graph(target: Target, chunk_bytes: int | None, train: str) -> None:
    problem = Problem(target.device, train=train)
    tensors = {name: tensor.to(target.device) for name, tensor in problem.tensors.items()}
    sources = tensors.pop("hidden").split([2, 3])
    target_N, upstream_N = problem.target.to(target.device), problem.upstream[0].float().to(target.device)
    rows_N = torch.tensor([4, 0, 1, 1, 3], device=target.device)

    def call(first_MD: Tensor, second_MD: Tensor, head_VD: Tensor, bias_V: Tensor) -> Tensor:
        options = {"rows": rows_N, "chunk_bytes": chunk_bytes, "backend": target.backend}
        out = linear_logprob([first_MD * 2, second_MD], head_VD, target_N, 0.7, bias_V, [3], **options)
        return (out * upstream_N).sum()

    def gradients(function) -> list[Tensor | None]:
        inputs = [tensor.clone() for tensor in (*sources, *tensors.values())]
        wanted = inputs[:2] if train == "hidden" else inputs
        for tensor in wanted:
            tensor.requires_grad_()
        return [function(*inputs).detach(), *torch.autograd.grad(function(*inputs), wanted)]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled), gradients(call), strict=True):
        torch.testing.assert_close(got, expected)


def test_compiles_once_for_every_number_of_rows(target: Target) -> None:
    problem = Problem(target.device, rows=15)
    hidden_ND, head_VD, bias_V = (tensor.to(target.device) for tensor in problem.tensors.values())
    hidden_ND.requires_grad_()
    all_N = problem.target.to(target.device)
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def call(hidden_ND: Tensor, target_N: Tensor) -> Tensor:
        return linear_logprob(hidden_ND, head_VD, target_N, 0.7, bias_V, [3], backend=target.backend)

    for rows in range(4, 16):
        expected_N = linear_logprob(hidden_ND[:rows], head_VD, all_N[:rows], 0.7, bias_V, [3], backend=target.backend)
        torch.testing.assert_close(call(hidden_ND[:rows], all_N[:rows]), expected_N)
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("keep", ["logits", "hidden_gradient", "nothing"])
def test_registered_operators_pass_the_checks_of_torch(target: Target, keep: str) -> None:
    if target.backend == "reference":
        pytest.skip("plain torch")
    operators = torch.ops.diffpo_kernels
    problem = Problem(dtype=torch.float32 if INTERPRETED else torch.bfloat16)
    hidden, head, bias = (tensor.to(target.device) for tensor in problem.tensors.values())
    target_N = problem.target.to(target.device)
    rows, one = torch.tensor([0, 2, 2, 1, 4], device=target.device), torch.ones(5, device=target.device)
    forward = ([hidden[:3], hidden[3:]], head, target_N, one, bias, [3], rows, 200, keep, target.backend)
    torch.library.opcheck(operators.linear_logprob_forward.default, forward)
    *values, kept = operators.linear_logprob_forward(*forward)
    kept = None if keep == "nothing" else kept
    needs = [True, keep != "hidden_gradient", keep != "hidden_gradient"]
    row_values = [target_N, one, *values]
    backward = (one, one, kept, row_values, forward[0], head, bias, [3], rows, needs, 200, keep, target.backend)
    torch.library.opcheck(operators.linear_logprob_backward.default, backward)


PEAK_MEMORY = """
import re, torch
from diffpo_kernels import linear_logprob

def resident(which):  # MiB; ru_maxrss would begin with what pytest used
    return int(re.search(which + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

torch.set_num_threads(1)
N, D, V = 512, 32, 126464
warm = torch.zeros(9, D, requires_grad=True)
linear_logprob(warm, warm, torch.zeros(9, dtype=torch.int64), banned_ids=[5], backend="native").sum().backward()
hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D).requires_grad_(TRAIN_HEAD)
gradients = (hidden.numel() + TRAIN_HEAD * head.numel()) * 4 / 2**20
before = resident("VmRSS")
linear_logprob(hidden, head, torch.zeros(N, dtype=torch.int64), banned_ids=[5], backend="native").sum().backward()
print(resident("VmHWM") - before - gradients)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("train_head", [True, False])
def test_peak_memory_is_a_chunk(train_head: bool) -> None:
    if backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())
    code = PEAK_MEMORY.replace("TRAIN_HEAD", str(train_head))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64, f"{done.stdout} MiB; the logits are 247 MiB, a chunk of them 32"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, r"hidden must have shape \[N, D\]"),
        ({"hidden": None}, TypeError, "hidden must be a torch.Tensor, got NoneType"),
        ({"hidden": []}, ValueError, "hidden must be a tensor or a sequence of at least one"),
        ({"hidden": [torch.zeros(2, 3), 1]}, TypeError, r"hidden\[1\] must be a torch.Tensor, got int"),
        ({"hidden": [torch.zeros(2, 3), torch.zeros(2, 4)]}, ValueError, r"hidden\[1\] must have shape \[N, 3\]"),
        ({"hidden": [torch.zeros(1, 3)] * 2}, ValueError, "rows must be a tensor .* several, here 2, got None"),
        ({"rows": torch.tensor([0, 2])}, ValueError, r"rows must lie in \[0, 2\), got values from 0 to 2"),
        ({"rows": torch.tensor([0.0, 1.0])}, TypeError, "rows must have dtype torch.int64"),
        ({"rows": torch.tensor([0])}, ValueError, r"target must have shape \[1\], got \[2\]"),
        ({"head": torch.zeros(5, 4)}, ValueError, r"head must have shape \[V, 3\], got \[5, 4\]"),
        ({"head": torch.zeros(5, 3, dtype=torch.bfloat16)}, TypeError, "head must have dtype torch.float32"),
        ({"head": torch.zeros(0, 3)}, ValueError, "head must have V >= 1"),
        ({"target": torch.tensor([0, 5])}, ValueError, r"target must lie in \[0, 5\), got values from 0 to 5"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, "target must have dtype torch.int64"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature must be .* in every row, got 0.0"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[5\]"),
        ({"banned_ids": [5]}, ValueError, r"banned_ids must lie in \[0, 5\)"),
        ({"chunk_bytes": -1}, ValueError, "chunk_bytes must be None or at least 0, got -1"),
        ({"chunk_bytes": 1.5}, TypeError, "chunk_bytes must be an int, got float"),
        ({"chunk_bytes": 0, "backend": "reference"}, ValueError, "chunk_bytes must be above 0 for backend 'reference'"),
        ({"backend": "cuda"}, RuntimeError, "not written for this operator; available: .*reference"),
        ({"backend": "quick"}, ValueError, "backend must be None or one of"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    good = {"hidden": torch.zeros(2, 3), "head": torch.zeros(5, 3), "target": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        linear_logprob(**(good | changed))


def test_float64_runs_in_the_reference_alone(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("allowed there")
    double = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"hidden must have dtype .* for backend .*, got torch.float64"):
        linear_logprob(double, double, torch.tensor([0, 1]), backend=target.backend)


def test_no_logits_means_no_gradient(target: Target) -> None:
    hidden_ND = torch.zeros(2, 3, device=target.device, requires_grad=True)
    arguments = hidden_ND, torch.zeros(5, 3, device=target.device), torch.tensor([0, 1], device=target.device)
    message = "where a gradient is wanted" if target.backend == "triton" else "only 'triton' can do without logits"
    with pytest.raises(ValueError, match=message):
        linear_logprob(*arguments, chunk_bytes=0, backend=target.backend)


def test_the_default_chunk_holds_the_rows_that_the_benchmarks_ask_for() -> None:
    from diffpo_kernels.linear_logprob import _CHUNK_BYTES

    assert _CHUNK_BYTES["cuda"] >= 4096 * 152064 * 2
    assert _CHUNK_BYTES["cpu"] >= 64 * 126464 * 4
    assert fused.wants_gradient(torch.zeros(1), None) is False
