"""The evidence lower bound and its relatives: tokens scored from randomly masked completions, with complements.

    l uniform in {0, .., L}, exactly l of the L positions masked:   E_l = (L + 1) / l  sum_{k masked} log p(o_k | latent)
    and its complement, the other L - l positions masked, with (L + 1) / (L - l)

Half the sum of both has the expectation of the evidence lower bound of the whole completion (l = 0 scores nothing and has no latent). Source:
LLaDA (arXiv 2502.09992), equation 6, with uniform l; coupled with its complement as ESPO's code does.
"""

import torch

from diffpo.keyed_random import uniform
from diffpo.likelihood.latents import Latents
from diffpo.trajectory import Trajectory

_COUNT, _ORDER = 0, 1  # purposes in the random key


def random_masks(trajectory: Trajectory, pairs: int, *key: int) -> Latents:
    """``pairs`` random masks and their complements for each rollout; draws are keyed by ``key`` and the rollout's own key.

    All L positions take part, also those behind the first EOS. weight: half the bound's coefficient, divided by ``pairs``.
    """
    B, L = trajectory.tokens.shape
    pair, rollout = torch.arange(pairs, device=trajectory.key.device)[:, None], trajectory.key
    position = torch.arange(L, device=rollout.device)
    count = (uniform(*key, _COUNT, pair, rollout) * (L + 1)).long()  # [pairs, B]
    order = uniform(*key, _ORDER, pair[..., None], rollout[:, None], position).argsort(dim=-1).argsort(dim=-1)
    first = order < count[..., None]  # [pairs, B, L]
    masked = torch.stack([first, ~first]).flatten(0, 2)
    size = torch.stack([count, L - count]).flatten()
    row = torch.arange(B, device=rollout.device).repeat(2 * pairs)
    weight = masked * ((L + 1) / size.clamp(min=1) / (2 * pairs))[:, None]
    kept = size > 0
    return Latents(row[kept], masked[kept], weight[kept].float())
