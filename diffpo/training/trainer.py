"""The training loop: roll out, score, update. Thin: the formula is in ``diffpo/objectives``, the estimator in ``diffpo/likelihood``."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffpo.device import release_cached_memory
from diffpo.keyed_random import derive
from diffpo.likelihood.latents import Latents, Scores
from diffpo.models.adapters import replacement, without_wrapper
from diffpo.models.sharding import gathered, is_shard, reshard, shard, whole
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives import OBJECTIVES, Batch
from diffpo.objectives.advantage import group_advantage
from diffpo.tasks import Task
from diffpo.tasks.task import completion_lengths
from diffpo.training.config import TrainConfig
from diffpo.training.distributed import ALONE, World
from diffpo.training.model_setup import keep_in_fp32, shards
from diffpo.training.reference import Reference
from diffpo.training.rollout import Rollout, collect
from diffpo.training.update import accumulate_gradient, scored
from diffpo.trajectory import Trajectory

MAX_CONSECUTIVE_SKIPS = 3
_ROLLOUT, _LATENTS = 0, 1  # purposes in the random key


class TrainingDivergedError(RuntimeError):
    """Three updates in a row had a loss or gradient that is NaN or infinite."""


class Trainer:
    """Owns the model, its optimizer and the number of finished updates; every random draw is keyed by (seed, update).

    model: plain, with peft's adapters (then they are trained, and what else they leave trainable), or sharded by ``fully_shard``: every
    process then does the same. world: the processes that share the work, each with a Trainer of its own. Its threshold is given
    to it here, but to a sharded one, which has to have it. ValueError for a model without a parameter to train.
    """

    def __init__(self, config: "TrainConfig", model: MaskedDiffusionLM, task: Task, world: World = ALONE):
        model = without_wrapper(model)
        self.config, self.model, self.task, self.world = config, model, task, world
        algorithm = config.algorithm
        self.objective = OBJECTIVES[algorithm.name](algorithm)
        self.lengths = completion_lengths(task, config.rollout.gen_length, config.rollout.block_length)
        self.rule, self.evaluation_rule = config.rollout.rules(model, self.lengths.gen_length, config.trains_threshold)
        if config.trains_threshold:
            own, rollout = model.config, config.rollout
            kept = (own.threshold_gammas, own.threshold_order) == (rollout.bins, rollout.threshold_order)
            reads = rollout.threshold_reads or (own.threshold_reads if kept else "both")
            if not kept or own.threshold_reads != reads:
                model.add_threshold(rollout.bins, rollout.threshold_order, reads)
        # a frozen model cannot drift
        anchored = self.objective.anchored and algorithm.kl_coefficient > 0 and "model" in algorithm.train
        world.as_first_(p.detach() for p in model.parameters() if p.requires_grad and not is_shard(p))
        if shards(config, world):
            model.compute_dtype = model.dtype
            shard(model, world.mesh(model.device), model.dtype)
        self.sharded = world.size > 1 and reshard(model)
        self.optimizer = self._optimizer()
        self.reference = Reference(model) if anchored else None
        model.recompute_activations(config.update.activation_checkpointing)
        if config.compile:
            for layer in model.layers:
                layer.compile(dynamic=True)
        self.update = self.rollouts = 0
        self.skipped = self.skipped_in_a_row = 0
        self.denoiser_calls: Counter[str] = Counter()  # of all processes
        self._calls: Counter[str] = Counter()  # of this one, in this update
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self.on_phase: Callable[[str], object] = lambda name: None

    def _optimizer(self) -> torch.optim.AdamW:
        settings, model, trained = self.config.optimizer, self.model, self.config.algorithm.train
        sharded = reshard(model)  # not what a forward has gathered
        threshold = list(replacement(model.threshold).parameters()) if model.threshold else []
        trunk = [p for name, p in model.named_parameters() if not name.startswith("threshold.") and p.requires_grad]
        groups = []
        for name, parameters, lr in (("model", trunk, settings.lr), ("threshold", threshold, settings.threshold_lr)):
            if name in trained and not parameters:
                raise ValueError(f"algorithm.train: the {name} has no parameter that requires a gradient")
            for parameter in parameters:
                parameter.requires_grad_(name in trained)
            if name in trained and not sharded:  # shards are fp32 from the start, or their owner wants another dtype
                keep_in_fp32(model, parameters)
            if parameters:
                groups.append({"params": parameters, "lr": lr, "base_lr": lr})
        fused = True if model.device.type == "cuda" else None  # the default takes a copy of all gradients there
        return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=fused)

    def step(self) -> dict:
        """One update: a batch of rollouts and ``inner_updates`` optimizer steps. Returns the metrics to log."""
        algorithm = self.config.algorithm
        with self._phase("rollout"):
            rollout = self.collect()
            release_cached_memory(self.model.device)
        advantage = group_advantage(rollout.reward, algorithm.group_size, algorithm.advantage)
        varied = (advantage != 0).reshape(-1, algorithm.group_size).any(dim=1)
        metrics = self._rollout_metrics(rollout) | {
            "zero_advantage_fraction": 1 - varied.float().mean().item(),
            "updated": int(varied.any()),  # 0: no group had two rewards that differ, and the weights stay as they were
        }
        # Groups of equal rewards are dropped, as dynamic sampling does (DAPO, 2503.14476): they carry no policy gradient. The
        # means of the loss, its KL included, therefore run over the groups that do.
        kept = varied.repeat_interleave(algorithm.group_size)
        if varied.any():
            device = self.model.device
            trajectory = rollout.trajectory
            if "threshold" not in algorithm.train:  # what a frozen threshold chose is no action of the model
                trajectory = replace(trajectory, actions={})
            batch = Batch(trajectory, rollout.reward.to(device), advantage.to(device))
            with self.world.in_passes() if self.sharded else nullcontext():
                metrics |= self._optimise(batch[kept.to(device)])
        self.update += 1
        self.rollouts += len(advantage)
        for calls in self.world.gather_json(self._calls):
            self.denoiser_calls.update(calls)
        self._calls.clear()
        metrics |= {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds.clear()
        return metrics | {
            "update": self.update,
            "denoiser_calls": sum(self.denoiser_calls.values()),
            "skipped_updates": self.skipped,
        }

    def collect(self, **others: Any) -> Rollout:
        """The rollouts of the next update, or ``others``: arguments of `diffpo.training.rollout.collect`."""
        algorithm, rollout = self.config.algorithm, self.config.rollout
        self.model.eval()
        collected = partial(
            collect,
            self.model,
            self.task,
            prompts=algorithm.prompts_per_update,
            group_size=algorithm.group_size,
            rule=self.rule,
            temperature=rollout.temperature,
            speed_exponent=rollout.speed_exponent,
            seed=derive(self.config.seed, _ROLLOUT),
            update=self.update,
            tokens_at_once=self.config.update.tokens_at_once,
            lengths=self.lengths,
            first=self.rollouts,
            world=self.world,
        )
        with gathered(self.model):
            return collected(**others)

    def _optimise(self, batch: Batch) -> dict:
        """All inner updates on one batch; theta starts as old, so the first latents need no separate old scores."""
        algorithm, tokens = self.config.algorithm, self.config.update.tokens_at_once
        drawn = [
            self.objective.latents(batch, self.config.seed, _LATENTS, draw)
            for draw in range(algorithm.inner_updates if algorithm.fresh_latents else 1)
        ]
        with self._phase("score"), torch.no_grad():
            t = batch.trajectory
            old = [None, *(scored(self.model, t, latents, tokens, self.world) for latents in drawn[1:])]
            reference = self._reference_scores(t, drawn)
            signals = [self.objective.signal(batch, *scores) for scores in zip(old, reference, strict=True)]
        of_updates = []
        totals: Counter[str] = Counter()  # of the means over the inner updates
        with self._phase("update"):
            for inner in range(algorithm.inner_updates):
                i = inner % len(drawn)
                self.optimizer.zero_grad()
                loss, new = accumulate_gradient(
                    self.model, self.objective, batch, drawn[i], signals[i], old[i], reference[i], tokens, self.world
                )
                old[i] = old[i] or new
                of_updates.append(loss.metrics)
                totals.update(
                    {name: value / algorithm.inner_updates for name, value in self._apply(loss.value).items()}
                )
        return mean_diagnostics(of_updates) | totals

    def _reference_scores(self, trajectory: Trajectory, drawn: list[Latents]) -> list[Scores | None]:
        if self.reference is None:
            return [None] * len(drawn)
        with self.reference.in_place():
            tokens = self.config.update.tokens_at_once
            return [scored(self.model, trajectory, latents, tokens, self.world) for latents in drawn]

    def _apply(self, loss: Tensor) -> dict:
        """One optimizer step, or none when the loss or the gradient is not finite."""
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm))
        if self.world.any(not (torch.isfinite(loss) and torch.isfinite(norm))):
            self.optimizer.zero_grad()
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.skipped_in_a_row >= MAX_CONSECUTIVE_SKIPS:
                raise TrainingDivergedError(
                    f"loss {loss.item()} and gradient norm {norm.item()}: {MAX_CONSECUTIVE_SKIPS} updates in a row were "
                    "not finite; lower optimizer.lr or raise algorithm.kl_coefficient"
                )
            return {"loss": loss.item(), "gradient_norm": norm.item()}
        self.skipped_in_a_row = 0
        factor = self._lr_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()  # rollouts need no gradients, and their memory
        return {"loss": loss.item(), "gradient_norm": norm.item(), "lr": self.config.optimizer.lr * factor}

    def _lr_factor(self) -> float:
        """Linear warm-up, then linear decay to ``final_lr_fraction``, which the update after the last would have."""
        settings, total = self.config.optimizer, self.config.updates
        decay = 1 - (1 - settings.final_lr_fraction) * self.update / total
        return min(1.0, (self.update + 1) / max(settings.warmup_updates, 1)) * decay

    def _rollout_metrics(self, rollout: Rollout) -> dict:
        trajectory = rollout.trajectory
        metrics: dict[str, float | list[int]] = {
            "reward": rollout.reward.nanmean().item(),
            "task_reward": rollout.task_reward.nanmean().item(),
            "dropped_rewards": int(rollout.task_reward.isnan().sum()),
            "accuracy": rollout.correct.float().mean().item(),
            "nfe": trajectory.nfe.float().mean().item(),
            "gamma": trajectory.gamma.mean().item(),
            "length": trajectory.length.float().mean().item(),
        }
        threshold = self.model.threshold
        if threshold is not None and "gamma" in trajectory.actions:
            bins, chosen = len(threshold.gammas), trajectory.actions["gamma"].choice
            metrics["gamma_histogram"] = torch.bincount(chosen[chosen >= 0], minlength=bins).tolist()
        return metrics

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Count the seconds and the denoiser calls (sequences through the network) of a phase, and say to ``on_phase`` that it begins."""
        self.on_phase(name)
        started = time.perf_counter()

        def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._calls[name] += len(arguments[0])

        hook = self.model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()
            self._seconds[name] += time.perf_counter() - started

    def save(self, write: Callable[[], None]) -> None:
        """Do what writes the model: of a sharded one all processes take part, else the first does it. An error is everybody's."""
        self.world.agreed(lambda: write() if self.world.first or self.sharded else None)

    def state(self) -> dict:
        """What a resume needs beside the model and the optimizer."""
        return {
            "update": self.update,
            "rollouts": self.rollouts,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "denoiser_calls": dict(self.denoiser_calls),
        }

    def restore(self, state: dict) -> None:
        self.update, self.skipped, self.skipped_in_a_row = state["update"], state["skipped"], state["skipped_in_a_row"]
        self.denoiser_calls = Counter(state["denoiser_calls"])
        algorithm = self.config.algorithm  # a checkpoint of 0.1 does not count them
        self.rollouts = state.get("rollouts", self.update * algorithm.prompts_per_update * algorithm.group_size)


def mean_diagnostics(of_updates: Sequence[dict[str, Tensor]]) -> dict:
    """Means over the inner updates of what `surrogate_loss` reports, read from the device at once.

    "bin/name" becomes "name/quarter_1" .. "name/quarter_4", by quarter of a rollout's denoising steps. A quarter in which no token was
    committed has no metrics but its tokens, 0. ess and ess/quarter_q belong to the weight that is used: capped, and identically 1 with
    importance_weights none; ess/quarter_q is taken within its quarter. ess_uncapped/quarter_q belongs to exp(old - behaviour) itself and so
    shows the gap between surrogate and true likelihood whether or not it is corrected; weight_histogram/quarter_q is of the same weights.
    """
    shapes = {name: value.shape for name, value in of_updates[0].items()}
    flat = torch.stack([torch.cat([value.flatten() for value in named.values()]) for named in of_updates])
    parts = flat.mean(dim=0).cpu().split([shape.numel() for shape in shapes.values()])
    means = {name: part.view(shape).tolist() for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    metrics = {name: value for name, value in means.items() if not name.startswith("bin/")}
    for name, by_quarter in means.items():
        if name.startswith("bin/"):
            label = name.removeprefix("bin/")
            for q, (value, tokens) in enumerate(zip(by_quarter, means["bin/tokens"], strict=True), start=1):
                if tokens > 0 or label == "tokens":
                    metrics[f"{label}/quarter_{q}"] = value
    return metrics
