"""Reinforcement learning works: from random weights, the reward of a toy task rises to nearly the best one."""

import statistics

import numpy as np
import pytest
import torch

from diffpo.config import ModelSize
from diffpo.pretrain import build_model
from diffpo.tasks import CompactTask, Grade
from diffpo.training.config import TrainConfig
from diffpo.training.trainer import Trainer

DIGITS = "0123"


class Echo(CompactTask[str]):
    """Repeat a prompt of two digits; the reward is the fraction of right tokens, less than 0.25 by luck alone."""

    name = "echo"
    vocabulary = tuple(DIGITS)
    gen_length = block_length = 2
    ends_with_eos = False

    def problems(self, split, count, seed):
        return ["".join(pair) for pair in np.random.default_rng(seed).choice(list(DIGITS), size=(count, 2))]

    def examples(self, count, seed):
        return [(self.prompt(p), self.prompt(p)) for p in self.problems("train", count, seed)]

    def prompt(self, problem):
        return " ".join(problem)

    def solution(self, problem, rng):
        return self.prompt(problem)

    def grade(self, problem, text):
        reward = sum(a == b for a, b in zip(problem, text.split(), strict=False)) / 2
        return Grade(reward, text.split() == list(problem))


GAMMAS = (0.5, 0.75, 1.0, 1.5)  # nats; below the entropy of an untrained token, so that decoding starts slow


def train(updates: int, speed_exponent: float = 1.0, **algorithm) -> list[dict]:
    torch.manual_seed(0)
    size = ModelSize(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = TrainConfig(
        updates=updates,
        algorithm={"name": "diffpo", "prompts_per_update": 32, "group_size": 8} | algorithm,
        rollout={"speed_exponent": speed_exponent} | ({} if algorithm else {"threshold_gammas": GAMMAS}),
        optimizer={"lr": 5e-3, "warmup_updates": 5} | ({} if algorithm else {"threshold_lr": 0.05}),
    )
    task = Echo()
    trainer = Trainer(config, build_model(task, size), task)
    return [trainer.step() for _ in range(updates)]


def mean(metrics: list[dict], name: str) -> float:
    return statistics.fmean(m[name] for m in metrics)


@pytest.mark.slow
def test_reward_rises_and_decoding_gets_faster():
    metrics = train(80)
    assert mean(metrics[:5], "reward") < 0.35
    assert mean(metrics[-10:], "reward") > 0.8
    assert mean(metrics[-10:], "accuracy") > 0.8
    # both tokens depend on the prompt alone: one evaluation is enough, and pays
    assert mean(metrics[-10:], "nfe") < mean(metrics[:5], "nfe") - 0.3


@pytest.mark.slow
def test_d1_learns_too():
    metrics = train(60, 0.0, name="d1", inner_updates=2, kl_coefficient=0.01, prompt_mask_probability=0.0)
    assert mean(metrics[:5], "reward") < 0.3
    assert mean(metrics[-10:], "reward") > 0.55
