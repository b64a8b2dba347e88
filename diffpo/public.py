"""What ``import diffpo`` offers, loaded when it is first asked for."""

from diffpo.decoding.engine import Engine
from diffpo.decoding.generation import Generation, generate, stream
from diffpo.decoding.options import DecodingOptions, Request
from diffpo.decoding.rules import (
    ConfidenceThreshold,
    EntropyBounded,
    FactorThreshold,
    FixedSchedule,
    PromptThreshold,
    Rule,
)
from diffpo.likelihood.mean_field import trajectory_logprobs
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM, ModelConfig
from diffpo.tasks.grading import grade
from diffpo.tasks.task import Grade
from diffpo.trajectory import Trajectory

__all__ = [
    "ConfidenceThreshold",
    "DecodingOptions",
    "Engine",
    "EntropyBounded",
    "FactorThreshold",
    "FixedSchedule",
    "Generation",
    "Grade",
    "MaskedDiffusionLM",
    "ModelConfig",
    "PromptThreshold",
    "Request",
    "Rule",
    "Trajectory",
    "generate",
    "grade",
    "load",
    "stream",
    "trajectory_logprobs",
]
