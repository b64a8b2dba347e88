"""The gradient of a loss over a whole batch, in the memory of one part of it. The only place that knows micro-batches and processes.

A loss depends on the weights through the scores alone. So, with parts of at most ``tokens_at_once`` tokens of network input:

    one part               score and differentiate at once
    a separable loss       part by part: the gradient of a token's score depends on no other score
    any other, by replay   score all without a gradient, g = d loss / d scores, then each part again with backward(g of the part)

In each case the loss sees the whole batch, so its normalisers are the whole batch's and the parts change nothing but rounding. Of several
processes each scores and differentiates some of the parts. Scores, then gradients are summed over the processes.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffpo.likelihood.latents import Latents, Scores
from diffpo.likelihood.score import Plan
from diffpo.models.sharding import refuse_unsharded_parameters, reshard
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives.objective import Batch, Loss, Objective
from diffpo.training.distributed import ALONE, World
from diffpo.trajectory import Trajectory

_BUCKET = 1 << 26  # gradients that are summed together
LossOf = Callable[[Scores, Scores], Loss]  # of new and old scores


def scored(
    model: MaskedDiffusionLM,
    trajectory: Trajectory,
    latents: Latents,
    tokens_at_once: int | None = None,
    world: World = ALONE,
) -> Scores:
    """As `score`, by all processes together, without a gradient."""
    with torch.no_grad():
        plan = _plan(model, trajectory, latents, tokens_at_once, world)
        return _summed(world.agreed(lambda: plan.evaluate(model)), world)


def accumulate_gradient(
    model: MaskedDiffusionLM,
    objective: Objective,
    batch: Batch,
    latents: Latents,
    signal: Tensor,
    old: Scores | None,
    reference: Scores | None,
    tokens_at_once: int | None = None,
    world: World = ALONE,
) -> tuple[Loss, Scores]:
    """Add the gradient of the objective's loss to the model's; returns the loss and the model's scores, both detached.

    old: None where the model still is the old one; its own scores then serve. world: the processes that share the work, each with the
    same arguments; the model then had no gradients before. ValueError for a part too small for one sequence, and for a model of which
    some trainable parameters are sharded and others are not.
    """
    refuse_unsharded_parameters(model)
    plan = _plan(model, batch.trajectory, latents, tokens_at_once, world)
    whole = world.size == 1 and len(plan) <= 1
    gradient_of = _at_once if whole else _part_by_part if objective.separable else _replayed
    loss, new = gradient_of(
        model, plan, old, lambda new, old: objective.loss(batch, signal, new, old, reference), world
    )
    if not reshard(model):  # sharded gradients are reduced in the backward pass
        sum_gradients(model.parameters(), world)
    return Loss(loss.value.detach(), loss.metrics), new.detach()


def _plan(
    model: MaskedDiffusionLM, trajectory: Trajectory, latents: Latents, tokens_at_once: int | None, world: World
) -> Plan:
    in_step = world.size > 1 and reshard(model)  # each pass of a sharded model takes all processes
    return Plan(model, trajectory, latents, tokens_at_once, world.rank, world.size, in_step)


def _at_once(
    model: MaskedDiffusionLM, plan: Plan, old: Scores | None, loss_of: LossOf, world: World
) -> tuple[Loss, Scores]:
    new = plan.evaluate(model)
    loss = loss_of(new, old or new.detach())
    _backward(loss.value)
    return loss, new


def _part_by_part(
    model: MaskedDiffusionLM, plan: Plan, old: Scores | None, loss_of: LossOf, world: World
) -> tuple[Loss, Scores]:
    scale = _scale(model, world)

    def differentiate() -> Scores:
        own = plan.empty()
        others = old or own  # have no part in the gradient of a part
        for part in plan:
            values = part.evaluate(model)
            new = part.filled(others, *values)
            _backward(loss_of(new, old or new.detach()).value * scale)
            own = part.filled(own, *values).detach()
        return own

    new = _summed(world.agreed(differentiate), world)
    return loss_of(new, old or new), new


def _replayed(
    model: MaskedDiffusionLM, plan: Plan, old: Scores | None, loss_of: LossOf, world: World
) -> tuple[Loss, Scores]:
    with torch.no_grad():
        known = _summed(world.agreed(lambda: plan.evaluate(model)), world)
    actions = {name: value.requires_grad_() for name, value in known.actions.items()}
    new = replace(known, value=known.value.requires_grad_(), actions=actions)
    loss = loss_of(new, old or new.detach())
    scale = _scale(model, world)
    tokens, *drawn = torch.autograd.grad(loss.value * scale, [new.value, *actions.values()], allow_unused=True)
    slopes = replace(new, value=tokens, actions=dict(zip(actions, drawn, strict=True)))

    def differentiate() -> None:
        for part in plan:
            # a score without a slope plays no part in the loss, one without a graph is a frozen model's
            pairs = [
                (value, slope)
                for value, slope in zip(part.evaluate(model), part.of(slopes), strict=True)
                if value is not None and slope is not None and value.requires_grad
            ]
            if pairs:
                torch.autograd.backward([value for value, _ in pairs], [slope for _, slope in pairs])

    world.agreed(differentiate)
    return loss, new


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # of a frozen model's part nothing is
        loss.backward()


def _scale(model: MaskedDiffusionLM, world: World) -> int:
    """Of a loss, so that gradients are sums over the processes: those of shards come as means."""
    return world.size if world.size > 1 and reshard(model) else 1


def _summed(own: Scores, world: World) -> Scores:
    """The scores of all processes, each of which has zeros where another one scores."""
    if world.size == 1:
        return own
    values = [own.value, *own.actions.values()]
    flat = world.sum_(torch.cat(values).double())  # a process without a part does not know the model's dtype
    flat = flat.to(own.value.dtype)
    value, *actions = flat.split([len(part) for part in values])
    return replace(own, value=value, actions=dict(zip(own.actions, actions, strict=True)))


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sum the gradients over the processes, in fp32, some at a time; one that no process has stays None."""
    if world.size == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    has_one = world.sum_(torch.tensor([parameter.grad is not None for parameter in trained]).float())
    bucket: list[nn.Parameter] = []
    with_one = [parameter for parameter, count in zip(trained, has_one.tolist(), strict=True) if count]
    for parameter in with_one:
        bucket.append(parameter)
        if sum(other.numel() for other in bucket) >= _BUCKET or parameter is with_one[-1]:
            _sum_bucket(bucket, world)
            bucket = []


def _sum_bucket(bucket: list[nn.Parameter], world: World) -> None:
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in bucket])
    parts = world.sum_(flat).split([parameter.numel() for parameter in bucket])
    for parameter, part in zip(bucket, parts, strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
