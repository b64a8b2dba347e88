"""surrogate_loss: against a loop that follows the formula token by token, value and gradient."""

import math

import pytest
import torch
from torch import Tensor

from diffpo_kernels import surrogate_loss


def inputs(rows: int = 4, length: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        return -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 2

    mask_BL = torch.rand(rows, length, generator=generator) < 0.6
    mask_BL[-1] = False  # a row without tokens
    return {
        "logprob": logprobs().requires_grad_(),
        "old": logprobs(),
        "advantage": torch.randn(rows, generator=generator, dtype=torch.float64),
        "mask": mask_BL,
        "behaviour": logprobs(),
        "reference": logprobs(),
    }


def by_loop(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    behaviour: Tensor | None = None,
    reference: Tensor | None = None,
    clip: float = 0.2,
    weight_cap: float = 2.0,
    kl_coefficient: float = 0.0,
    normalisation: str = "sequence",
) -> Tensor:
    rows = []
    for b in range(len(logprob)):
        terms = []
        for k in range(logprob.shape[1]):
            if not mask[b, k]:
                continue
            ratio = (logprob[b, k] - old[b, k]).exp()
            weight = 1.0 if behaviour is None else min(weight_cap, math.exp(old[b, k] - behaviour[b, k]))
            term = weight * torch.min(ratio * advantage[b], ratio.clamp(1 - clip, 1 + clip) * advantage[b])
            if reference is not None:
                gap = reference[b, k] - logprob[b, k]
                term = term - kl_coefficient * (gap.exp() - gap - 1)
            terms.append(term)
        rows.append(terms)
    if normalisation == "token":
        return -sum(sum(terms) for terms in rows) / sum(len(terms) for terms in rows)
    return -sum(sum(terms) / len(terms) for terms in rows if terms) / len(rows)


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("without", [(), ("behaviour",), ("reference",), ("behaviour", "reference")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_follow_the_formula(seed: int, without: tuple[str, ...], normalisation: str) -> None:
    arguments = {name: value for name, value in inputs(seed=seed).items() if name not in without}
    arguments |= {"normalisation": normalisation, "kl_coefficient": 0.0 if "reference" in without else 0.3}
    loss = surrogate_loss(**arguments).loss
    expected = by_loop(**arguments)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss * 3, arguments["logprob"])
    (expected_gradient,) = torch.autograd.grad(expected * 3, arguments["logprob"])
    torch.testing.assert_close(gradient, expected_gradient)


def test_gradcheck() -> None:
    arguments = inputs(seed=5) | {"kl_coefficient": 0.1}
    logprob_BL = arguments.pop("logprob")
    assert torch.autograd.gradcheck(lambda x: surrogate_loss(x, **arguments).loss, logprob_BL)


def test_only_logprob_is_differentiated() -> None:
    arguments = inputs() | {"kl_coefficient": 0.1}
    others = [arguments[name].requires_grad_() for name in ("old", "advantage", "behaviour", "reference")]
    surrogate_loss(**arguments).loss.backward()
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_values_outside_the_mask_never_matter(normalisation: str, poison: float) -> None:
    clean = inputs() | {"normalisation": normalisation, "kl_coefficient": 0.1}
    dirty = dict(clean)
    for name in ("logprob", "old", "behaviour", "reference"):
        dirty[name] = clean[name].detach().masked_fill(~clean["mask"], poison)
    dirty["logprob"].requires_grad_()
    dirty["advantage"] = clean["advantage"].clone()
    dirty["advantage"][-1] = poison  # the row without tokens
    expected, got = surrogate_loss(**clean), surrogate_loss(**dirty)
    expected.loss.backward()
    got.loss.backward()
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(dirty["logprob"].grad, clean["logprob"].grad)
    assert got.diagnostics == expected.diagnostics


def test_extreme_ratios_stay_finite() -> None:
    logprob_BL = torch.tensor([[0.0, -1000.0, 0.0, -1000.0]], requires_grad=True)
    old_BL = torch.tensor([[-1000.0, 0.0, -1000.0, 0.0]])
    mask_BL = torch.ones(1, 4, dtype=torch.bool)
    for advantage in (1.0, -1.0):
        result = surrogate_loss(
            logprob_BL,
            old_BL,
            torch.tensor([advantage]),
            mask_BL,
            -old_BL - 1000,
            old_BL,
            weight_cap=math.inf,
            kl_coefficient=1.0,
        )
        result.loss.backward()
        assert result.loss.isfinite()
        assert logprob_BL.grad.isfinite().all()


def test_on_policy_the_gradient_is_the_policy_gradient() -> None:
    arguments = inputs()
    arguments["old"] = arguments["logprob"].detach()
    for name in ("behaviour", "reference"):
        del arguments[name]
    result = surrogate_loss(**arguments)
    result.loss.backward()
    mask_BL, rows = arguments["mask"], len(arguments["mask"])
    expected_BL = mask_BL * -arguments["advantage"][:, None] / mask_BL.sum(1, keepdim=True).clamp(min=1) / rows
    torch.testing.assert_close(arguments["logprob"].grad, expected_BL)
    assert result.diagnostics["clip_fraction"] == 0


def test_diagnostics() -> None:
    old_BL = torch.log(torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    logprob_BL = torch.log(torch.tensor([[0.8, 0.5, 0.2, 0.9]]))  # ratios 1.6, 1, 0.4, masked
    behaviour_BL = torch.log(torch.tensor([[0.5, 0.1, 1.0, 0.1]]))  # weights 1, 5 -> 2, 0.5, masked
    mask_BL = torch.tensor([[True, True, True, False]])
    result = surrogate_loss(logprob_BL, old_BL, torch.tensor([1.0]), mask_BL, behaviour_BL, old_BL)
    expected = {
        "ratio_mean": 1.0,
        "ratio_max": 1.6,
        "clip_fraction": 1 / 3,  # 0.4 is outside the interval, but a positive advantage leaves its gradient alone
        "weight_mean": 3.5 / 3,
        "weight_max": 2.0,
        "weight_cap_fraction": 1 / 3,
        "ess": 3.5**2 / (3 * 5.25),
        "kl": sum(1 / r - math.log(1 / r) - 1 for r in (1.6, 1.0, 0.4)) / 3,
    }
    assert {name: value.item() for name, value in result.diagnostics.items()} == pytest.approx(expected, rel=1e-5)
    assert not any(value.requires_grad or value.dim() for value in result.diagnostics.values())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_no_tokens_give_zero(shape: tuple[int, int], normalisation: str) -> None:
    logprob_BL = torch.zeros(shape, requires_grad=True)
    mask_BL = torch.zeros(shape, dtype=torch.bool)
    result = surrogate_loss(
        logprob_BL, torch.zeros(shape), torch.ones(shape[0]), mask_BL, torch.zeros(shape), normalisation=normalisation
    )
    result.loss.backward()
    assert result.loss == 0
    assert (logprob_BL.grad == 0).all()
    assert all(value == 0 for value in result.diagnostics.values())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logprob": torch.zeros(3)}, ValueError, r"logprob must have shape \[B, L\]"),
        ({"old": torch.zeros(2, 4)}, ValueError, r"old must have shape \[2, 3\]"),
        ({"old": None}, TypeError, "old must be a torch.Tensor, got NoneType"),
        ({"advantage": torch.zeros(2, 3)}, ValueError, r"advantage must have shape \[2\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must have dtype torch.bool, got torch.float32"),
        ({"behaviour": torch.zeros(2, 3, device="meta")}, ValueError, "behaviour must be on cpu"),
        ({"clip": -0.1}, ValueError, "clip must be a number >= 0, got -0.1"),
        ({"weight_cap": 0.0}, ValueError, "weight_cap must be a number > 0"),
        ({"kl_coefficient": math.nan}, ValueError, "kl_coefficient must be .* got nan"),
        ({"kl_coefficient": 0.1}, ValueError, "reference must be a tensor .* when kl_coefficient > 0"),
        ({"normalisation": "batch"}, ValueError, "normalisation must be 'sequence' or 'token', got 'batch'"),
        ({"backend": "triton"}, RuntimeError, "not written yet; available: reference"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    good = {
        "logprob": torch.zeros(2, 3), "old": torch.zeros(2, 3), "advantage": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        surrogate_loss(**(good | changed))
