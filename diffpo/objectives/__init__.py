"""RL objectives, one file each: a likelihood estimator, a loss and its defaults; selected by name."""

from diffpo.objectives import d1, diffpo
from diffpo.objectives.objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {"diffpo": diffpo.Diffpo, "d1": d1.D1}

__all__ = ["OBJECTIVES", "Objective"]
