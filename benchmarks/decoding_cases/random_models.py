"""Models in LLaDA's format with random weights, whose predictions are spread as a trained model's are.

Weights drawn as for training give nearly the same prediction at every masked position, and nearly uniform ones: a threshold would
commit one token a step, and which one would hang on the last bits. So every projection keeps the scale of its input (standard deviation
1/sqrt(fan-in)), queries and keys are 2.5 times that, so that attention is peaked and masked positions differ, and the head 12 times:
logits with standard deviation 12 over 126,464 tokens give probabilities of the first token from .25 to 1 with about a quarter above
.9, and few so close to 1 that fp32 could not order them. The mask token's row of the head is zero: as a trained model, it never
proposes the mask.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpo.models.transformer import MaskedDiffusionLM, ModelConfig

VOCABULARY, MASK_ID = 126_464, 126_336
_ATTENTION_GAIN, _LOGIT_SCALE = 2.5, 12.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the rest is LLaDA's."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocabulary: int = VOCABULARY

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            rope_theta=500_000.0,
            mask_token_id=min(MASK_ID, self.vocabulary - 1),
        )


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, vocabulary=1000),
    "small": Shape(256, 768, 4, 4),
    "medium": Shape(512, 1536, 6, 8),
    "llada-8b": Shape(4096, 12288, 32, 32),
}


@torch.no_grad()
def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> MaskedDiffusionLM:
    """Drawn where it is to stand and in its own dtype: the host never holds a copy."""
    with torch.device("meta"):
        model = MaskedDiffusionLM(shape.config)
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, deviation(name, parameter), generator=generator)
    model.lm_head.weight[model.mask_id] = 0.0
    return model


def deviation(name: str, weight: Tensor) -> float:
    if name.startswith("embed_tokens"):
        return 1.0
    gains = {"q_proj": _ATTENTION_GAIN, "k_proj": _ATTENTION_GAIN, "lm_head": _LOGIT_SCALE}
    gain = next((gain for part, gain in gains.items() if part in name), 1.0)
    return gain / math.sqrt(weight.shape[1])


def random_prompts(model: MaskedDiffusionLM, batch: int, length: int, seed: int) -> Tensor:
    """int64 [batch, length], no mask among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.mask_id, (batch, length), generator=generator).to(model.device)
