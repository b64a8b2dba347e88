"""Commit rules: which masked positions of the active block are committed in a denoising step.

Every rule is data for one operator, ``entropy_bounded_commit_``: an ``order`` (the smallest is committed first), a ``cost``
per position, a ``budget`` per row and how costs are held against it; committed is the longest prefix of at least one position with
sum(cost) - max(cost) <= budget ("joint"), or with (n + 1) cost_n <= budget for its n-th position, n > 1 ("ranked").
Unit costs with budget k - 1 commit exactly k positions.

A position's proposal is never the mask token: its probability counts as 0 in every number below, as if the vocabulary did not hold it.
(Published decoders leave it in, and may "commit" a mask.)

Sure positions are compared by odds, not by probabilities, which all round to 1 in float32.
"""

import math
import warnings
from collections.abc import Hashable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from diffpo.keyed_random import uniform
from diffpo.models.layout import FirstPass
from diffpo.models.threshold import threshold_logprobs
from diffpo.models.transformer import MaskedDiffusionLM

ORDERS = ("entropy", "confidence", "margin")
_ONE_IN_FLOAT64 = 2.0**-53  # 1 / (1 + odds) is 1 up to here
_GAMMA_DRAW = 1  # purpose in the random key; 0 is the tokens' draws


@dataclass(frozen=True)
class StepPredictions:
    """What the network says in one step about A rows of L positions; only ``candidates`` hold meaningful values.

    candidates: bool [A, L], masked positions of each row's active block.
    entropy (nats), confidence (probability of the proposed token), top1, top2 (largest probabilities): fp32 [A, L], untempered.
    odds, top_odds: fp32 [A, L], (1 - p) / p of the proposed and of the most probable token, exact also where p rounds to 1.
    block_step: int64 [A], steps already spent on the active block; gamma: fp32 [A], the rows' thresholds (nats) or NaN.
    block_length: tokens; blocks: their number; number: the rule's own (``Rule``). Each a number where all rows agree, else a tensor [A].
    """

    candidates: Tensor
    entropy: Tensor
    confidence: Tensor
    top1: Tensor
    top2: Tensor
    odds: Tensor
    top_odds: Tensor
    block_step: Tensor
    gamma: Tensor
    block_length: int | Tensor
    blocks: int | Tensor
    number: float | Tensor

    def __getitem__(self, rows: Tensor) -> "StepPredictions":
        """Those of some rows, an index."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return StepPredictions(
            **{n: value[rows] if isinstance(value, Tensor) else value for n, value in values.items()}
        )

    def order(self, name: str) -> Tensor:
        """Estimated error per position, small = commit first."""
        if name == "entropy":
            return self.entropy
        if name == "confidence":
            return _as_compared(self.top_odds)
        return _as_compared((self.top_odds * self.top1 + self.top2) / (self.top1 - self.top2))  # (1 - margin) / margin

    def doubt(self) -> Tensor:
        """The odds against each proposed token, [A, L]: the most confident has the smallest."""
        return _as_compared(self.odds)


def _as_compared(odds: Tensor) -> Tensor:
    """0 where the probability is 1 in float64, in which published decoders compare: those are equally sure, and the leftmost goes first."""
    return torch.where(odds <= _ONE_IN_FLOAT64, 0.0, odds)


class Plan(NamedTuple):
    """order, cost: fp32 [A, L]; budget: fp32 [A]; rule: how costs are held against it, "joint" or "ranked"."""

    order: Tensor
    cost: Tensor
    budget: Tensor
    rule: str = "joint"


class Threshold(NamedTuple):
    """Per-row thresholds [B] with the bin they came from (-1: none) and its log-prob."""

    gamma: Tensor
    bin: Tensor
    logprob: Tensor


class Rule:
    """A commit rule.

    stops_at_eos: a row ends once every token before its first EOS is committed
    gamma: nats, the entropy bound of its rows; NaN: none, or one that is drawn
    draws_gamma: `thresholds` draws it, from the bins of a learned threshold, which a trajectory records among its actions
    number: what of the rule may differ between rows that are planned together; `plan` reads it from the step
    planned_by: names of the rule's attributes that its plans depend on beside ``gamma`` and ``number``; None: whatever the rule holds
    """

    stops_at_eos = True
    draws_gamma = False
    gamma: float | Tensor = math.nan
    number: float = 0.0
    planned_by: tuple[str, ...] | None = None

    @property
    def family(self) -> Hashable:
        """Rules of one family plan their rows together, by any one of them."""
        names = vars(type(self)).get("planned_by")  # its own class's: one that inherits may plan by more
        return id(self) if names is None else (type(self), *(getattr(self, name) for name in names))

    def check(self, model: MaskedDiffusionLM, prompts: int, gen_length: int, block_length: int) -> None:
        """ValueError if the rule cannot decode this many prompts with this model and these lengths."""

    def resolve(self, model: MaskedDiffusionLM) -> "Rule":
        """The rule with everything filled in that the model decides."""
        return self

    def for_prompt(self, index: int) -> "Rule":
        """The rule of one of a list's prompts."""
        return self

    def thresholds(self, model: MaskedDiffusionLM, first: FirstPass, keys: Tensor, seed: int | Tensor) -> Threshold:
        """Where ``draws_gamma``, called for each row once, with the hidden states of its first pass.

        keys: int64 [B], of the rows' draws beside ``seed``.
        """
        raise NotImplementedError

    def plan(self, step: StepPredictions) -> Plan:
        """What to commit. To stay within a CUDA graph it must not look at the numbers (``if``, ``.item()``, boolean indexing)."""
        raise NotImplementedError


def _entropy_bounded(step: StepPredictions, order: str) -> Plan:
    return Plan(step.order(order), step.entropy, step.gamma)


def _fixed_count(order: Tensor, count: Tensor) -> Plan:
    return Plan(order, torch.ones_like(order), (count - 1).clamp(min=0).float())


class FixedSchedule(Rule):
    """LLaDA's reference schedule: ``steps`` in all, the same number in each block, most confident tokens first.

    A block of n tokens and S steps commits n // S per step, the first n % S steps one more. Decodes every position, also
    after an EOS. ``steps`` must be a multiple of the number of blocks; steps beyond one a token are not spent.
    Source: LLaDA (arXiv 2502.09992), low-confidence remasking; its code may also propose the mask token, which is never done here.
    """

    stops_at_eos = False
    planned_by = ()

    def __init__(self, steps: int):
        if isinstance(steps, bool) or not hasattr(steps, "__index__"):
            raise ValueError(f"steps must be an int, got {steps!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = self.number = steps

    def __repr__(self) -> str:
        return f"FixedSchedule(steps={self.steps})"

    def check(self, model: MaskedDiffusionLM, prompts: int, gen_length: int, block_length: int) -> None:
        blocks = gen_length // block_length
        if self.steps % blocks:
            raise ValueError(
                f"steps {self.steps} must be a multiple of the number of blocks {blocks} (gen_length / block_length)"
            )

    def plan(self, step: StepPredictions) -> Plan:
        steps_per_block = step.number // step.blocks
        count = step.block_length // steps_per_block + (step.block_step < step.block_length % steps_per_block).long()
        return _fixed_count(step.doubt(), count)


class ConfidenceThreshold(Rule):
    """Commit every candidate whose confidence is at least ``p``, and always the most confident one (Fast-dLLM, 2505.22618).

    1 takes what float64 rounds to 1.
    """

    planned_by = ()

    def __init__(self, p: float = 0.9):
        if not _is_number(p) or not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in [0, 1], got {p!r}")
        self.p = p
        self.number = (1 - p) / p if p > 0 else math.inf  # the largest odds against a token

    def __repr__(self) -> str:
        return f"ConfidenceThreshold(p={self.p:g})"

    def plan(self, step: StepPredictions) -> Plan:
        doubt = step.doubt()
        largest = step.number[:, None].to(doubt) if isinstance(step.number, Tensor) else step.number
        return _fixed_count(doubt, ((doubt <= largest) & step.candidates).sum(dim=1))


class FactorThreshold(Rule):
    """Commit the n most confident candidates while the n-th confidence is at least 1 - factor / (n + 1), and always the first.

    The more tokens are committed together, the surer each must be; 0 commits one token a step (more only at a confidence that
    float64 rounds to 1), inf the whole block. Source: Fast-dLLM (arXiv 2505.22618), factor-based parallel decoding.
    """

    planned_by = ()

    def __init__(self, factor: float):
        if not _is_number(factor) or not factor >= 0:
            raise ValueError(f"factor must be at least 0 and not NaN, got {factor!r}")
        self.factor = self.number = factor

    def __repr__(self) -> str:
        return f"FactorThreshold(factor={self.factor:g})"

    def plan(self, step: StepPredictions) -> Plan:
        number, doubt = step.number, step.doubt()
        budget = number.to(doubt) if isinstance(number, Tensor) else torch.full_like(step.gamma, number)
        missing = torch.where(step.confidence > 0.5, doubt * step.confidence, 1 - step.confidence)  # 1 - confidence
        return Plan(doubt, missing, budget, rule="ranked")


class EntropyBounded(Rule):
    """The Entropy-Bounded sampler (arXiv 2505.24857): the longest prefix U in order with sum_U H - max_U H <= gamma.

    ``gamma``: nats, a number or a tensor [B] with one value per row; 0 commits one token a step, inf the whole block.
    ``order``: of commitment: "entropy" H, "confidence" (largest probability) or "margin" (top-1 less runner-up); ``proxy`` was its name.
    """

    gamma: Tensor
    planned_by = ("order",)

    def __init__(self, gamma: float | Tensor, order: str = "entropy", *, proxy: str | None = None):
        if not (_is_number(gamma) or (isinstance(gamma, Tensor | Sequence) and not isinstance(gamma, str))):
            raise ValueError(f"gamma must be a number or a tensor [B] (nats), got {gamma!r}")
        self.gamma = torch.as_tensor(gamma, dtype=torch.float32)
        if self.gamma.dim() > 1:
            raise ValueError(f"gamma must be a number or a tensor [B], got shape {list(self.gamma.shape)}")
        if self.gamma.isnan().any() or (self.gamma < 0).any():
            raise ValueError(f"gamma must be at least 0 (nats) and not NaN, got {gamma}")
        self.order = _checked_order(order if proxy is None else _by_its_old_name(proxy))

    def __repr__(self) -> str:
        return f"EntropyBounded(gamma={self.gamma.tolist() if self.gamma.dim() else f'{self.gamma.item():g}'}, order={self.order})"

    @property
    def proxy(self) -> str:
        return self.order

    def check(self, model: MaskedDiffusionLM, prompts: int, gen_length: int, block_length: int) -> None:
        if self.gamma.dim() == 1 and len(self.gamma) != prompts:
            raise ValueError(f"gamma has {len(self.gamma)} values for {prompts} prompts")

    def for_prompt(self, index: int) -> Rule:
        if self.gamma.dim() == 0:
            return self
        one = copy(self)
        one.gamma = self.gamma[index]
        return one

    def plan(self, step: StepPredictions) -> Plan:
        return _entropy_bounded(step, self.order)


class PromptThreshold(Rule):
    """Entropy-bounded with the threshold the model predicts for each prompt: its mode, or a draw when ``sample`` (training).

    order: of commitment; None takes the one the threshold was trained with; ``proxy`` was its name. explore: share of the draws, 0 to 1,
    that are uniform over the bins, whatever the model predicts; the recorded probability is that of the mixture. ValueError for another
    order or share, or one without ``sample``.
    """

    draws_gamma = True
    planned_by = ("order", "sample", "explore")

    def __init__(
        self, order: str | None = None, sample: bool = False, explore: float = 0.0, *, proxy: str | None = None
    ):
        order = order if proxy is None else _by_its_old_name(proxy)
        if not _is_number(explore) or not 0 <= explore <= 1:
            raise ValueError(f"explore must be a share from 0 to 1, got {explore!r}")
        if explore and not sample:
            raise ValueError("explore: only draws explore, set sample=True")
        self.order, self.sample, self.explore = order if order is None else _checked_order(order), sample, explore

    def __repr__(self) -> str:
        options = [f"order={self.order}"] * bool(self.order) + ["sample"] * self.sample
        return f"PromptThreshold({', '.join([*options, *[f'explore={self.explore:g}'] * bool(self.explore)])})"

    @property
    def proxy(self) -> str | None:
        return self.order

    def resolve(self, model: MaskedDiffusionLM) -> Rule:
        return self if self.order else PromptThreshold(model.config.threshold_order, self.sample, self.explore)

    def check(self, model: MaskedDiffusionLM, prompts: int, gen_length: int, block_length: int) -> None:
        if model.threshold is None:
            raise ValueError(
                "the model has no learned threshold: train one (python -m diffpo.train) or use EntropyBounded"
            )

    def thresholds(self, model: MaskedDiffusionLM, first: FirstPass, keys: Tensor, seed: int | Tensor) -> Threshold:
        if model.threshold is None:
            raise ValueError(
                "the model has no learned threshold: train one (python -m diffpo.train) or use EntropyBounded"
            )
        logprob_BG = threshold_logprobs(model, first)
        if self.sample:
            if self.explore:
                uniform_share = self.explore / logprob_BG.shape[1]
                logprob_BG = ((1 - self.explore) * logprob_BG.exp() + uniform_share).log()
            # inverse CDF; the clamp keeps a rounding of the last cumulative sum below 1 from overshooting
            cdf_BG = logprob_BG.exp().cumsum(dim=1)
            draw_B1 = uniform(seed, _GAMMA_DRAW, keys)[:, None].to(cdf_BG)
            index = (cdf_BG <= draw_B1).sum(dim=1).clamp(max=cdf_BG.shape[1] - 1)
        else:
            index = logprob_BG.argmax(dim=1)
        return Threshold(model.threshold.gammas[index], index, logprob_BG.gather(1, index[:, None])[:, 0])

    def plan(self, step: StepPredictions) -> Plan:
        if self.order is None:
            raise ValueError("PromptThreshold() has no order yet: plan with what its resolve(model) returns")
        return _entropy_bounded(step, self.order)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_order(order: str) -> str:
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    return order


def _by_its_old_name(order: str) -> str:
    warnings.warn("proxy is now called order", DeprecationWarning, stacklevel=3)
    return order
