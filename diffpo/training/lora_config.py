"""The settings of LoRA in a training run."""

from diffpo.config import Config, Count, field_validator, model_validator


class LoraConfig(Config):
    """Trains small adapters instead of the model's weights (docs/large-models.md). Needs peft: pip install 'diffpo[lora]'."""

    rank: Count | None = None
    """of the adapters; default: no adapters, all weights are trained"""
    alpha: Count | None = None
    """what the adapters add is scaled by alpha / rank; default: the rank, a scale of 1"""
    targets: tuple[str, ...] | None = None
    """linear layers that get one, by the end of their names, as here or in the published files; default: all linear layers of the blocks,
    for LLaDA q_proj k_proj v_proj attn_out ff_proj up_proj ff_out, for Dream q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"""

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets is not None and (not targets or not all(targets)):
            raise ValueError("give the name of at least one layer, or leave it out for all linear layers")
        return targets

    @model_validator(mode="after")
    def _of_adapters(self) -> "LoraConfig":
        for name in ("alpha", "targets"):
            if self.rank is None and getattr(self, name) is not None:
                raise ValueError(f"{name}: there are no adapters: give lora.rank, for instance 64")
        return self
