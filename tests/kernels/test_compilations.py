"""How many variants of each Triton kernel a run compiles: one, whatever the number of rows, prompts or windows, and wherever a slice begins.

Triton compiles a kernel anew where an integer argument becomes 1 or a multiple of 16, or a pointer a multiple of 16 bytes. The first call
of a variant takes a second or more, in the middle of a run. What a launch would be compiled for is read off its arguments, which takes no
GPU; nothing is launched.
"""

import os
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from diffpo_kernels import backends, entropy_bounded_commit_, linear_logprob, row_statistics, surrogate_loss

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in this process")

ROWS = (1, 2, 3, 4, 8, 15, 16, 17, 32, 48, 100)


@pytest.fixture
def variants(monkeypatch) -> dict[str, set]:
    """Kernel -> what it would be compiled for by the launches of this test, which run on CPU tensors and do nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend, seen = make_backend(GPUTarget("cuda", 90, 32)), defaultdict(set)

    def run(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, rest = bind(*arguments, **options)
        seen[kernel.fn.__name__].add((str(specialization), str(rest)))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(backends, "_triton_unavailable_reason", lambda device: None)
    backends._select.cache_clear()
    yield seen
    backends._select.cache_clear()


def assert_one_each(variants: dict[str, set], *kernels: str) -> None:
    assert {name: len(keys) for name, keys in variants.items()} == dict.fromkeys(kernels, 1), "\n".join(
        str(key) for keys in variants.values() if len(keys) > 1 for key in keys
    )


def shifted(shape: tuple[int, ...], by: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that begin ``by`` entries after an aligned address, as a slice of a larger tensor does."""
    size = torch.Size(shape).numel()
    return torch.zeros(size + by, dtype=dtype)[by:].view(shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("vocabulary", [5000, 50257])
def test_linear_logprob_in_one_chunk(variants, bias: bool, entropy: bool, vocabulary: int) -> None:
    head_VD = torch.zeros(vocabulary, 16, requires_grad=True)
    bias_V = torch.zeros(vocabulary, requires_grad=True) if bias else None
    for rows in ROWS:
        hidden_ND = torch.zeros(rows, 16, requires_grad=True)
        target_N = shifted((rows,), rows % 3, torch.int64)
        out = linear_logprob(
            hidden_ND,
            head_VD,
            target_N,
            shifted((rows,), 1) + 1,
            bias_V,
            [3],
            entropy,
            chunk_bytes=2**30,
            backend="triton",
        )
        out = out if entropy else (out,)
        torch.autograd.backward(out, [shifted((rows,), rows % 4) for _ in out])
    assert_one_each(variants, "part_of_row", "merge_parts", "gradient_in_place")


@pytest.mark.parametrize("train_head", [False, True])
def test_linear_logprob_in_several_chunks(variants, train_head: bool) -> None:
    """Of a number of rows that makes the second begin anywhere, and of at least as many columns as a program takes."""
    head_VD = torch.zeros(50304, 8, requires_grad=train_head)
    for rows in (5, 16, 31, 33):
        hidden_ND = torch.zeros(rows, 8, requires_grad=True)
        target_N = torch.zeros(rows, dtype=torch.int64)
        linear_logprob(hidden_ND, head_VD, target_N, chunk_bytes=4 * 50304 * 3, backend="triton").sum().backward()
    assert_one_each(variants, "part_of_row", "merge_parts", "gradient_in_place")


def test_linear_logprob_without_logits(variants) -> None:
    head_VD = torch.zeros(5000, 16)
    for rows in ROWS:
        target_N = shifted((rows,), rows % 2, torch.int64)
        linear_logprob(torch.zeros(rows, 16), head_VD, target_N, chunk_bytes=0, backend="triton")
    assert_one_each(variants, "part_of_rows_from_hidden", "merge_parts")


@pytest.mark.parametrize("length", [13, 64])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_surrogate_loss(variants, length: int, normalisation: str) -> None:
    for rows in ROWS:
        logprob, old, behaviour, reference = (shifted((rows, length), rows % 4) for _ in range(4))
        mask = shifted((rows, length), rows % 16, torch.bool)
        step_bin = shifted((rows, length), rows % 2, torch.int64)
        surrogate_loss(
            logprob.requires_grad_(), old, shifted((rows,), rows % 4), mask, behaviour, reference, kl_coefficient=0.1,
            normalisation=normalisation, step_bin=step_bin, bins=4, backend="triton",
        )  # fmt: skip
    assert_one_each(variants, "_row_kernel", "_final_kernel")


@pytest.mark.parametrize("bins", [1, 3, 16])
def test_surrogate_loss_settings(variants, bins: int) -> None:
    """A number given as an int, or of the value 1, makes no other kernel either."""
    for clip, cap, beta in ((0.2, 2.0, 0.1), (1, 1, 1), (0.0, 16.0, 16.0), (0.3, float("inf"), 0.2)):
        tensors = torch.zeros(3, 5), torch.zeros(3, 5), torch.zeros(3), torch.zeros(3, 5, dtype=torch.bool)
        reference, step_bin = torch.zeros(3, 5), torch.zeros(3, 5, dtype=torch.int64)
        surrogate_loss(*tensors, None, reference, clip, cap, beta, step_bin=step_bin, bins=bins, backend="triton")
    assert_one_each(variants, "_row_kernel", "_final_kernel")


def test_entropy_bounded_commit(variants) -> None:
    """Prompts of any width in front of the completion, completions of any length, rows of larger tensors."""
    for rows in ROWS:
        for width, length in ((0, 32), (5, 24), (64, 40), (7, 33)):
            tokens = torch.zeros(rows, width + length, dtype=torch.int64)[:, width:]
            proxy = torch.zeros(rows, length + rows)[:, rows:]
            nfe, start = torch.zeros(rows + 1, dtype=torch.int64)[1:], shifted((rows,), rows % 2, torch.int64)
            entropy_bounded_commit_(
                tokens, tokens.clone(), proxy, proxy.clone(), shifted((rows,), rows % 4), rows, start, start + rows % 8,
                proposal_logprob=proxy.clone(), logprob=shifted((rows, length), rows % 4), nfe=nfe,
                commit_step=shifted((rows, length), rows % 2, torch.int64), advance=True, max_window=8, backend="triton",
            )  # fmt: skip
    assert_one_each(variants, "entropy_bounded_commit_kernel")


@pytest.mark.parametrize("draw", [False, True])
def test_row_statistics(variants, draw: bool) -> None:
    logits = torch.zeros(max(ROWS), 5008)
    for rows in ROWS:
        uniform_N = shifted((rows,), rows % 4, torch.float64) if draw else None
        temperature = shifted((rows,), rows % 3) if draw else 0.0
        row_statistics(logits[:rows], temperature, uniform_N, list(range(rows)), backend="triton")
    assert_one_each(variants, "_summarise", "_finish")
