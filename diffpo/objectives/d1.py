"""d1 / diffu-GRPO (arXiv 2504.12216): the mean-field likelihood, with randomly masked prompts, in a clipped token-level loss.

    rho_k = pi_theta(o_k | c', z_0) / pi_old(o_k | c', z_0)
    J     = E mean over the batch's tokens of  min( rho_k A_i, clip(rho_k, 1 - eps, 1 + eps) A_i )  -  beta KL(pi_theta || pi_ref)

c' is the prompt with each token masked independently with probability .15, drawn anew for each inner update and shared by a group,
theta, old and reference.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch

from diffpo.decoding.trajectory import Trajectory
from diffpo.keyed_random import uniform
from diffpo.objectives.diffpo import Diffpo
from diffpo.objectives.objective import View


class D1(Diffpo):
    """DiFFPO's loss with m = 1, no importance correction and token-level normalisation; only the view differs in kind."""

    defaults: ClassVar[dict[str, Any]] = {
        "m": 1,
        "importance_correction": False,
        "mode": "model",
        "clip": 0.5,
        "kl_coefficient": 0.04,
        "inner_updates": 12,
        "group_size": 6,
        "normalisation": "token",
        "prompt_mask_probability": 0.15,
    }

    def view(self, trajectory: Trajectory, *key: int) -> View:
        group = torch.arange(len(trajectory), device=trajectory.tokens.device)[:, None] // self.config.group_size
        position = torch.arange(trajectory.prompt_ids.shape[1], device=group.device)
        masked = (uniform(*key, group, position) < self.config.prompt_mask_probability) & trajectory.prompt_mask
        prompt_ids = trajectory.prompt_ids.masked_fill(masked, trajectory.mask_id)
        return View(replace(trajectory, prompt_ids=prompt_ids), [0])
