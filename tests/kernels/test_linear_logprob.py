"""linear_logprob: values against float64, gradients with non-uniform upstream gradients (a gradient of ones hides a wrong dW)."""

import math

import pytest
import torch
from torch import Tensor

from diffpo_kernels import linear_logprob


def inputs(
    rows: int = 5, width: int = 4, vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden_ND, head_VD, bias_V = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    return hidden_ND, head_VD, bias_V, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_values(dtype: torch.dtype, temperature: float) -> None:
    hidden_ND, head_VD, bias_V, target_N = inputs(dtype=dtype)
    logprob_N, entropy_N = linear_logprob(hidden_ND, head_VD, target_N, temperature, bias_V, [3], return_entropy=True)
    logits_NV = (hidden_ND @ head_VD.T).double() + bias_V.double()
    logits_NV[:, 3] = -torch.inf
    log_p_NV = (logits_NV / temperature).log_softmax(1)
    expected_N = log_p_NV.gather(1, target_N[:, None])[:, 0]
    expected_entropy_N = torch.special.entr(log_p_NV.exp()).sum(1)
    assert logprob_N.dtype == entropy_N.dtype == torch.float32
    torch.testing.assert_close(logprob_N.double(), expected_N, rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(entropy_N.double(), expected_entropy_N, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("banned", [None, [0, 7]])
def test_gradients(banned: list[int] | None) -> None:
    hidden_ND, head_VD, bias_V, _ = inputs()
    target_N = torch.tensor([1, 1, 2, 10, 6])
    temperature_N = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7], dtype=torch.float64)
    upstream_N = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)

    def both(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
        logprob_N, entropy_N = linear_logprob(hidden_ND, head_VD, target_N, temperature_N, bias_V, banned, True)
        return logprob_N * upstream_N, entropy_N * upstream_N.flip(0)

    assert torch.autograd.gradcheck(both, (hidden_ND, head_VD, bias_V))


def test_gradient_of_the_head_by_hand() -> None:
    hidden_ND, head_VD, bias_V, target_N = inputs()
    upstream_N = torch.randn(5, dtype=torch.float64)
    linear_logprob(hidden_ND, head_VD, target_N, 0.5, bias_V).backward(upstream_N)
    p_NV = ((hidden_ND @ head_VD.T + bias_V) / 0.5).softmax(1)
    d_logits_NV = (torch.nn.functional.one_hot(target_N, 11) - p_NV) * upstream_N[:, None] / 0.5
    torch.testing.assert_close(head_VD.grad, d_logits_NV.T @ hidden_ND)
    torch.testing.assert_close(bias_V.grad, d_logits_NV.sum(0))


def test_banned_targets_are_impossible_and_banned_columns_get_no_gradient() -> None:
    hidden_ND, head_VD, bias_V, _ = inputs(rows=2)
    target_N = torch.tensor([3, 4])
    logprob_N, entropy_N = linear_logprob(hidden_ND, head_VD, target_N, 1.0, bias_V, [3], True)
    assert logprob_N[0] == -math.inf
    (torch.where(target_N != 3, logprob_N, 0.0).sum() + entropy_N.sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (hidden_ND, head_VD, bias_V))
    assert (head_VD.grad[3] == 0).all()


def test_a_certain_token_has_a_finite_gradient() -> None:
    hidden_ND, head_VD = torch.tensor([[1000.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    logprob_N, entropy_N = linear_logprob(hidden_ND, head_VD, torch.tensor([0]), return_entropy=True)
    (logprob_N + entropy_N).sum().backward()
    assert logprob_N.item() == entropy_N.item() == 0
    assert (hidden_ND.grad == 0).all()
    assert (head_VD.grad == 0).all()


def test_no_rows() -> None:
    hidden_ND, head_VD, bias_V, target_N = inputs(rows=0)
    logprob_N, entropy_N = linear_logprob(hidden_ND, head_VD, target_N, 1.0, bias_V, None, True)
    assert logprob_N.shape == entropy_N.shape == (0,)
    logprob_N.sum().backward()
    assert (head_VD.grad == 0).all()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, r"hidden must have shape \[N, D\]"),
        ({"head": torch.zeros(5, 4)}, ValueError, r"head must have shape \[V, 3\], got \[5, 4\]"),
        ({"head": torch.zeros(5, 3, dtype=torch.bfloat16)}, TypeError, "head must have dtype torch.float32"),
        ({"head": torch.zeros(0, 3)}, ValueError, "head must have V >= 1"),
        ({"target": torch.tensor([0, 5])}, ValueError, r"target must lie in \[0, 5\), got values from 0 to 5"),
        ({"target": torch.tensor([0.0, 1.0])}, TypeError, "target must have dtype torch.int64"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, "temperature must be .* in every row, got 0.0"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[5\]"),
        ({"banned_ids": [5]}, ValueError, r"banned_ids must lie in \[0, 5\)"),
        ({"backend": "native"}, RuntimeError, "not written yet; available: reference"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    good = {"hidden": torch.zeros(2, 3), "head": torch.zeros(5, 3), "target": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        linear_logprob(**(good | changed))
