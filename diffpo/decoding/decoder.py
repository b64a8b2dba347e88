"""The denoising loop. Every row keeps its own block, threshold and NFE; a finished row leaves the batch.

Shapes: B rows, A rows still active, P prompt positions, L completion positions, N masked positions of the active blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffpo.decoding.rules import Rule, StepPredictions
from diffpo.decoding.trajectory import Trajectory
from diffpo.keyed_random import uniform
from diffpo.models.shared_pass import completion_hidden
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo_kernels import entropy_bounded_commit_, row_statistics

_TOKEN_DRAW = 0  # purpose in the random key; the rules' own purposes start at 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are proposed: temperature (0 = argmax), guidance scale (0 = none) and the seed of the draws."""

    temperature: float = 0.0
    cfg_scale: float = 0.0
    seed: int = 0


@torch.no_grad()
def denoise(
    model: MaskedDiffusionLM,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    row_ids: Tensor,
    gen_length: int,
    block_length: int,
    rule: Rule,
    sampling: Sampling,
) -> Trajectory:
    """Decode B left-padded prompts [B, P] to L = gen_length tokens each.

    Each step: predict the masked positions of every active row's block, let the rule choose, commit. A row moves to its
    next block when the current one is full, and ends when all is committed (or its EOS is final, see ``Rule``). Random
    draws are keyed by (seed, row id, step, position), so a row's result does not depend on the batch it is in.
    """
    B, L, mask_id, device = len(prompt_ids), gen_length, model.mask_id, prompt_ids.device
    tokens = torch.full((B, L), mask_id, device=device)
    commit_step, logprob = torch.zeros_like(tokens), torch.zeros(B, L, device=device)
    entropy = torch.zeros_like(logprob)
    nfe, block, block_step = (torch.zeros(B, dtype=torch.int64, device=device) for _ in range(3))
    threshold = None
    active = torch.arange(B, device=device)
    while len(active):
        nfe[active] += 1
        start = block[active] * block_length
        candidates = _window(start, block_length, L) & (tokens[active] == mask_id)
        hidden_ALD, unconditional_ALD = _hidden(
            model, prompt_ids[active], prompt_mask[active], tokens[active], sampling
        )
        if threshold is None:
            threshold = rule.thresholds(model, hidden_ALD, row_ids, sampling.seed)
        keys = (row_ids[active, None], nfe[active, None], torch.arange(L, device=device))
        proposal, proposal_logprob, step = _predict(model, hidden_ALD, unconditional_ALD, candidates, keys, sampling)
        step = StepPredictions(candidates, **step, block_length=block_length, blocks=L // block_length,
                               block_step=block_step[active], gamma=threshold.gamma[active])  # fmt: skip
        plan, rows = rule.plan(step), tokens[active]
        committed = entropy_bounded_commit_(rows, proposal, plan.proxy, plan.cost, plan.budget, mask_id,
                                            start, start + block_length, rule=plan.rule, max_window=block_length)  # fmt: skip
        tokens[active] = rows
        commit_step[active] += committed * nfe[active, None]
        logprob[active] += torch.where(committed, proposal_logprob, 0.0)
        entropy[active] += torch.where(committed, step.entropy, 0.0)
        block_full = ~(candidates & ~committed).any(dim=1)
        block[active] += block_full.long()
        block_step[active] = torch.where(block_full, 0, block_step[active] + 1)
        active = active[~_finished(rows, model, rule.stops_at_eos)]
    eos_id = model.config.eos_token_id
    tokens = tokens if eos_id is None else tokens.masked_fill(commit_step == 0, eos_id)
    return Trajectory(prompt_ids, prompt_mask, tokens, commit_step, logprob, entropy, threshold.gamma,
                      threshold.bin, threshold.logprob, nfe, _length(tokens, eos_id), mask_id, sampling.temperature, sampling.cfg_scale)  # fmt: skip


def _window(start: Tensor, length: int, L: int) -> Tensor:
    """bool [A, L]: positions start .. start + length - 1."""
    offset = torch.arange(L, device=start.device) - start[:, None]
    return (offset >= 0) & (offset < length)


def _hidden(model, prompt_ids, prompt_mask, tokens, sampling) -> tuple[Tensor, Tensor | None]:
    """Hidden states [A, L, D] of the completion, and those with the prompt masked out when guidance is on."""
    hidden_ULD, source_A = completion_hidden(model, prompt_ids, prompt_mask, tokens)
    if sampling.cfg_scale == 0:
        return hidden_ULD[source_A], None
    masked_prompt = torch.where(prompt_mask, model.mask_id, prompt_ids)
    unconditional_ULD, unconditional_source_A = completion_hidden(model, masked_prompt, prompt_mask, tokens)
    return hidden_ULD[source_A], unconditional_ULD[unconditional_source_A]


def _predict(
    model, hidden_ALD, unconditional_ALD, candidates, keys, sampling
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Proposed tokens and their log-probs [A, L] with the predictive statistics [A, L]; the head runs at candidates only."""
    logits_NV = model.head(hidden_ALD[candidates])
    if unconditional_ALD is not None:
        unconditional_NV = model.head(unconditional_ALD[candidates])
        logits_NV = unconditional_NV + (sampling.cfg_scale + 1) * (logits_NV - unconditional_NV)
    if logits_NV.dtype == torch.float64:
        logits_NV = logits_NV.float()  # the operator takes what networks run in: fp32, bf16, fp16
    uniform_N = None
    if sampling.temperature > 0:
        uniform_N = uniform(sampling.seed, _TOKEN_DRAW, *(key.expand(candidates.shape)[candidates] for key in keys))
    stats = row_statistics(logits_NV, sampling.temperature, uniform_N, banned_ids=[model.mask_id])
    if not stats.valid.all():
        rows = keys[0].expand(candidates.shape)[candidates][~stats.valid].unique().tolist()
        raise FloatingPointError(f"the model's logits are NaN or infinite for {len(rows)} prompts, first: {rows[:8]}")
    confidence_N = (logits_NV.gather(1, stats.token[:, None])[:, 0].float() - stats.lse).exp()

    def spread(values_N: Tensor) -> Tensor:
        return values_N.new_zeros(candidates.shape).masked_scatter_(candidates, values_N)

    statistics = {"entropy": stats.entropy, "confidence": confidence_N, "top1": stats.top1, "top2": stats.top2}
    return spread(stats.token), spread(stats.logprob), {name: spread(value) for name, value in statistics.items()}


def _finished(tokens: Tensor, model: MaskedDiffusionLM, stops_at_eos: bool) -> Tensor:
    """bool [A]: no masked position is left, or none before the first EOS."""
    L, position = tokens.shape[1], torch.arange(tokens.shape[1], device=tokens.device)
    first_mask = torch.where(tokens == model.mask_id, position, L).amin(dim=1)
    if not stops_at_eos or model.config.eos_token_id is None:
        return first_mask == L
    first_eos = torch.where(tokens == model.config.eos_token_id, position, L).amin(dim=1)
    return (first_mask == L) | (first_eos < first_mask)


def _length(tokens: Tensor, eos_id: int | None) -> Tensor:
    """Tokens up to and including the first EOS, int64 [B]."""
    L = tokens.shape[1]
    if eos_id is None:
        return torch.full((len(tokens),), L, device=tokens.device)
    position = torch.arange(1, L + 1, device=tokens.device)
    return torch.where(tokens == eos_id, position, L).amin(dim=1)
