"""What each of two processes does in test_distributed_updates.py: ``python distributed_processes.py FOLDER``, the rendezvous in FOLDER."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch.distributed.tensor import DTensor
from two_processes import both

from diffpo.config import ModelSize
from diffpo.pretrain import build_model
from diffpo.tasks.countdown import Countdown
from diffpo.tasks.task import Grade
from diffpo.training.config import TrainConfig
from diffpo.training.distributed import ALONE, World
from diffpo.training.trainer import Trainer

SIZE = ModelSize(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Uneven(Countdown):
    """Countdown with problems of different lengths, and rewards that an untrained model's answers differ in."""

    def prompt(self, problem):
        return " ".join([super().prompt(problem)] * (1 + problem.target % 3))

    def grade(self, problem, text):
        return Grade(sum(map(ord, text)) % 11 / 10, len(text) % 2 == 0)


def trainer_of(world, model, **settings):
    algorithm = {"name": "diffpo", "prompts_per_update": 3, "group_size": 4, "kl_coefficient": 0.5}
    algorithm |= settings.pop("algorithm", {})
    optimizer = {"warmup_updates": 0} | ({"lr": 1e-3} if "model" in algorithm.get("train", ["model"]) else {})
    config = TrainConfig(updates=8, algorithm=algorithm, optimizer=optimizer, **settings)
    return Trainer(config, copy.deepcopy(model), Uneven(), world)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(trainer):
    return {name: whole(tensor.detach()) for name, tensor in trainer.model.named_parameters()}


def assert_same_updates(world, model, **settings):
    """Two updates together are two updates alone: rollouts, losses, gradient norms and weights."""
    together, alone = trainer_of(world, model, **settings), trainer_of(ALONE, model, **settings)
    seen, before = {}, {name: tensor.clone() for name, tensor in weights(alone).items()}
    for trainer in (together, alone):
        collect = trainer.collect
        trainer.collect = lambda collect=collect, of=trainer: seen.setdefault(of, []).append(collect()) or seen[of][-1]
    for _ in range(2):
        got, expected = together.step(), alone.step()
        ours, theirs = (seen[trainer][-1] for trainer in (together, alone))
        for name in ("tokens", "commit_step", "key", "group", "prompt_ids"):
            assert torch.equal(getattr(ours.trajectory, name), getattr(theirs.trajectory, name)), name
        assert torch.equal(ours.reward, theirs.reward)
        times = {name for name in expected if name.startswith("seconds/")} | {"denoiser_calls"}
        assert got.keys() == expected.keys()
        for name in expected.keys() - times:
            assert got[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    ours, theirs = weights(together), weights(alone)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
    moved = [(tensor - before[name]).abs().max() for name, tensor in theirs.items()]
    assert max(moved) > 1e-3
    return together


def check_updates(world, model):
    espo, parts = {"name": "espo"}, {"tokens_at_once": 90}
    # one group, so one network input: the second process has nothing to score
    one = {"prompts_per_update": 1, "m": 1, "kl_coefficient": 0.5}
    threshold = {"prompts_per_update": 1, "train": ("threshold",), "kl_coefficient": 0.01}
    assert_same_updates(world, model)  # part by part, one part each
    assert_same_updates(world, model, algorithm={"name": "tracerl", "prompts_per_update": 2})
    assert_same_updates(world, model, algorithm=espo)  # replayed
    assert_same_updates(world, model, algorithm=threshold)
    for shard in (False, True):
        spread = {"distributed": {"shard": shard}}
        assert_same_updates(world, model, update=parts, **spread)
        assert_same_updates(world, model, update=parts, algorithm=espo, **spread)
        assert_same_updates(world, model, algorithm=one, **spread)


def check_adapters(world, model):
    """Adapters on a frozen base. Made by each process for itself, they are those of the first."""
    torch.manual_seed(world.rank)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"])
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for weight in adapted.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    for settings in ({}, {"distributed": {"shard": True}, "update": {"activation_checkpointing": True}}):
        together = trainer_of(world, adapted, **settings)
        alone = trainer_of(ALONE, adapted)
        if world.first:
            got, expected = together.step(), alone.step()
            assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)
            assert got["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
        else:
            together.step()
        digests = world.gather_json({n: float(w.double().abs().sum()) for n, w in weights(together).items()})
        assert digests[0] == digests[1]


def check_half_precision(world, model):
    """bf16 computes, fp32 is trained: what bf16 cannot hold of small steps adds up."""
    model = copy.deepcopy(model).bfloat16()
    together, alone = (trainer_of(w, model, distributed={"shard": True}) for w in (world, ALONE))
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in together.model.parameters())
    got, expected = together.step(), alone.step()
    assert got["reward"] == pytest.approx(expected["reward"], abs=0.2)
    assert got["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=0.5)
    assert any((weight != weight.bfloat16()).any() for weight in weights(together).values())


def check(rank: int, folder: Path) -> None:
    world = World(rank, 2)
    torch.manual_seed(0)
    model = build_model(Uneven(), SIZE).eval()
    check_updates(world, model)
    check_half_precision(world, model)
    check_adapters(world, model)


if __name__ == "__main__":
    both(check)
