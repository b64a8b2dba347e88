"""How much better each rollout is than the others of its group."""

from typing import Literal

import torch
from torch import Tensor

Advantage = Literal["mean", "std", "best", "rank", "leave_one_out"]
_EPSILON = 1e-4  # of a group's standard deviation
_ROUNDING = 1e-6  # several units in the last place of float32, in which rewards are sums and products


def group_advantage(reward: Tensor, group_size: int, kind: Advantage = "mean") -> Tensor:
    """Advantage [B] of each reward [B] within its group of adjacent rows, in the rewards' dtype.

    "mean": r - mean
    "std": (r - mean) / (the group's standard deviation + 1e-4), of the population: over n, not n - 1 (GRPO, arXiv 2402.03300)
    "best": (r - mean) / the group's largest |r|: a prompt whose right answers take long counts as much as one whose answers are fast
    "rank": the share of the group that a reward beats less the share that beats it, halved: -.5 to .5, whatever the rewards' scale; rewards of
        which one differs from the other by rounding are ties
    "leave_one_out": r less the mean of the others
    A reward that is NaN or infinite has advantage 0 and does not count in its group. Rewards of a group that differ by 1e-6 (1 + |r|) at
    most are equal but for rounding: all their advantages are 0. Published GRPO code adds 1e-4 to the deviation, which keeps the
    advantages of nearly equal rewards small.
    """
    known = reward.isfinite().reshape(-1, group_size)
    reward_UG = reward.double().reshape(-1, group_size).masked_fill(~known, torch.nan)
    lowest, highest = (reward_UG.nan_to_num(nan=nan) for nan in (torch.inf, -torch.inf))
    lowest, highest = lowest.amin(dim=1, keepdim=True), highest.amax(dim=1, keepdim=True)
    # compared, not subtracted from a mean: rounding must not turn equal rewards into a gradient
    rounding = _ROUNDING * (1 + torch.maximum(highest.abs(), lowest.abs()))
    varied = known & (highest - lowest > rounding)
    count = known.sum(dim=1, keepdim=True)
    centred = torch.where(varied, reward_UG - reward_UG.nanmean(dim=1, keepdim=True), 0.0)
    if kind == "leave_one_out":
        centred = centred * count / (count - 1).clamp(min=1)
    if kind == "best":
        centred = centred / torch.maximum(highest.abs(), lowest.abs()).clamp(min=_EPSILON)
    if kind == "rank":
        lead = reward_UG[:, :, None] - reward_UG[:, None, :]
        beaten = (lead > rounding[:, :, None]).sum(dim=2) - (lead < -rounding[:, :, None]).sum(dim=2)
        centred = torch.where(varied, beaten.double() / (2 * count), 0.0)
    if kind == "std":
        deviation = (centred.square().sum(dim=1, keepdim=True) / count.clamp(min=1)).sqrt()
        centred = torch.where(varied, centred / (deviation + _EPSILON), 0.0)
    return centred.flatten().to(reward.dtype)
