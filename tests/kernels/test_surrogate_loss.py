"""surrogate_loss: every backend against a loop that follows the formula, and against the reference in float64 on inputs that hurt."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffpo_kernels import backends, surrogate_loss
from diffpo_kernels.surrogate_loss import WEIGHT_EDGES, SurrogateLoss

OPERATOR = "surrogate_loss"
TOKENS = ("logprob", "old", "behaviour", "reference")  # float arguments of shape [B, L]


def inputs(rows: int = 4, length: int = 6, seed: int = 0, bins: int = 3) -> dict[str, Tensor | int]:
    """float64 on the CPU, exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        return -torch.rand(rows, length, generator=generator).double() * 2

    mask_BL = torch.rand(rows, length, generator=generator) < 0.6
    mask_BL[-1:] = False  # a row without tokens
    return {
        "logprob": logprobs(),
        "old": logprobs(),
        "advantage": torch.randn(rows, generator=generator).double(),
        "mask": mask_BL,
        "behaviour": logprobs(),
        "reference": logprobs(),
        "step_bin": torch.randint(-1, bins, (rows, length), generator=generator),
        "bins": bins,
    }


def place(target, arguments: dict, dtype: torch.dtype | None = None) -> dict:
    """The arguments on the target's device, floats in `dtype` (default: the finest the target has), logprob to be differentiated."""
    dtype = dtype or (torch.float32 if target.backend == "triton" else torch.float64)
    placed = {"backend": target.backend}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.detach().to(target.device, dtype if value.is_floating_point() else None)
        placed[name] = value
    placed["logprob"].requires_grad_()
    return placed


def run(target, arguments: dict, dtype: torch.dtype | None = None) -> tuple[SurrogateLoss, Tensor]:
    """The result and the gradient of three times the loss."""
    placed = place(target, arguments, dtype)
    result = surrogate_loss(**placed)
    (gradient,) = torch.autograd.grad(3 * result.loss, placed["logprob"])
    return result, gradient


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
    **_: object,
) -> Tensor:
    rows = []
    for b in range(len(logprob)):
        terms = []
        for k in range(logprob.shape[1]):
            if not mask[b, k]:
                continue
            ratio = (logprob[b, k] - old[b, k]).exp()
            weight = 1.0 if behaviour is None else min(weight_cap, math.exp(old[b, k] - behaviour[b, k]))
            push = advantage[b] if advantage.dim() == 1 else advantage[b, k]
            term = weight * torch.min(ratio * push, ratio.clamp(1 - clip, 1 + clip) * push)
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
@pytest.mark.parametrize(("seed", "per_token"), [(0, False), (1, False), (2, True)])
def test_value_and_gradient_follow_the_formula(
    target, seed: int, per_token: bool, without: tuple[str, ...], normalisation: str
) -> None:
    arguments = {name: value for name, value in inputs(seed=seed).items() if name not in without}
    if per_token:
        arguments = by_token(arguments)
    arguments |= {"normalisation": normalisation, "kl_coefficient": 0.0 if "reference" in without else 0.3}
    result, gradient_BL = run(target, arguments)
    arguments["logprob"].requires_grad_()
    expected = by_loop(**arguments)
    (expected_BL,) = torch.autograd.grad(expected * 3, arguments["logprob"])
    torch.testing.assert_close(result.loss.cpu(), expected.to(result.loss.dtype))
    torch.testing.assert_close(gradient_BL.cpu(), expected_BL.to(gradient_BL.dtype))


def longer(arguments: dict) -> dict:
    """Rows of several blocks, of one block and of a single token."""
    arguments = inputs(3, 1100, seed=7) | {name: value for name, value in arguments.items() if name not in inputs()}
    arguments["mask"][1, 300:] = False
    arguments["mask"][2, 5] = True
    return arguments


def by_token(arguments: dict) -> dict:
    """Another advantage for each token."""
    generator = torch.Generator().manual_seed(7)
    return arguments | {"advantage": torch.randn(arguments["mask"].shape, generator=generator).double()}


HARD = {
    "plain": lambda a: a,
    "no behaviour": lambda a: a | {"behaviour": None},
    "behaviour only watched": lambda a: a | {"importance_correction": False},
    "KL": lambda a: a | {"kl_coefficient": 0.3},
    "KL watched, not in the loss": lambda a: a | {"kl_coefficient": 0.0},
    "no reference": lambda a: a | {"reference": None},
    "no bins": lambda a: {name: value for name, value in a.items() if name not in ("step_bin", "bins")},
    "no clip": lambda a: a | {"clip": math.inf},
    "no cap": lambda a: a | {"weight_cap": math.inf},
    "clip 0": lambda a: a | {"clip": 0.0},
    "clip above 1": lambda a: a | {"clip": 1.5},
    "ratio on the edge": lambda a: a | {"old": a["logprob"], "clip": 0.0},
    "cap hit exactly": lambda a: a | {"behaviour": a["old"], "weight_cap": 1.0},
    "cap below every weight": lambda a: a | {"weight_cap": 1e-3},
    "no advantage": lambda a: a | {"advantage": 0 * a["advantage"], "kl_coefficient": 0.1},
    "everything masked": lambda a: a | {"mask": torch.zeros_like(a["mask"])},
    "nothing masked": lambda a: a | {"mask": torch.ones_like(a["mask"])},
    "one token": lambda a: a | {"mask": torch.arange(a["mask"].numel()).view_as(a["mask"]) == 8},
    "huge ratios": lambda a: a | {"logprob": a["logprob"] + 1e4 * torch.randn_like(a["logprob"]).sign()},
    "huge weights": lambda a: a | {"behaviour": -1e4 * (a["behaviour"] < -1).double(), "weight_cap": math.inf},
    "tiny weights": lambda a: a | {"behaviour": a["behaviour"] + 1e4, "clip": math.inf},
    "huge KL": lambda a: a | {"reference": 1e4 * (a["reference"] + 1).sign(), "kl_coefficient": 0.1},
    "one bin": lambda a: a | {"step_bin": a["step_bin"].clamp(-1, 0), "bins": 1},
    "every bin": lambda a: a | {"step_bin": torch.arange(a["mask"].numel()).view_as(a["mask"]) % 128, "bins": 128},
    "several blocks": longer,
    "advantage by token": by_token,
    "advantage by token, several blocks": lambda a: by_token(longer(a)),
    "advantage by token, not contiguous": lambda a: a | {"advantage": torch.randn(9, 10).double()[:, ::2].T},
    "advantage NaN outside the mask": lambda a: (
        by_token(a) | {"advantage": torch.where(a["mask"], 1.5, math.nan).double()}
    ),
}


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_equal_advantages_of_a_rows_tokens_are_the_rows(target, normalisation: str) -> None:
    arguments = inputs(5, 9, seed=3) | {"normalisation": normalisation}
    by_row, by_row_BL = run(target, arguments, torch.float32)
    expanded = arguments["advantage"][:, None].expand(5, 9)
    spread, spread_BL = run(target, arguments | {"advantage": expanded}, torch.float32)
    assert torch.equal(by_row.loss, spread.loss)
    assert torch.equal(by_row_BL, spread_BL)


@pytest.mark.parametrize("normalisation", ["sequence", "token"])
@pytest.mark.parametrize("change", HARD.values(), ids=HARD.keys())
def test_matches_float64(target, change, normalisation: str) -> None:
    torch.manual_seed(0)
    arguments = change(inputs(5, 9, seed=3) | {"normalisation": normalisation})
    assert_no_worse_than_torch(target, arguments)


def assert_no_worse_than_torch(target, arguments: dict) -> None:
    """Loss, gradient and every diagnostic: the error against float64 is at most the reference's in float32, plus 1e-5."""
    on_cpu = type(target)("reference", "cpu")
    exact, exact_BL = run(on_cpu, arguments)
    torch_, torch_BL = run(on_cpu, arguments, torch.float32)
    got, got_BL = run(target, arguments, torch.float32)
    assert got.diagnostics.keys() == exact.diagnostics.keys()
    compared = {"loss": (got.loss, torch_.loss, exact.loss), "gradient": (got_BL, torch_BL, exact_BL)}
    compared |= {
        name: (got.diagnostics[name], torch_.diagnostics[name], exact.diagnostics[name]) for name in exact.diagnostics
    }
    for name, (ours, theirs, truth) in compared.items():
        assert ours.dtype == torch.float32
        assert ours.shape == truth.shape, name
        allowed = (theirs - truth).abs() + 1e-5 * truth.abs().clamp(min=1)
        assert ((ours.cpu() - truth).abs() <= allowed).all(), (name, ours, truth)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 6),
    length=st.integers(0, 20),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    clip=st.sampled_from([0.0, 0.2, 1.0, math.inf]),
    weight_cap=st.sampled_from([0.3, 2.0, math.inf]),
    kl_coefficient=st.sampled_from([0.0, 0.04]),
    normalisation=st.sampled_from(["sequence", "token"]),
    dropped=st.sets(st.sampled_from(["behaviour", "reference"])),
)
def test_any_arguments(target, rows, length, seed, scale, dropped, kl_coefficient, **options) -> None:
    arguments = inputs(rows, length, seed, bins=1 + seed % 7) | options
    arguments["kl_coefficient"] = 0.0 if "reference" in dropped else kl_coefficient
    for name in TOKENS:
        arguments[name] = None if name in dropped else (arguments[name] * scale).float().double()
    assert_no_worse_than_torch(target, arguments)


def test_gradcheck(target) -> None:
    if target.backend == "triton":
        with pytest.raises(TypeError, match=r"logprob must not have dtype torch\.float64 for backend 'triton'"):
            surrogate_loss(**place(target, inputs(), torch.float64))
        return
    arguments = place(target, inputs(seed=5) | {"kl_coefficient": 0.1})
    logprob_BL = arguments.pop("logprob")
    assert torch.autograd.gradcheck(lambda x: surrogate_loss(x, **arguments).loss, logprob_BL)


def test_gradient_equals_finite_differences(target) -> None:
    arguments = place(target, inputs(seed=5) | {"kl_coefficient": 0.1}, torch.float32)
    result = surrogate_loss(**arguments)
    (gradient_BL,) = torch.autograd.grad(result.loss, arguments["logprob"])
    direction_BL, step = torch.randn_like(gradient_BL), 1e-3
    with torch.no_grad():
        ahead, behind = (
            surrogate_loss(**(arguments | {"logprob": arguments["logprob"] + sign * step * direction_BL})).loss
            for sign in (1, -1)
        )
    slope = (gradient_BL * direction_BL).sum()
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(slope.item(), rel=2e-3, abs=2e-4)


def test_only_logprob_is_differentiated(target) -> None:
    arguments = place(target, inputs() | {"kl_coefficient": 0.1})
    others = [arguments[name].requires_grad_() for name in ("old", "advantage", "behaviour", "reference")]
    result = surrogate_loss(**arguments)
    result.loss.backward()
    assert all(tensor.grad is None for tensor in others)
    assert not any(value.requires_grad for value in result.diagnostics.values())
    arguments["logprob"].requires_grad_(False)
    with torch.no_grad():
        others[0].requires_grad_(False)
    assert torch.equal(surrogate_loss(**arguments).loss, result.loss.detach())


def test_a_second_derivative_needs_the_reference(target) -> None:
    arguments = place(target, inputs() | {"kl_coefficient": 0.1})
    loss = surrogate_loss(**arguments).loss
    (gradient_BL,) = torch.autograd.grad(loss, arguments["logprob"], create_graph=True)
    if target.backend == "reference":
        (second_BL,) = torch.autograd.grad(gradient_BL.sum(), arguments["logprob"])
        assert (second_BL != 0).any()
    else:
        with pytest.raises(RuntimeError, match="differentiated only once, except with backend='reference'"):
            gradient_BL.sum().backward()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_values_outside_the_mask_never_matter(target, normalisation: str, poison: float) -> None:
    clean = inputs() | {"normalisation": normalisation, "kl_coefficient": 0.1}
    dirty = clean | {name: clean[name].masked_fill(~clean["mask"], poison) for name in TOKENS}
    dirty["advantage"] = clean["advantage"].clone()
    dirty["advantage"][-1] = poison  # the row without tokens
    dirty["step_bin"] = clean["step_bin"].masked_fill(~clean["mask"], 10**12)
    (expected, expected_BL), (got, got_BL) = run(target, clean), run(target, dirty)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got_BL, expected_BL)
    assert all(torch.equal(got.diagnostics[name], value) for name, value in expected.diagnostics.items())


@pytest.mark.parametrize("name", ["logprob", "old", "behaviour", "advantage"])
def test_nan_inside_the_mask_is_not_hidden(target, name: str) -> None:
    """The trainer skips an update whose loss is not finite."""
    arguments = inputs()
    arguments["mask"][0, 0] = True
    arguments[name].view(len(arguments[name]), -1)[0, 0] = math.nan
    assert run(target, arguments)[0].loss.isnan()


@pytest.mark.parametrize("name", ["logprob", "old", "behaviour", "reference"])
def test_nan_enters_the_same_diagnostics_everywhere(target, name: str) -> None:
    arguments = inputs(3, 300)  # more than a block
    arguments["mask"][0, 280] = True
    arguments[name][0, 280] = math.nan
    got = run(target, arguments, torch.float32)[0].diagnostics
    expected = run(type(target)("reference", "cpu"), arguments, torch.float32)[0].diagnostics
    for key, value in expected.items():
        torch.testing.assert_close(got[key].cpu(), value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=key)
    assert got["ratio_max"].isnan() == (name in ("logprob", "old"))
    assert got["weight_max"].isnan() == (name in ("old", "behaviour"))
    assert got["weight_histogram"].sum() == arguments["mask"].sum() - int(name in ("old", "behaviour"))


def test_weights_that_underflow_have_no_sample_size(target) -> None:
    assert run(target, by_hand() | {"weight_cap": 1e-50}, torch.float32)[0].diagnostics["ess"] == 0


def test_extreme_ratios_stay_finite(target) -> None:
    old_BL = torch.tensor([[-1000.0, 0.0, -1000.0, 0.0]])
    arguments = {
        "logprob": torch.tensor([[0.0, -1000.0, 0.0, -1000.0]]),
        "old": old_BL,
        "mask": torch.ones(1, 4, dtype=torch.bool),
        "behaviour": -old_BL - 1000,
        "reference": old_BL,
        "weight_cap": math.inf,
        "kl_coefficient": 1.0,
    }
    for advantage in (1.0, -1.0):
        result, gradient_BL = run(target, arguments | {"advantage": torch.tensor([advantage])}, torch.float32)
        assert result.loss.isfinite()
        assert gradient_BL.isfinite().all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_at_the_clip_the_loss_is_continuous(target, advantage: float) -> None:
    """exp(log 1.2) may fall on either side of 1.2; the loss must not notice, and the gradient is that of one side."""
    edge = math.log(1.2 if advantage > 0 else 0.8)
    arguments = {
        "logprob": torch.full((1, 1), edge),
        "old": torch.zeros(1, 1),
        "advantage": torch.tensor([advantage]),
        "mask": torch.ones(1, 1, dtype=torch.bool),
    }
    result, gradient_BL = run(target, arguments, torch.float32)
    assert result.loss.item() == pytest.approx(-advantage * math.exp(edge), rel=1e-6)
    assert gradient_BL.item() in (0.0, pytest.approx(-3 * advantage * math.exp(edge), rel=1e-6))


def test_on_policy_the_gradient_is_the_policy_gradient(target) -> None:
    arguments = inputs() | {"behaviour": None, "reference": None}
    arguments["old"] = arguments["logprob"]
    result, gradient_BL = run(target, arguments)
    mask_BL, rows = arguments["mask"], len(arguments["mask"])
    expected_BL = mask_BL * -arguments["advantage"][:, None] / mask_BL.sum(1, keepdim=True).clamp(min=1) / rows
    torch.testing.assert_close(gradient_BL.cpu(), 3 * expected_BL.to(gradient_BL.dtype))
    assert result.diagnostics["clip_fraction"] == 0


BEHAVIOUR_ALONE = ("weight_histogram", "bin/weight_histogram", "bin/surrogate_kl", "bin/ess_uncapped")


def by_hand() -> dict:
    old_BL = torch.log(torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    return {
        "logprob": torch.log(torch.tensor([[0.8, 0.5, 0.2, 0.9]])),  # ratios 1.6, 1, 0.4, outside the mask
        "old": old_BL,
        "advantage": torch.tensor([1.0]),
        "mask": torch.tensor([[True, True, True, False]]),
        "behaviour": torch.log(torch.tensor([[0.5, 0.1, 1.0, 0.1]])),  # weights 1, 5 -> 2, 0.5, outside the mask
        "reference": old_BL,
    }


def test_diagnostics(target) -> None:
    result, _ = run(target, by_hand(), torch.float32)
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
    histogram = result.diagnostics.pop("weight_histogram")
    assert {name: value.item() for name, value in result.diagnostics.items()} == pytest.approx(expected, rel=1e-5)
    assert histogram.tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0]  # 0.5, 1, and 5, which is nearest to 4


def test_diagnostics_by_bin(target) -> None:
    by_step = {"step_bin": torch.tensor([[2, 0, 0, 1]]), "bins": 4}
    diagnostics = run(target, by_hand() | by_step, torch.float32)[0].diagnostics
    expected = {  # bin 0 holds the weights 2 (5 before the cap) and 0.5, bin 2 the weight 1
        "bin/tokens": [2, 0, 1, 0],
        "bin/weight_mean": [1.25, 0, 1, 0],
        "bin/ess": [2.5**2 / (2 * 4.25), 0, 1, 0],
        "bin/weight_cap_fraction": [0.5, 0, 0, 0],
        "bin/surrogate_kl": [-(math.log(5) + math.log(0.5)) / 2, 0, 0, 0],
        "bin/ess_uncapped": [5.5**2 / (2 * 25.25), 0, 1, 0],
    }
    got = {name: value.tolist() for name, value in diagnostics.items() if name.startswith("bin/")}
    histogram = {(b, i): n for b, row in enumerate(got.pop("bin/weight_histogram")) for i, n in enumerate(row) if n > 0}
    assert histogram == {(0, 4): 1, (0, 7): 1, (2, 5): 1}
    for name, values in expected.items():
        assert got.pop(name) == pytest.approx(values, rel=1e-5, abs=1e-6), name
    assert not got


def test_behaviour_can_be_watched_without_correcting(target) -> None:
    options = {"step_bin": torch.zeros(1, 4, dtype=torch.int64), "bins": 1}
    watched, watched_BL = run(target, by_hand() | options | {"importance_correction": False})
    corrected, _ = run(target, by_hand() | options)
    without, without_BL = run(target, by_hand() | options | {"behaviour": None})
    assert torch.equal(watched.loss, without.loss)
    assert torch.equal(watched_BL, without_BL)
    for name, value in watched.diagnostics.items():
        other = corrected if name in BEHAVIOUR_ALONE else without
        assert torch.equal(value, other.diagnostics[name]), name
    assert watched.diagnostics["ess"] == 1
    assert without.diagnostics["bin/surrogate_kl"] == 0
    assert without.diagnostics["weight_histogram"][5] == 3


def test_a_token_may_be_in_no_bin(target) -> None:
    result, _ = run(target, by_hand() | {"step_bin": torch.full((1, 4), -1), "bins": 2})
    assert all((value == 0).all() for name, value in result.diagnostics.items() if name.startswith("bin/"))


def test_the_histogram_has_the_documented_edges(target) -> None:
    weight_N = torch.tensor([1e-30, *(edge * factor for edge in WEIGHT_EDGES for factor in (0.999, 1.001)), 1e30])
    arguments = {
        "logprob": torch.zeros(1, len(weight_N)),
        "old": torch.zeros(1, len(weight_N)),
        "advantage": torch.zeros(1),
        "mask": torch.ones(1, len(weight_N), dtype=torch.bool),
        "behaviour": -weight_N.log()[None],
    }
    expected_N = torch.bucketize(weight_N, torch.tensor(WEIGHT_EDGES), right=True)
    histogram = run(target, arguments, torch.float32)[0].diagnostics["weight_histogram"]
    assert histogram.tolist() == torch.bincount(expected_N, minlength=len(WEIGHT_EDGES) + 1).tolist()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_no_tokens_give_zero(target, shape: tuple[int, int], normalisation: str) -> None:
    arguments = {
        **{name: torch.zeros(shape) for name in TOKENS},
        "advantage": torch.ones(shape[0]),
        "mask": torch.zeros(shape, dtype=torch.bool),
        "step_bin": torch.zeros(shape, dtype=torch.int64),
        "bins": 2,
        "normalisation": normalisation,
    }
    result, gradient_BL = run(target, arguments)
    assert result.loss == 0
    assert (gradient_BL == 0).all()
    assert all((value == 0).all() for value in result.diagnostics.values())


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t() if x.dim() == 2 else x,
    "strided": lambda x: torch.stack([x, -x], dim=-1)[..., 0] if x.dtype != torch.bool else x,
    "shifted": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_does_not_matter(target, layout) -> None:
    arguments = place(target, inputs() | {"kl_coefficient": 0.1})
    expected = surrogate_loss(**arguments)
    (expected_BL,) = torch.autograd.grad(expected.loss, arguments["logprob"])
    moved = {name: layout(value) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    got = surrogate_loss(**moved)
    (got_BL,) = torch.autograd.grad(got.loss, arguments["logprob"])
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got_BL, expected_BL)
    assert all(torch.equal(got.diagnostics[name], value) for name, value in expected.diagnostics.items())


def test_expanded_inputs(target) -> None:
    arguments = place(target, inputs())
    for name in ("old", "behaviour", "reference", "mask", "step_bin"):
        arguments[name] = arguments[name][:1].expand(4, 6)
    arguments["advantage"] = arguments["advantage"][:1].expand(4)
    copies = {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    assert torch.equal(surrogate_loss(**arguments).loss, surrogate_loss(**copies).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_widened_first(target, dtype: torch.dtype) -> None:
    arguments = inputs() | {"kl_coefficient": 0.1}
    narrow = {
        name: value.to(dtype).double() if name in (*TOKENS, "advantage") else value for name, value in arguments.items()
    }
    expected, expected_BL = run(target, narrow, torch.float32)
    got, got_BL = run(target, narrow, dtype)
    assert got.loss.dtype == torch.float32
    assert got_BL.dtype == dtype
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got_BL, expected_BL.to(dtype))


def test_dtypes_may_differ(target) -> None:
    arguments = place(target, inputs(), torch.float32)
    mixed = arguments | {"old": arguments["old"].double(), "advantage": arguments["advantage"].double()}
    assert torch.equal(surrogate_loss(**mixed).loss, surrogate_loss(**arguments).loss)


def test_repeats_exactly(target) -> None:
    arguments = inputs(9, 50) | {"normalisation": "token", "kl_coefficient": 0.1}
    (first, first_BL), (second, second_BL) = run(target, arguments), run(target, arguments)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first_BL, second_BL)
    assert all(torch.equal(first.diagnostics[name], value) for name, value in second.diagnostics.items())


def test_threads_do_not_change_the_native_result() -> None:
    if backends.native_module() is None:
        pytest.skip(backends.missing_extension_reason())
    arguments = inputs(700, 600) | {"kl_coefficient": 0.1, "backend": "native"}
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(surrogate_loss(**arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.loss, results[0].loss)
        assert all(torch.equal(other.diagnostics[name], value) for name, value in results[0].diagnostics.items())


def test_many_rows(target) -> None:
    if target == ("triton", "cpu"):
        pytest.skip("the interpreter takes milliseconds a row")
    assert_no_worse_than_torch(target, inputs(70_000, 2) | {"kl_coefficient": 0.1})


def test_opcheck_and_compile(target) -> None:
    arguments = place(target, inputs() | {"kl_coefficient": 0.1}, torch.float32)
    if target.backend != "reference":
        order = ("logprob", "old", "advantage", "mask", "behaviour", "reference", "step_bin", "bins")
        positional = [x.detach() if isinstance(x, Tensor) else x for x in (arguments[name] for name in order)]
        operator = torch.ops.diffpo_kernels.surrogate_loss.default
        torch.library.opcheck(operator, (*positional, 0.2, 2.0, 0.1, True, "token", target.backend))

    def loss_and_diagnostics(logprob_BL: Tensor) -> SurrogateLoss:
        return surrogate_loss(**(arguments | {"logprob": logprob_BL * 2}))

    compiled = torch.compile(loss_and_diagnostics, fullgraph=True, backend="aot_eager")
    results = [f(arguments["logprob"]) for f in (loss_and_diagnostics, compiled)]
    gradients = [torch.autograd.grad(3 * result.loss, arguments["logprob"])[0] for result in results]
    torch.testing.assert_close(results[1].loss, results[0].loss)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(dict(results[1].diagnostics), dict(results[0].diagnostics))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logprob": torch.zeros(3)}, ValueError, r"logprob must have shape \[B, L\]"),
        ({"old": torch.zeros(2, 4)}, ValueError, r"old must have shape \[2, 3\]"),
        ({"old": None}, TypeError, "old must be a torch.Tensor, got NoneType"),
        ({"advantage": torch.zeros(3)}, ValueError, r"advantage must have shape \[2\]"),
        ({"advantage": torch.zeros(2, 1)}, ValueError, r"advantage must have shape \[2, 3\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must have dtype torch.bool, got torch.float32"),
        ({"behaviour": torch.zeros(2, 3, device="meta")}, ValueError, "behaviour must be on cpu"),
        ({"clip": -0.1}, ValueError, "clip must be a number >= 0, got -0.1"),
        ({"weight_cap": 0.0}, ValueError, "weight_cap must be a number > 0"),
        ({"kl_coefficient": math.nan}, ValueError, "kl_coefficient must be .* got nan"),
        ({"kl_coefficient": 0.1}, ValueError, "reference must be a tensor .* when kl_coefficient > 0"),
        ({"normalisation": "batch"}, ValueError, "normalisation must be 'sequence' or 'token', got 'batch'"),
        ({"bins": 2}, ValueError, "step_bin must be given together with bins, got None"),
        ({"step_bin": torch.zeros(2, 3).long()}, ValueError, "bins must be given together with step_bin, got None"),
        ({"step_bin": torch.zeros(2, 3).long(), "bins": 0}, ValueError, r"bins must lie in \[1, 128\], got 0"),
        ({"step_bin": torch.zeros(2, 3).long(), "bins": 129}, ValueError, r"bins must lie in \[1, 128\], got 129"),
        ({"step_bin": torch.zeros(2, 3).long(), "bins": 2.0}, TypeError, "bins must be an int, got float"),
        ({"step_bin": torch.zeros(2, 3), "bins": 2}, TypeError, "step_bin must have dtype torch.int64"),
        ({"step_bin": torch.zeros(2, 2).long(), "bins": 2}, ValueError, r"step_bin must have shape \[2, 3\]"),
        ({"step_bin": torch.full((2, 3), 2), "bins": 2}, ValueError, r"step_bin must lie in \[-1, 2\) .* from 2 to 2"),
        ({"step_bin": torch.full((2, 3), -2), "bins": 2}, ValueError, r"step_bin must lie in .* from -2 to -2"),
        ({"backend": "cuda"}, RuntimeError, "not written for this operator; available: reference"),
    ],
)
def test_bad_input_is_named(changed: dict, error: type[Exception], message: str) -> None:
    good = {
        "logprob": torch.zeros(2, 3), "old": torch.zeros(2, 3), "advantage": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        surrogate_loss(**(good | changed))
