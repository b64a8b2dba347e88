"""What a run will do, found out before a weight is read: its task, prompts, lengths, adapters and memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpo.decoding.generation import check_lengths
from diffpo.likelihood.score import PartTooSmallError
from diffpo.memory_limit import memory_limit
from diffpo.models.checkpoints import Checkpoint
from diffpo.tasks import Task
from diffpo.tasks.prompts import check_context, prompt_ids, suited
from diffpo.tasks.task import completion_lengths
from diffpo.training.config import TrainConfig
from diffpo.training.distributed import ALONE, World
from diffpo.training.memory_estimate import Estimate, Sharding, estimate_memory
from diffpo.training.model_setup import adapted_layers, compute_dtype, shards, trains_all
from diffpo.training.rollout import rows_at_once

_LARGEST_ADVICE = 3


@dataclass(frozen=True)
class Plan:
    """task: as the model is asked it; at_once: rows that may be decoded together, None for all; estimate: of the memory."""

    task: Task
    at_once: int | None
    estimate: Estimate


def planned(
    config: TrainConfig,
    checkpoint: Checkpoint,
    task: Task,
    problems: Sequence,
    device: torch.device,
    world: World = ALONE,
) -> Plan:
    """problems: some that the run asks, for the length of its prompts; world: the processes that share the work.

    ValueError, which names the field, for what does not fit together.
    """
    model = checkpoint.model
    adapted_layers(config, model)
    task = suited(task, model)
    lengths = completion_lengths(task, config.rollout.gen_length, config.rollout.block_length)
    check_lengths(*lengths)
    prompts: list[Tensor] = prompt_ids(model.tokenizer, task, problems)
    check_context(prompts, lengths.gen_length, model)
    try:
        at_once = rows_at_once(prompts, lengths.gen_length, config.update.tokens_at_once)
    except PartTooSmallError as error:
        raise ValueError(f"update.{error}") from error
    longest = max(map(len, prompts))
    sharding: Sharding = "full" if shards(config, world) else "replicated"
    estimate = estimate_memory(config, model, longest, lengths, device.type, world.size, sharding)
    return Plan(task, at_once, estimate)


def check_memory(
    config: TrainConfig, estimate: Estimate, device: torch.device, stored: torch.dtype, world: World = ALONE
) -> None:
    """ValueError, with what to change, for a run that the device cannot hold, unless the user allows it. stored: the checkpoint's dtype."""
    limit = memory_limit(device)
    here = world.local_size if device.type == "cpu" else 1  # processes that share it
    if limit is None or here * estimate.peak <= limit or config.allow_large:
        return
    kind = "GPU" if device.type == "cuda" else "machine"
    each = f"each of {here} processes" if here > 1 else "the run"
    raise ValueError(
        f"memory: {each} needs about {estimate.peak / 1e9:.3g} GB and the {kind} has {limit / 1e9:.3g} GB; "
        f"{'; '.join(_advice(config, estimate, stored)) or 'take a larger one'}; --allow-large starts it all the same"
    )


def _advice(config: TrainConfig, estimate: Estimate, stored: torch.dtype) -> list[str]:
    """What would save most, first."""
    passing = estimate.activations + max(estimate.backward, estimate.logits)
    found: list[tuple[int, str]] = []
    if trains_all(config):
        found.append((estimate.gradients + estimate.optimizer, "train adapters with --lora.rank 64"))
    if estimate.reference:
        found.append((estimate.reference, "keep no reference with --algorithm.kl-coefficient 0"))
    if compute_dtype(config, stored) == torch.float32 and not trains_all(config):
        found.append((estimate.weights // 2, "keep the base in 16 bits with --dtype bfloat16"))
    if not config.update.activation_checkpointing:
        found.append((estimate.activations, "keep fewer activations with --update.activation-checkpointing"))
    found.append((max(passing, estimate.rollouts) // 2, "take the batch in smaller parts with --update.tokens-at-once"))
    return [text for size, text in sorted(found, reverse=True) if size > 0.02 * estimate.peak][:_LARGEST_ADVICE]
