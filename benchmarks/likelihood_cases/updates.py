"""What is measured: a random model, its rollouts, and one update of them by diffpo and by plain code.

The first update of a batch takes its own scores as the old ones; plain code scores them first. A later update is given them: those of the
weights before a small step. Both are of two-times mean field, of the model alone and without a KL, as in `plain_update.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from decoding_cases.random_models import Shape, random_model, random_prompts
from torch import Tensor

from diffpo.likelihood.score import score
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives import Batch
from diffpo.objectives.diffpo import Diffpo
from diffpo.training.update import accumulate_gradient
from diffpo.trajectory import Trajectory
from likelihood_cases import plain_update

SEED = 0
GROUP = 8
STEP = 0.01  # of the weights, relative, between the first update and a later one
NOISE = 0.5  # nats a token, between what the rollouts were drawn with and the estimate

Gradient = dict[str, Tensor]
Update = Callable[[], tuple[Tensor, dict[str, Tensor]]]  # loss and diagnostics; the gradient is added to the model's


@dataclass(frozen=True)
class Setting:
    """A model and rollouts of it: sizes in tokens, ``steps`` denoising steps a rollout."""

    shape: Shape
    rollouts: int = GROUP
    prompt_length: int = 64
    gen_length: int = 64
    steps: int = 32
    m: int = 2  # of the m-times mean field; 0 = a boundary at every step
    correction: bool = True  # importance weights
    sequences_at_once: int | None = None

    @property
    def tokens_at_once(self) -> int | None:
        return self.sequences_at_once and self.sequences_at_once * (self.prompt_length + self.gen_length)


def model_of(setting: Setting) -> MaskedDiffusionLM:
    return random_model(setting.shape, torch.device("cpu"), torch.float32, SEED)


def rollouts(setting: Setting, model: MaskedDiffusionLM) -> Trajectory:
    """Groups of rollouts that nobody decoded: random tokens, committed in a random order. What an update costs does not depend on them."""
    B, L = setting.rollouts, setting.gen_length
    prompts = random_prompts(model, B // GROUP, setting.prompt_length, SEED).repeat_interleave(GROUP, dim=0)
    order = torch.rand(B, L, generator=torch.Generator().manual_seed(SEED)).argsort(dim=1)
    tokens, zeros, rows = random_prompts(model, B, L, SEED + 1), torch.zeros(B, L), torch.arange(B)
    return Trajectory(
        prompt_ids=prompts, prompt_mask=torch.ones_like(prompts, dtype=torch.bool), tokens=tokens,
        commit_step=order * setting.steps // L + 1, logprob=zeros, entropy=zeros.clone(), gamma=torch.full((B,), torch.nan),
        nfe=torch.full((B,), setting.steps), length=torch.full((B,), L), key=rows, group=rows // GROUP,
        version=torch.zeros_like(rows), mask_id=model.mask_id, temperature=1.0, block_length=L,
    )  # fmt: skip


class Case:
    """The updates of one setting: `ours` and `plain`, with or without given old scores."""

    def __init__(self, setting: Setting, trajectory: Trajectory, model: MaskedDiffusionLM):
        self.setting, self.trajectory, self.model = setting, trajectory, model
        settings = {
            "m": setting.m,
            "importance_weights": "token" if setting.correction else "none",
            "kl_coefficient": 0.0,
        }
        self.objective = Diffpo(Diffpo.Config(train=("model",), **settings))
        advantage = torch.linspace(-1, 1, GROUP).repeat(len(trajectory) // GROUP)
        self.batch = Batch(trajectory, advantage, advantage)
        self.latents = self.objective.latents(self.batch, SEED)

    def ours(self, later: bool = False) -> Update:
        old = self._before(lambda: score(self.model, self.trajectory, self.latents)) if later else None

        def update():
            signal, tokens = self.batch.advantage, self.setting.tokens_at_once
            loss, _ = accumulate_gradient(
                self.model, self.objective, self.batch, self.latents, signal, old, None, tokens
            )
            return loss.value, loss.metrics

        return update

    def plain(self, later: bool = False, samples: int = GROUP) -> Update:
        """samples: rollouts in one graph."""
        tau = self._tau()
        old = self._before(lambda: plain_update.logprobs(self.model, self.trajectory, tau)) if later else None
        return partial(plain_update.accumulate, self.model, self.trajectory, tau, self.batch.advantage, old, samples)

    def gradient(self, update: Update) -> tuple[Tensor, dict[str, Tensor], Gradient]:
        """Loss, diagnostics and gradient of one update."""
        self.model.zero_grad()
        loss, found = update()
        return loss, found, {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def _tau(self) -> Tensor:
        """int64 [B]: the boundary that the objective drew: as many steps as z_tau shows."""
        steps, tau = self.trajectory.commit_step, torch.zeros_like(self.trajectory.nfe)
        later = self.latents.masked.sum(dim=1) < steps.shape[1]
        hidden = self.latents.masked[later]
        rows = self.latents.row[later]
        tau[rows] = steps[rows].masked_fill(hidden, 0).amax(dim=1)
        return tau

    @torch.no_grad()
    def _before(self, scored: Callable):
        """What the weights before a small step say."""
        kept = {name: value.clone() for name, value in self.model.state_dict().items()}
        generator = torch.Generator().manual_seed(SEED)
        for parameter in self.model.parameters():
            size = STEP * parameter.abs().mean()
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        found = scored()
        self.model.load_state_dict(kept)
        return found


@torch.no_grad()
def with_behaviour(setting: Setting, model: MaskedDiffusionLM, trajectory: Trajectory) -> Trajectory:
    """The trajectory as if it had been drawn at the estimate's own log-probs, give or take half a nat a token: weights around 1."""
    case = Case(setting, trajectory, model)
    estimate = score(model, trajectory, case.latents, setting.tokens_at_once).tokens()
    noise = torch.randn(estimate.shape, generator=torch.Generator().manual_seed(SEED))
    return replace(trajectory, logprob=estimate + NOISE * noise)
