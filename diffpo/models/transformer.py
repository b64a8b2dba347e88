"""One bidirectional transformer for tiny and large masked diffusion language models.

Shapes: B rows, L positions, S positions of the whole sequence where only L of them are computed, D hidden size, H heads, K key/value
heads, d head size, N requested positions, V vocabulary.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffpo.models.attention import Padding, attend, check_mask, left_padding
from diffpo.models.head import Head, logprobs
from diffpo.models.layout import Full
from diffpo.models.model_config import ModelConfig, Order, Reads
from diffpo.models.modules import Linear, RMSNorm
from diffpo.models.saving import save_checkpoint
from diffpo.models.sharding import call, reshard
from diffpo.models.special_tokens import end_ids
from diffpo.models.threshold import ThresholdPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from diffpo.models.checkpoints import Source

T = TypeVar("T")

# what a layer does with the keys and values [B, L, K, d] it computed: those [B, S, K, d] to attend to
Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Cache(Protocol):
    """Keys and values of a sequence of S = ``width`` positions, of which a pass computes those at ``columns`` [B, L], ascending."""

    width: int
    columns: Tensor

    def store(self, layer: int, keys_BLKd: Tensor, values_BLKd: Tensor) -> tuple[Tensor, Tensor]: ...


class Attention(nn.Module):
    """Bidirectional multi-head attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.key_value_heads, config.head_dim
        bias = config.attention_bias
        self.q_proj = Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x_BLD: Tensor, rotation: tuple[Tensor, Tensor], visible: Padding | Tensor | None, store: Store | None
    ) -> Tensor:
        B, L, _ = x_BLD.shape
        q_BLHd = rotate(self.q_proj(x_BLD).view(B, L, self.heads, self.head_dim), rotation)
        k_BLKd = rotate(self.k_proj(x_BLD).view(B, L, self.kv_heads, self.head_dim), rotation)
        v_BLKd = self.v_proj(x_BLD).view(B, L, self.kv_heads, self.head_dim)
        k_BSKd, v_BSKd = (k_BLKd, v_BLKd) if store is None else store(k_BLKd, v_BLKd)
        return self.o_proj(attend(q_BLHd, k_BSKd, v_BSKd, visible).reshape(B, L, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Block(nn.Module):
    """Pre-norm transformer block.

    recomputed: of what a backward pass needs only the block's input is kept, and the rest is computed again there (activation
    checkpointing). It is done within the block's own forward, so that ``fully_shard`` and torch.compile lie around it.
    """

    recomputed = False

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x_BLD: Tensor, rotation: tuple[Tensor, Tensor], visible: Padding | Tensor | None, store: Store | None
    ) -> Tensor:
        if self.recomputed and torch.is_grad_enabled():
            # nothing in a block is random
            arguments = (x_BLD, rotation, visible, store)
            return checkpoint(self._pass, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self._pass(x_BLD, rotation, visible, store)

    def _pass(
        self, x_BLD: Tensor, rotation: tuple[Tensor, Tensor], visible: Padding | Tensor | None, store: Store | None
    ) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), rotation, visible, store)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class MaskedDiffusionLM(nn.Module):
    """Predicts the masked tokens of a sequence. The forward pass returns hidden states; ``head`` turns chosen rows into logits.

    Everything that needs the head or the threshold, with a gradient, is computed inside of a forward, by ``read``: there the weights of a
    sharded model are whole. ``layout``: how prompt and completion lie in an input. ``tokenizer`` is a transformers tokenizer or None;
    ``threshold`` is the prompt-dependent threshold policy or None; ``source`` says what it was loaded from (name, hub revision), or is
    None; ``generation_eos_ids`` are those of its generation_config.json; ``compute_dtype`` is the dtype of its activations, or None for
    that of its embedding.
    """

    def __init__(self, config: ModelConfig, tokenizer: "PreTrainedTokenizerBase | None" = None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.source: Source | None = None
        self.layout = Full()
        self.generation_eos_ids: tuple[int, ...] = ()
        self.compute_dtype: torch.dtype | None = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.threshold = (
            ThresholdPolicy(config.hidden_size, config.threshold_gammas, config.threshold_reads)
            if config.threshold_gammas
            else None
        )

    def _initialise(self) -> None:
        """Normal(0, .02), with the projections that write into the residual stream scaled by 1/sqrt(2 layers) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def mask_id(self) -> int:
        return self.config.mask_token_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion, wherever they are declared: config, generation_config.json, tokenizer (EOS), chat template (end
        of a turn). The first fills what an early end leaves open."""
        ids = end_ids(self.config.eos_token_id, self.generation_eos_ids, self.tokenizer)
        return tuple(index for index in ids if index < self.config.vocab_size and index != self.mask_id)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; weights that are trained may be kept in a wider one."""
        return self.compute_dtype or self.embed_tokens.weight.dtype

    def recompute_activations(self, on: bool = True) -> None:
        """Whether a pass with a gradient keeps the input of each block alone: less memory, one more forward pass, the same gradient."""
        for layer in self.layers:
            layer.recomputed = on  # type: ignore[assignment]  # a module's attribute may be any

    def add_threshold(self, gammas: tuple[float, ...], order: Order = "entropy", reads: Reads = "both") -> None:
        """Give the model a fresh, uniform threshold policy over the bins ``gammas`` (nats), to be used with ``order``; reads: what it is
        read from, see ``ThresholdPolicy``."""
        if reshard(self):
            raise ValueError("add_threshold: the model is sharded; give it a threshold first, then call fully_shard")
        policy = ThresholdPolicy(self.config.hidden_size, gammas, reads)
        policy.to(self.device, torch.promote_types(self.dtype, torch.float32))  # it is there to be trained
        self.config = replace(self.config, threshold_gammas=tuple(gammas), threshold_order=order, threshold_reads=reads)
        self.threshold = policy

    def forward(
        self,
        tokens_BL: Tensor,
        attention_mask: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        read: Callable[[Tensor], T] | None = None,
    ) -> Tensor | T:
        """Hidden states [B, L, D] whose row i predicts position i (the shift, if any, is already applied), or ``read`` of them.

        tokens_BL: int64 [B, L], masked positions hold ``mask_id``
        attention_mask: [B, L], nonzero where a token is real; padding may stand anywhere, is never attended to, and does not count in
            positions. Or bool [B, L, S] or [B, 1, L, S], the keys that each token sees, at least one. None: nothing is padding.
        padding: int64 [B] instead of a mask, how many positions on the left are padding: the faster attention kernels take that
        positions: int64 [B, L] or [1, L], where each token stands, from 0; several may share one. None: one after the other, without the
            padding.
        cache: keys and values of the rest of the sequence; ``padding`` then counts in the whole sequence, and there is no mask of
            padding. With a shift the first column has no predecessor among those computed, and its row means nothing unless it is the
            first token.
        read: f(hidden states), called where the weights of the head and the threshold are whole; returned is what it returns.
        """
        S = tokens_BL.shape[1] if cache is None else cache.width
        self._check_positions(tokens_BL, S, positions)
        self._check_mask(attention_mask, tokens_BL, S, padding, cache)
        columns_BL = torch.arange(S, device=tokens_BL.device)[None] if cache is None else cache.columns
        real_BL, positions_BL = None, columns_BL
        keys: Padding | Tensor | None = None
        if attention_mask is not None and attention_mask.dim() != 2:
            keys = attention_mask
        elif attention_mask is not None:
            real_BL = attention_mask.bool()
            keys, positions_BL = Padding(real_BL[:, None, None, :]), (real_BL.long().cumsum(1) - 1).clamp(min=0)
        elif padding is not None:
            real_BL = columns_BL >= padding[:, None]
            keys = left_padding(padding, tokens_BL.shape[1], S, self.dtype)
            positions_BL = (columns_BL - padding[:, None]).clamp(min=0)
        if positions is not None:
            positions_BL = positions
        rotation = rotary_angles(positions_BL, self.config.head_dim, self.config.rope_theta)
        x_BLD = self.embed_tokens(tokens_BL)
        if self.compute_dtype is not None:
            x_BLD = x_BLD.to(self.compute_dtype)
        for number, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, rotation, keys, None if cache is None else partial(cache.store, number))
        hidden_BLD = self.norm(x_BLD)
        if self.config.logit_shift:
            hidden_BLD = hidden_BLD.gather(1, previous_position(tokens_BL, real_BL)[..., None].expand_as(hidden_BLD))
        return hidden_BLD if read is None else read(hidden_BLD)

    def _check_positions(self, tokens_BL: Tensor, S: int, positions: Tensor | None) -> None:
        B, L = tokens_BL.shape
        if positions is not None and (positions.dtype != torch.int64 or positions.shape not in ((B, L), (1, L))):
            raise ValueError(
                f"positions must be int64 [{B}, {L}] or [1, {L}], got {positions.dtype} {list(positions.shape)}"
            )
        longest = S if positions is None else int(positions.max()) + 1
        if self.config.max_position_embeddings < longest:
            raise ValueError(
                f"sequence of {longest} tokens exceeds max_position_embeddings {self.config.max_position_embeddings}"
            )

    def _check_mask(
        self, mask: Tensor | None, tokens_BL: Tensor, S: int, padding: Tensor | None, cache: Cache | None
    ) -> None:
        if mask is None:
            return
        if padding is not None:
            raise ValueError("attention_mask and padding exclude each other: give one of them")
        B, L = tokens_BL.shape
        check_mask(mask, B, L, S)
        if mask.dim() == 2 and cache is not None:
            raise ValueError("attention_mask must be [B, L, S] with a cache; say with padding what is padding")
        if mask.dim() != 2 and self.config.logit_shift:
            raise ValueError(
                "attention_mask must be [B, L] for a model with logit_shift: another one does not say which token precedes which"
            )

    def head(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of the requested rows. Of a sharded model with a gradient: only in ``read`` of a forward."""
        return call(self.lm_head, hidden_ND)

    def logprobs(
        self,
        hidden_MD: Tensor,
        token_N: Tensor,
        temperature: float = 1.0,
        banned_ids: Sequence[int] = (),
        rows: Tensor | None = None,
    ) -> Tensor:
        """Log-probs fp32 [N] (nats) of tokens int64 [N] without forming logits, as ``diffpo_kernels.linear_logprob``; differentiable.

        To be called in ``read`` of a forward. ValueError for an adapter on the head that is no change of its weight.
        """
        targets = {"target": token_N, "temperature": temperature, "banned_ids": banned_ids, "rows": rows}
        return logprobs(self.lm_head, hidden_MD, targets)

    def logits(self, tokens_BL: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of every position: for tests and small models only."""
        return self(tokens_BL, attention_mask, read=self.head)

    def save(self, folder: str | os.PathLike) -> None:
        """Write config.json, model.safetensors and the tokenizer; ``diffpo.load(folder)`` reads them back.

        Adapters are merged into the weights of the checkpoint; the model keeps them. Of a sharded model, one process writes: all must
        call this.
        """
        save_checkpoint(self, folder)


def previous_position(tokens_BL: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int64 [B, L]: the nearest real position before each one, or itself where there is none."""
    position_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device).expand_as(tokens_BL)
    real_BL = position_BL if attention_mask is None else torch.where(attention_mask, position_BL, -1)
    previous_BL = torch.cat([torch.full_like(real_BL[:, :1], -1), real_BL.cummax(dim=1).values[:, :-1]], dim=1)
    return torch.where(previous_BL < 0, position_BL, previous_BL)


def rotary_angles(positions_BL: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [B, L, 1, head_dim], of the rotary embedding, half-rotation layout."""
    inverse_frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions_BL.device).float() / head_dim)
    angles_BLd = positions_BL[..., None].float() * inverse_frequency
    angles_BLd = torch.cat([angles_BLd, angles_BLd], dim=-1)[:, :, None]
    return angles_BLd.cos(), angles_BLd.sin()


def rotate(x_BLHd: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate in fp32 or wider, as the published models do: cos and sin rounded to bf16 would put an error of 2^-9 on every key."""
    cos, sin = rotation
    x = x_BLHd.to(torch.promote_types(x_BLHd.dtype, torch.float32))
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BLHd.dtype)
