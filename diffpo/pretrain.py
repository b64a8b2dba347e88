"""``python -m diffpo.pretrain --task countdown``: train a tiny masked diffusion LM from scratch, in minutes on a CPU.

The loss is the negative evidence lower bound of masked diffusion (LLaDA, arXiv 2502.09992, eq. 3): draw t ~ U(0,1) for each
sequence, mask each completion token with probability p = t, and weigh the cross-entropy of the masked tokens by 1/p.
"""

import time

import torch
from rich.progress import Progress
from torch import Tensor

from diffpo.config import ModelSize, PretrainConfig, parse
from diffpo.keyed_random import derive, uniform
from diffpo.models.transformer import MaskedDiffusionLM, ModelConfig
from diffpo.tasks import Task, get_task
from diffpo_kernels import linear_logprob

_SMALLEST_MASK_RATE = 1e-3  # keeps the 1/p weight finite, as LLaDA's reference does


def elbo_loss(model: MaskedDiffusionLM, prompt_ids_BP: Tensor, completion_BL: Tensor, *key: int) -> Tensor:
    """Mean negative ELBO in nats per completion token; ``key`` seeds the masks."""
    B, L = completion_BL.shape
    row_B1 = torch.arange(B)[:, None]
    rate_B1 = uniform(*key, 0, row_B1) * (1 - _SMALLEST_MASK_RATE) + _SMALLEST_MASK_RATE
    masked_BL = uniform(*key, 1, row_B1, torch.arange(L)) < rate_B1
    latent_BL = torch.where(masked_BL, model.mask_id, completion_BL)
    hidden_BLD = model(torch.cat([prompt_ids_BP, latent_BL], dim=1))[:, -L:]
    logprob_N = linear_logprob(
        hidden_BLD[masked_BL], model.lm_head.weight, completion_BL[masked_BL], banned_ids=[model.mask_id]
    )
    weight_N = (1 / rate_B1).expand(B, L)[masked_BL]
    return -(weight_N * logprob_N).sum() / (B * L)


def build_model(task: Task, size: ModelSize) -> MaskedDiffusionLM:
    """A freshly initialised model with a word tokenizer over the task's vocabulary."""
    from diffpo.models.word_tokenizer import word_tokenizer

    tokenizer = word_tokenizer(task.vocabulary)
    config = ModelConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size.model_dump(),
    )
    return MaskedDiffusionLM(config, tokenizer)


def encode_examples(model: MaskedDiffusionLM, task: Task, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompt ids [count, P] and completion ids [count, gen_length] of fresh training examples."""
    prompts, completions = zip(*task.examples(count, seed), strict=True)
    if task.ends_with_eos:
        completions = [f"{text} {model.tokenizer.eos_token}" for text in completions]
    encode = lambda texts: torch.tensor(model.tokenizer(list(texts))["input_ids"])  # noqa: E731
    return encode(prompts), encode(completions)


def pretrain(config: PretrainConfig) -> MaskedDiffusionLM:
    """Train from scratch as ``config`` says, on examples that are never repeated."""
    torch.manual_seed(config.seed)  # initial weights only; every other draw is keyed
    task = get_task(config.task)
    model = build_model(task, config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_then_linear(step, config))
    chunk = 50  # steps per call of the generator
    started = time.perf_counter()
    with Progress() as progress:
        bar = progress.add_task(f"pretraining on {task.name}", total=config.steps)
        for step in range(config.steps):
            if step % chunk == 0:
                prompts, completions = encode_examples(model, task, chunk * config.batch_size, derive(config.seed, step))
            rows = slice((step % chunk) * config.batch_size, (step % chunk + 1) * config.batch_size)
            loss = elbo_loss(model, prompts[rows], completions[rows], config.seed, step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), optimizer.zero_grad(), schedule.step()
            progress.update(bar, advance=1, description=f"loss {loss.item():.3f} nats/token")
            if step % 250 == 249:
                progress.console.print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s")
    return model.eval()


def _warmup_then_linear(step: int, config: PretrainConfig) -> float:
    return min((step + 1) / config.warmup_steps, (config.steps - step) / config.steps)


def main() -> None:
    config = parse(PretrainConfig)
    pretrain(config).save(config.output)


if __name__ == "__main__":
    main()
