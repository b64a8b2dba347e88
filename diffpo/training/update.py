"""The gradient of a loss over a whole batch, in the memory of one part of it. The only place that knows micro-batches.

A loss depends on the weights through the scores alone. So, with parts of at most ``tokens_at_once`` tokens of network input:

    one part               score and differentiate at once
    a separable loss       part by part: the gradient of a token's score depends on no other score
    any other, by replay   score all without a gradient, g = d loss / d scores, then each part again with backward(g of the part)

In each case the loss sees the whole batch, so its normalisers are the whole batch's and the parts change nothing but rounding.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffpo.likelihood.latents import Latents, Scores
from diffpo.likelihood.score import Plan
from diffpo.models.sharding import refuse_unsharded_parameters, reshard
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives.objective import Batch, Loss, Objective

LossOf = Callable[[Scores, Scores], Loss]  # of new and old scores


def accumulate_gradient(
    model: MaskedDiffusionLM,
    objective: Objective,
    batch: Batch,
    latents: Latents,
    signal: Tensor,
    old: Scores | None,
    reference: Scores | None,
    tokens_at_once: int | None = None,
) -> tuple[Loss, Scores]:
    """Add the gradient of the objective's loss to the model's; returns the loss and the model's scores, both detached.

    old: None where the model still is the old one; its own scores then serve. ValueError for a part too small for one sequence, and for
    a model of which some trainable parameters are sharded and others are not.
    """
    refuse_unsharded_parameters(model)
    plan = Plan(model, batch.trajectory, latents, tokens_at_once)
    gradient_of = _at_once if len(plan) <= 1 else _part_by_part if objective.separable else _replayed
    loss, new = gradient_of(model, plan, old, lambda new, old: objective.loss(batch, signal, new, old, reference))
    reshard(model)  # for the optimizer, where the last pass was one without a gradient
    return Loss(loss.value.detach(), loss.metrics), new.detach()


def _at_once(model: MaskedDiffusionLM, plan: Plan, old: Scores | None, loss_of: LossOf) -> tuple[Loss, Scores]:
    new = plan.evaluate(model)
    loss = loss_of(new, old or new.detach())
    _backward(loss.value)
    return loss, new


def _part_by_part(model: MaskedDiffusionLM, plan: Plan, old: Scores | None, loss_of: LossOf) -> tuple[Loss, Scores]:
    known = old or plan.empty()  # what is not scored yet has no part in this part's gradient
    for part in plan:
        new = part.filled(known, *part.evaluate(model))
        _backward(loss_of(new, old or new.detach()).value)
        known = new.detach()
    return loss_of(known, old or known), known


def _replayed(model: MaskedDiffusionLM, plan: Plan, old: Scores | None, loss_of: LossOf) -> tuple[Loss, Scores]:
    with torch.no_grad():
        known = plan.evaluate(model)
    actions = {name: value.requires_grad_() for name, value in known.actions.items()}
    new = replace(known, value=known.value.requires_grad_(), actions=actions)
    loss = loss_of(new, old or new.detach())
    tokens, *drawn = torch.autograd.grad(loss.value, [new.value, *actions.values()], allow_unused=True)
    slopes = replace(new, value=tokens, actions=dict(zip(actions, drawn, strict=True)))
    for part in plan:
        # a score without a slope plays no part in the loss, one without a graph is a frozen model's
        pairs = [
            (value, slope)
            for value, slope in zip(part.evaluate(model), part.of(slopes), strict=True)
            if value is not None and slope is not None and value.requires_grad
        ]
        if pairs:
            torch.autograd.backward([value for value, _ in pairs], [slope for _, slope in pairs])
    return loss, new


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # of a frozen model's part nothing is
        loss.backward()
