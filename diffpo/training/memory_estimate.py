"""How much memory a run takes at its peak, before anything is loaded: from the model's shapes and the settings alone.

    peak = weights + optimizer + reference + process + max(rollouts, update)
    update = max(gradients + activations + max(backward, logits), gradients + step), where the batch is taken in parts; in one part there
             are no gradients yet while all activations are kept, so the larger of the two counts

Bytes of one process. P weights in all, T of them trained (those of the adapters, or all), M the largest tensor among them, e bytes of an
activation (2 in bf16), d hidden size, h and k the width of all query and of all key heads, f inner size of the feed-forward layer, n
blocks, V vocabulary, t tokens of network input in one part (``update.tokens_at_once``), s tokens scored in it:

    weights      e (P - T) + 4 T; where those are fp32 and the network is not, e T more for the copies that the backward pass needs (with
                 activation checkpointing those of one block)
    gradients    4 T
    optimizer    8 T, Adam's moments
    reference    4 T for a KL, where the model's own weights are trained; adapters are switched off instead
    activations  t (n a + 3 e d); with activation checkpointing t (n e d + 3 e d), and the backward pass needs t a more
                 a = e (4 d + 2 h + 2 k + 4 f) of one block on a GPU; a CPU keeps the norms' and attention's inputs in fp32, see `kept_by_block`
    backward     t e (3 d + 3 f), with adapters one f more, and 4 M: what passes while a block is differentiated; in bf16 on a CPU 16 t d more
    logits       a chunk of s V e, 32 MB on a CPU and 1.25 GiB on a GPU at most; s d (e + 8), 8 s d in fp32; 4 M
    step         8 M on a CPU; in one part the first block's backward pass, where that is more
    rollouts     a pass without a gradient over all rows at once, t e (3 d + 3 f), or the logits of a step, 0.5 GB in bf16 at most; no
                 cache of keys and values is kept

Sharded ("full") over N processes, weights, gradients, optimizer and reference are an N-th each, and two blocks, the embedding and the head
are whole while they are used; for rollouts all weights are, e P. Replicated, everything is whole, and each process has its share of the prompts.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from diffpo.likelihood.score import distinct_inputs, with_first
from diffpo.models.model_config import ModelConfig
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives import OBJECTIVES, Batch
from diffpo.tasks.task import Lengths
from diffpo.training.config import TrainConfig
from diffpo.training.model_setup import adapted_layers, compute_dtype, trains_all
from diffpo.trajectory import Action, Trajectory

Sharding = Literal["replicated", "full"]

_PROCESS = {"cpu": 0.6e9, "cuda": 2e9}  # Python and torch, or the CUDA context, libraries and NCCL
_CHUNK = {"cpu": 32 << 20, "cuda": 5 << 28}  # of logits, as linear_logprob has it
_LOGITS_OF_A_STEP = 2**28  # entries, as decoding has it
_EVALUATED = 256  # held-out problems at most
_FP32 = 4


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at its peak, see the file's head. parts: whether the batch is taken in more than one."""

    weights: int
    optimizer: int
    reference: int
    process: int
    rollouts: int
    gradients: int
    activations: int
    backward: int
    logits: int
    step: int
    parts: bool

    @property
    def update(self) -> int:
        """What an update takes beside what is always there."""
        differentiating = self.activations + max(self.backward, self.logits)
        return max(differentiating + self.gradients * self.parts, self.gradients + self.step)

    @property
    def peak(self) -> int:
        return self.weights + self.optimizer + self.reference + self.process + max(self.rollouts, self.update)

    def table(self) -> str:
        """Lines for people, in GB (10^9 bytes)."""
        rows = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "reference": self.reference,
            "process": self.process,
            "and rollouts": self.rollouts,
            "or an update": self.update,
            "  gradients": self.gradients,
            "  activations": self.activations,
            "  logits": self.logits,
            "peak": self.peak,
        }
        return "\n".join(["memory, estimated (GB)", *(f"  {name:<15}{size / 1e9:8.2f}" for name, size in rows.items())])


def estimate_memory(
    config: TrainConfig,
    model: MaskedDiffusionLM,
    prompt_tokens: int,
    lengths: Lengths,
    device: str = "cpu",
    world_size: int = 1,
    sharding: Sharding = "replicated",
) -> Estimate:
    """The memory of a run. model: as stored, without weights (``open_checkpoint``); prompt_tokens: of the longest prompt; device: "cpu" or
    "cuda". ValueError for adapters that do not fit the model."""
    shape, dtype = model.config, compute_dtype(config, model.dtype)
    e, d, shards = dtype.itemsize, shape.hidden_size, world_size if sharding == "full" else 1
    trained = _trained(config, model)
    own, largest = sum(trained), _FP32 * max(trained, default=0)
    frozen = 0 if trains_all(config) else sum(weight.numel() for weight in model.parameters())
    blocks = 1 if config.update.activation_checkpointing else shape.num_hidden_layers  # of which all is kept
    copies = e * own * blocks // shape.num_hidden_layers if e < _FP32 else 0
    decoding = 0
    if shards > 1:  # freed after each block, and gathered again
        copies = e * (2 * _of_block(model) + 2 * shape.vocab_size * d)
        decoding = max(e * (frozen + own) - copies, 0)
    part = _part(config, model, model.layout.width(prompt_tokens, lengths.gen_length), lengths, world_size)
    block = kept_by_block(config, model, device)
    again = block if config.update.activation_checkpointing else 0
    kept = part.tokens * (shape.num_hidden_layers * (e * d if again else block) + 3 * e * d)
    anchored = OBJECTIVES[config.algorithm.name].anchored and config.algorithm.kl_coefficient > 0
    unfinished = largest + _FP32 * own // (shape.num_hidden_layers + 1)  # gradients, when the first block's are taken
    passing = _pass(config, shape, e)
    if device == "cpu" and e < _FP32:  # attention and norms are differentiated in fp32
        passing += 4 * _FP32 * d
    logits = min(part.scored * shape.vocab_size * e, _CHUNK[device]) + part.scored * d * (
        e + (_FP32 if e == _FP32 else 2 * _FP32)
    )
    return Estimate(
        weights=(e * frozen + _FP32 * own) // shards + copies,
        optimizer=2 * _FP32 * own // shards,
        reference=_FP32 * own // shards if anchored and trains_all(config) else 0,
        process=int(_PROCESS[device]),
        rollouts=decoding + _rollouts(config, model, prompt_tokens, lengths, world_size),
        gradients=_FP32 * own // shards,
        activations=kept if own else 0,
        backward=part.tokens * (passing + again) + largest,
        logits=logits + largest,
        step=max(0 if device == "cuda" else 2 * largest // shards, part.tokens * (passing + again) - unfinished),
        parts=part.several,
    )


def kept_by_block(config: TrainConfig, model: MaskedDiffusionLM, device: str) -> int:
    """Bytes of what one block keeps of a token for its backward pass.

    The norms' inputs and outputs, queries, keys, values and what attention makes of them, and four tensors of the feed-forward layer;
    each adapter its inner state. torch's norm on a CPU keeps the normalised input too where its weight is trained, and its input in fp32;
    attention there computes a gradient in fp32.
    """
    shape, dtype = model.config, compute_dtype(config, model.dtype)
    e, d, f = dtype.itemsize, shape.hidden_size, shape.intermediate_size
    heads, keys = shape.num_attention_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    norm = 2 * e * d
    attention = e * (2 * heads + 2 * keys)
    if device == "cpu":
        wide = max(e, _FP32)
        norm = (wide + e) * d + (wide * d if trains_all(config) else 0)
        attention = wide * (2 * heads + 2 * keys) + (e * heads if wide != e else 0)
    rank = config.lora.rank or 0
    adapters = e * rank * len(adapted_layers(config, model)) // shape.num_hidden_layers
    return 2 * norm + attention + 4 * e * f + adapters + _FP32 * (shape.num_attention_heads + 3)


def _trained(config: TrainConfig, model: MaskedDiffusionLM) -> list[int]:
    """The sizes of the tensors that are trained; the threshold is too small to count."""
    if trains_all(config):
        return [weight.numel() for weight in model.parameters()]
    sizes, rank = [], config.lora.rank or 0
    for name in adapted_layers(config, model):
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        sizes += [rank * inputs, rank * outputs]
    return sizes


def _of_block(model: MaskedDiffusionLM) -> int:
    return sum(weight.numel() for weight in model.layers[0].parameters())


class _Part(NamedTuple):
    """tokens: of network input that are differentiated at once; scored: from them; several: whether there are more such parts."""

    tokens: int
    scored: int
    several: bool


def _part(config: TrainConfig, model: MaskedDiffusionLM, width: int, lengths: Lengths, world_size: int) -> _Part:
    of_group, scored = _inputs_of_a_group(config, model, lengths)
    every = of_group * _share(config.algorithm.prompts_per_update, world_size)
    at_once = config.update.tokens_at_once
    inputs = every if at_once is None else max(min(every, at_once // width), 1)
    return _Part(inputs * width, inputs * scored // of_group, inputs < every)


def _inputs_of_a_group(config: TrainConfig, model: MaskedDiffusionLM, lengths: Lengths) -> tuple[int, int]:
    """Distinct network inputs of the update of one group, whose completions differ and commit one token a step, and tokens scored."""
    rows, length = torch.arange(config.algorithm.group_size), lengths.gen_length
    zeros = torch.zeros(len(rows), length)
    order = torch.arange(1, length + 1).expand(len(rows), -1)
    trajectory = Trajectory(
        prompt_ids=torch.zeros(len(rows), 1, dtype=torch.int64), prompt_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        tokens=order + length * rows[:, None], commit_step=order, logprob=zeros, entropy=zeros, gamma=zeros[:, 0],
        nfe=torch.full_like(rows, length), length=torch.full_like(rows, length), key=rows, group=torch.zeros_like(rows),
        version=torch.zeros_like(rows), mask_id=0, temperature=1.0, block_length=lengths.block_length,
        actions={"gamma": Action(torch.zeros_like(rows), zeros[:, 0])} if config.trains_threshold else {},
    )  # fmt: skip
    objective = OBJECTIVES[config.algorithm.name](config.algorithm)
    latents = objective.latents(Batch(trajectory, zeros[:, 0], zeros[:, 0]), config.seed, 0, 0)
    inputs = with_first(latents, len(rows)) if config.trains_threshold else latents
    return len(distinct_inputs(trajectory, inputs, model.layout, None)[0]), int((latents.weight != 0).sum())


def _rollouts(
    config: TrainConfig, model: MaskedDiffusionLM, prompt_tokens: int, lengths: Lengths, world_size: int
) -> int:
    """A pass over the rows that are decoded together, of rollouts or of held-out problems, and the logits of one step."""
    algorithm, at_once, shape = config.algorithm, config.update.tokens_at_once, model.config
    width, e = prompt_tokens + lengths.gen_length, compute_dtype(config, model.dtype).itemsize
    rows = max(_share(algorithm.prompts_per_update, world_size) * algorithm.group_size, min(config.heldout, _EVALUATED))
    rows = rows if at_once is None else max(min(rows, at_once // width), 1)
    logits = min(rows * lengths.block_length * shape.vocab_size, _LOGITS_OF_A_STEP)
    return max(rows * width * _pass(config, shape, e), e * (rows * width * shape.hidden_size + logits))


def _pass(config: TrainConfig, shape: ModelConfig, e: int) -> int:
    """Bytes of a token that pass while a block is computed without a gradient, or differentiated."""
    adapters = 1 if config.lora.rank is not None else 0
    return e * (3 * shape.hidden_size + (3 + adapters) * shape.intermediate_size)


def _share(prompts: int, world_size: int) -> int:
    return -(-prompts // world_size)
