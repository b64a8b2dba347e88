"""d1 / diffu-GRPO (arXiv 2504.12216): the mean-field likelihood, with randomly masked prompts, in a clipped token-level loss.

    rho_k = pi_theta(o_k | c', z_0) / pi_old(o_k | c', z_0)
    J     = E mean over the batch's tokens of  min( rho_k A_i, clip(rho_k, 1 - eps, 1 + eps) A_i )  -  beta KL(pi_theta || pi_ref)

c' is the prompt with each token masked independently with probability .15, drawn anew for each inner update and shared by a
group, theta, old and reference. This is DiFFPO's loss with m = 1, so only the settings differ.
"""

from typing import Any, ClassVar

from diffpo.objectives.diffpo import Diffpo


class D1(Diffpo):
    """d1's published settings."""

    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "algorithm": {
            "m": 1,
            "importance_correction": False,
            "mode": "model",
            "clip": 0.5,
            "kl_coefficient": 0.04,
            "inner_updates": 12,
            "fresh_views": True,
            "group_size": 6,
            "normalisation": "token",
            "prompt_mask_probability": 0.15,
        },
        "rollout": {"speed_exponent": 0.0},  # correctness alone
    }
