"""The settings of decoding that the commands share, and what they say to ``diffpo.decoding.generation.stream``."""

from typing import Any, ClassVar, Literal

from diffpo.config import Config, Field, Nats, model_validator
from diffpo.decoding.rules import (
    ConfidenceThreshold,
    EntropyBounded,
    FactorThreshold,
    FixedSchedule,
    PromptThreshold,
    Rule,
)
from diffpo.models.transformer import MaskedDiffusionLM

RuleName = Literal["auto", "eb", "confidence", "factor", "fixed", "learned"]
_OF_RULE = {
    "auto": {"gamma", "order"},
    "eb": {"gamma", "order"},
    "confidence": {"p"},
    "factor": {"factor"},
    "fixed": {"steps"},
    "learned": {"order"},
}
_DEFAULT_GAMMA = 0.1


class RuleConfig(Config):
    """Which tokens are committed in a step. A setting of another rule than the chosen one is an error."""

    renamed: ClassVar[dict[str, str]] = {"proxy": "order"}

    rule: RuleName = "auto"
    """which tokens are committed in a step: entropy-bounded (gamma, order), confidence (p), factor, fixed (steps) or the threshold that
    the model has learned (order); auto: learned where the model has a threshold and no gamma is given, otherwise eb"""
    gamma: Nats | None = None
    """of eb, nats; default 0.1"""
    order: Literal["entropy", "confidence", "margin"] | None = None
    """of commitment, of eb (default entropy) and learned (default the one it was trained with)"""
    p: float | None = Field(None, ge=0, le=1)
    """of confidence; default 0.9"""
    factor: Nats | None = None
    """of factor; must be given"""
    steps: int | None = Field(None, gt=0)
    """of fixed"""

    @model_validator(mode="after")
    def _settings_that_apply(self) -> "RuleConfig":
        for name in ("gamma", "order", "p", "factor", "steps"):
            if getattr(self, name) is not None and name not in _OF_RULE[self.rule]:
                owners = " or ".join(rule for rule, names in _OF_RULE.items() if name in names and rule != "auto")
                raise ValueError(
                    f"{name}: is a setting of rule {owners}, the rule is {self.rule}: set rule to {owners}, or leave {name} out"
                )
        if self.rule == "factor" and self.factor is None:
            raise ValueError("factor: must be given for rule factor, for instance 1")
        return self

    def chosen(self, has_threshold: bool, otherwise: Literal["eb", "fixed"] = "eb") -> RuleName:
        """The rule; for ``auto`` the learned threshold where there is one and no gamma is given, eb where a setting of it is, or ``otherwise``."""
        if self.rule != "auto":
            return self.rule
        if has_threshold and self.gamma is None:
            return "learned"
        return otherwise if self.gamma is None and self.order is None else "eb"

    def commit_rule(self, model: MaskedDiffusionLM, gen_length: int) -> Rule:
        """The rule that the settings name; ``fixed`` without steps commits one token a step."""
        match self.chosen(model.threshold is not None):
            case "eb":
                gamma = _DEFAULT_GAMMA if self.gamma is None else self.gamma
                return EntropyBounded(gamma, self.order or "entropy")
            case "confidence":
                return ConfidenceThreshold() if self.p is None else ConfidenceThreshold(self.p)
            case "factor":
                assert self.factor is not None  # see above
                return FactorThreshold(self.factor)
            case "fixed":
                return FixedSchedule(self.steps or gen_length)
            case _:
                return PromptThreshold(self.order)


class DecodingConfig(RuleConfig):
    """How completions are decoded."""

    batch_size: int = Field(8, gt=0)
    """prompts decoded together; it does not change the results"""
    cache: Literal["none", "prefix", "dual"] = "none"
    """keys and values kept between refreshes, an approximation: of what stands before the active block, or on both sides of it"""
    cache_refresh: int | None = Field(None, gt=0)
    """of cache: steps between exact passes within a block; default only at each block's start"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of the weights; default as stored"""

    @model_validator(mode="after")
    def _a_cache_to_refresh(self) -> "DecodingConfig":
        if self.cache_refresh is not None and self.cache == "none":
            raise ValueError("cache_refresh: nothing is kept without a cache: add --cache prefix or --cache dual")
        return self

    def stream_options(self) -> dict[str, Any]:
        """What ``stream`` takes beside prompts, lengths and rule."""
        return {"batch_size": self.batch_size, "cache": self.cache, "cache_refresh": self.cache_refresh}
