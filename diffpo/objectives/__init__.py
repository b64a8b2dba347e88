"""RL algorithms, one file each: settings, latents, signal and loss; selected by name."""

from diffpo.objectives import d1, diffpo, espo, tracerl
from diffpo.objectives.objective import AlgorithmConfig, Batch, Loss, Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "diffpo": diffpo.Diffpo,
    "d1": d1.D1,
    "espo": espo.Espo,
    "tracerl": tracerl.TraceRL,
}

__all__ = ["OBJECTIVES", "AlgorithmConfig", "Batch", "Loss", "Objective"]
