"""``python -m diffpo.pretrain --task countdown``: train a tiny masked diffusion LM from scratch, in minutes on a CPU.

The loss is the negative evidence lower bound of masked diffusion (LLaDA, arXiv 2502.09992, eq. 3): draw t ~ U(0,1) for each
sequence, mask each completion token with probability p = t, and weigh the cross-entropy of the masked tokens by 1/p.

The learning rate stays constant after the warm-up: the shipped models are meant to be undertrained, so that reinforcement
learning has something to do, and ``--steps k`` is exactly the state of a longer run after k steps. ``--start`` goes on from a
model that exists, ``--final-lr-fraction`` lets the rate fall.
"""

import math
import time
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor

from diffpo.config import ModelSize, PretrainConfig, fail, parse
from diffpo.cpu_memory import keep_freed_memory
from diffpo.decoding.rules import EntropyBounded
from diffpo.device import choose_device
from diffpo.keyed_random import derive, uniform
from diffpo.models.checkpoints import load
from diffpo.models.transformer import MaskedDiffusionLM, ModelConfig
from diffpo.models.word_tokenizer import word_tokenizer
from diffpo.tasks import Task, get_task
from diffpo.training.checkpointing import check_finite
from diffpo.training.evaluation import check_vocabulary, evaluate, fixed_problems, one_at_a_time
from diffpo.training.run_folder import DISK_FAULTS, stopped

_SMALLEST_MASK_RATE = 1e-3  # keeps the 1/p weight finite, as LLaDA's reference does


def elbo_loss(model: MaskedDiffusionLM, prompt_ids_BP: Tensor, completion_BL: Tensor, *key: int) -> Tensor:
    """Mean negative ELBO in nats per completion token; ``key`` seeds the masks."""
    B, L = completion_BL.shape
    row_B1, position_L = (torch.arange(n, device=completion_BL.device) for n in (B, L))
    row_B1 = row_B1[:, None]
    # one t in each of B equal strata (MDLM, arXiv 2406.07524): each is still uniform, but the batch covers (0, 1) evenly
    t_B1 = (uniform(*key, 0) + row_B1) / B
    rate_B1 = t_B1 * (1 - _SMALLEST_MASK_RATE) + _SMALLEST_MASK_RATE
    masked_BL = uniform(*key, 1, row_B1, position_L) < rate_B1
    latent_BL = torch.where(masked_BL, model.mask_id, completion_BL)

    def read(hidden_BSD: Tensor) -> Tensor:
        return model.logprobs(hidden_BSD[:, -L:][masked_BL], completion_BL[masked_BL], banned_ids=[model.mask_id])

    logprob_N = model(torch.cat([prompt_ids_BP, latent_BL], dim=1), read=read)
    weight_N = (1 / rate_B1).expand(B, L)[masked_BL]
    return -(weight_N * logprob_N).sum() / (B * L)


def build_model(task: Task, size: ModelSize) -> MaskedDiffusionLM:
    """A freshly initialised model with a word tokenizer over the task's vocabulary."""
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
    ids = [model.tokenizer(list(texts))["input_ids"] for texts in (prompts, completions)]
    return torch.tensor(ids[0]), torch.tensor(ids[1])


def pretrain(model: MaskedDiffusionLM, task: Task, config: PretrainConfig) -> float:
    """Train on generated examples, in place; returns the mean loss (nats/token) of the last 50 steps.

    FloatingPointError when the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
    chunk = 50  # steps per call of the generator
    started = time.perf_counter()
    losses = []
    with Progress() as progress:
        bar = progress.add_task(f"pretraining on {task.name}", total=config.steps)
        for step in range(config.steps):
            if step % chunk == 0:
                examples = encode_examples(model, task, chunk * config.batch_size, derive(config.seed, step))
                prompts, completions = (ids.to(model.device) for ids in examples)
            rows = slice((step % chunk) * config.batch_size, (step % chunk + 1) * config.batch_size)
            loss = elbo_loss(model, prompts[rows], completions[rows], config.seed, step)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: lower --lr")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), optimizer.zero_grad(), schedule.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"loss {losses[-1]:.3f} nats/token")
            if step % 100 == 99:
                mean = sum(losses[-50:]) / 50
                progress.console.print(f"step {step + 1}: loss {mean:.3f}, {time.perf_counter() - started:.0f} s")
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def lr_factor(step: int, config: PretrainConfig) -> float:
    """Share of --lr at a step counted from 0: linear warm-up, times a linear fall to ``final_lr_fraction`` at the last step."""
    fall = 1 - (1 - config.final_lr_fraction) * step / config.steps
    return min((step + 1) / config.warmup_steps, 1.0) * fall


def model_card(model: MaskedDiffusionLM, task: Task, config: PretrainConfig, loss: float, seconds: float) -> str:
    """A README in Markdown: what the model is, how it was made, and how well it decodes held-out problems."""
    problems = fixed_problems(task, config.heldout)
    rules = [one_at_a_time(task), *(EntropyBounded(gamma) for gamma in (0.01, 0.1, 0.5, 1.0, math.inf))]
    rows = [evaluate(model, task, problems, rule) for rule in rules]
    parameters = sum(p.numel() for p in model.parameters())
    on_gpu = model.device.type == "cuda"
    where = torch.cuda.get_device_name(model.device) if on_gpu else f"{torch.get_num_threads()} CPU threads"
    return "\n".join(
        [
            f"# A masked diffusion LM of {parameters / 1e6:.2f} M parameters, pretrained on {task.name}",
            "",
            f"Made by `python -m diffpo.pretrain` with {config.model_dump_json(exclude={'output'})}.",
            "",
            f"- Data: {config.steps * config.batch_size:,} examples generated by `diffpo.tasks.{type(task).__name__}`, train split only.",
            f"- Loss at the end: {loss:.3f} nats per completion token (negative ELBO, mean of the last 50 steps).",
            f"- Time: {seconds:.0f} s on {where}, torch {torch.__version__}.",
            "- Licence: Apache-2.0, as the project.",
            "",
            f"Held-out problems solved ({len(problems)} of the test split, greedy):",
            "",
            "| rule | accuracy | NFE |",
            "|---|---|---|",
            *(f"| {row.rule} | {row.accuracy:.1%} | {row.nfe:.2f} |" for row in rows),
            "",
        ]
    )


def main() -> None:
    config = parse(PretrainConfig)
    try:
        task = get_task(config.task)
        torch.manual_seed(config.seed)  # initial weights only; every other draw is keyed
        device = choose_device(config.device)
        model = (load(config.start) if config.start else build_model(task, config.model)).to(device)
        check_vocabulary(model, task)
        fixed_problems(task, config.heldout)
        Path(config.output).mkdir(parents=True, exist_ok=True)
        if any(Path(config.output).iterdir()):
            fail(f"output folder {config.output} is not empty: choose another with --output")
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise SystemExit(stopped(f"before the start: {error}")) from error
        fail(str(error))
    except ValueError as error:
        fail(str(error))
    model.train()
    keep_freed_memory()
    started = time.perf_counter()
    try:
        loss = pretrain(model, task, config)
        check_finite(model)
        model.save(config.output)
        card = model_card(model, task, config, loss, time.perf_counter() - started)
        (Path(config.output) / "README.md").write_text(card)
        print(card)
    except (FloatingPointError, OSError, SafetensorError) as error:  # safetensors reports a full disk by its own type
        raise SystemExit(stopped(str(error))) from error


if __name__ == "__main__":
    main()
