"""A task of four members goes through rollouts, training, evaluation and `diffpo.grade`; a reward of None is legal in each of them."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import diffpo
from diffpo import Grade, MaskedDiffusionLM, ModelConfig
from diffpo.decoding.rules import EntropyBounded
from diffpo.evaluation import evaluate
from diffpo.keyed_random import derive
from diffpo.models.word_tokenizer import word_tokenizer
from diffpo.objectives.advantage import group_advantage
from diffpo.tasks import Task
from diffpo.tasks.prompts import prompt_ids
from diffpo.tasks.task import Lengths, begun, completion_lengths
from diffpo.training.config import TrainConfig
from diffpo.training.rollout import collect
from diffpo.training.trainer import Trainer

LENGTHS = Lengths(4, 2)
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


class Echo(Task[str]):
    """Repeat the word; the reward is the share of right tokens."""

    name = "echo"

    def problems(self, split, count, seed):
        return np.random.default_rng(seed).choice(list("abc"), size=count).tolist()

    def prompt(self, problem):
        return f"say {problem}"

    def grade(self, problem, text):
        said = text.split()
        return Grade(said.count(problem) / 4, said == [problem] * 4)


class Undecided(Echo):
    """No reward for the words in ``of``."""

    def __init__(self, of="abc"):
        self.of = of

    def grade(self, problem, text):
        return Grade(None, None) if problem in self.of else super().grade(problem, text)


class Chatty(Echo):
    """The same as a chat whose answer is begun."""

    def prompt(self, problem):
        return [{"role": "user", "content": f"say {problem}"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def model() -> MaskedDiffusionLM:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(["say", "a", "b", "c"])
    config = ModelConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, mask_token_id=tokenizer.mask_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return MaskedDiffusionLM(config, tokenizer)


def rollouts(model, task, prompts=8):
    return collect(model, task, prompts, 4, EntropyBounded(0.5), 1.0, speed_exponent=0.0, seed=1, lengths=LENGTHS)


def trainer(model, task, prompts=8) -> Trainer:
    algorithm = {"name": "diffpo", "prompts_per_update": prompts, "group_size": 4}
    config = TrainConfig(algorithm=algorithm, rollout={"gen_length": 4, "block_length": 2})
    return Trainer(config, model, task)


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def changed(model, before) -> bool:
    return any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_rollouts(model):
    rollout = rollouts(model, Echo())
    assert rollout.trajectory.tokens.shape == (32, 4)
    assert rollout.trajectory.block_length == 2
    assert rollout.task_reward.unique().numel() > 1
    assert (rollout.task_reward * 4 == (rollout.task_reward * 4).round()).all()


def test_an_update(model):
    training = trainer(model, Echo())
    before = weights(model)
    metrics = training.step()
    assert metrics["updated"] == 1
    assert math.isfinite(metrics["loss"])
    assert changed(model, before)


def test_evaluation(model):
    task = Echo()
    problems = task.problems("test", 10, 0)
    found = evaluate(model, task, problems, EntropyBounded(0.5), LENGTHS, batch_size=4)
    out = diffpo.generate(model, [task.prompt(p) for p in problems], *LENGTHS, EntropyBounded(0.5))
    expected = [task.grade(problem, text).reward for problem, text in zip(problems, out.text, strict=True)]
    assert (found.done, found.mean_reward) == (10, pytest.approx(sum(expected) / 10))


def test_grade_takes_its_problems():
    assert diffpo.grade(Echo(), "a", "a a a a") == Grade(1.0, True)
    assert diffpo.grade(Echo(), "a", "a b a b") == Grade(0.5, False)
    assert diffpo.grade(Undecided(), "a", "a") == Grade(None, None)
    assert diffpo.grade(Echo(), "a", None) == Grade(None, None)


def test_the_example_of_the_documentation():
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), flags=re.DOTALL)
    found: dict = {}
    exec(code, found)
    task = found["Sums"]()
    assert task.problems("train", 5, 0) == task.problems("train", 5, 0) != task.problems("test", 5, 0)
    assert diffpo.grade(task, (2, 3), "it is 5") == Grade(1.0, True)
    assert diffpo.grade(task, (2, 3), "") == Grade(0.0, False)
    assert "2 + 3" in task.prompt((2, 3))[0]["content"]


def test_lengths_are_a_setting():
    assert completion_lengths(Echo()) == (256, 32)
    assert completion_lengths(Echo(), 8) == (8, 8)
    assert completion_lengths(Echo(), 8, 4) == (8, 4)
    assert completion_lengths(diffpo.tasks.Countdown()) == (12, 12)
    assert completion_lengths(diffpo.tasks.Countdown(), 6) == (6, 6)
    assert completion_lengths(diffpo.tasks.Countdown(format="chat")) == (256, 32)


def test_the_grade_reads_what_the_prompt_has_begun(model):
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    task, seen = Chatty(), []
    grade = task.grade
    task.grade = lambda problem, text: seen.append(text) or grade(problem, text)
    rollouts(model, task, prompts=1)
    evaluate(model, task, ["b"], EntropyBounded(0.5), LENGTHS)
    assert len(seen) == 5
    assert all(text.startswith("a") for text in seen)
    assert begun(task.prompt("b")) == "a"
    assert begun("text") == begun([{"role": "user", "content": "x"}]) == ""


class Mixed(Echo):
    """Another kind of prompt for the word "b"."""

    def __init__(self, other):
        self.other = other

    def prompt(self, problem):
        return self.other if problem == "b" else super().prompt(problem)


OTHERS = {
    "a chat": [{"role": "user", "content": "say b"}],
    "a tuple": ({"role": "user", "content": "say b"},),
    "nothing": None,
}


@pytest.mark.parametrize("problems", [["a", "b"], ["b", "a", "a"]], ids=["last", "first"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_prompts_of_two_kinds_are_refused_wherever_they_are_asked(model, other, problems):
    """Not one of them is left out, and none is read as the other kind."""
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    task = Mixed(other)
    with pytest.raises(ValueError, match="task echo: its prompts must all be texts or all be chats"):
        prompt_ids(model.tokenizer, task, problems)
    with pytest.raises(ValueError, match="task echo: its prompts must all be texts or all be chats"):
        evaluate(model, task, problems, EntropyBounded(0.5), LENGTHS)
    with pytest.raises(ValueError, match="prompts must all be strings, all be chats"):
        rollouts(model, task)
    assert [len(ids) for ids in prompt_ids(model.tokenizer, task, ["a", "c"])] == [2, 2]


# A reward of None


def test_a_rollout_without_a_reward_is_dropped(model):
    rollout = rollouts(model, Undecided("a"))
    problems = Echo().problems("train", 8, derive(1, 0))
    open_ones = torch.tensor([problem == "a" for problem in problems]).repeat_interleave(4)
    assert 0 < open_ones.sum() < 32
    assert torch.equal(rollout.task_reward.isnan(), open_ones)
    assert torch.equal(rollout.reward.isnan(), open_ones)
    assert not rollout.correct[open_ones].any()


@pytest.mark.parametrize("kind", ["mean", "std", "leave_one_out"])
def test_a_group_without_rewards_has_no_advantage(kind):
    reward = torch.tensor([math.nan] * 3 + [0.0, 1.0, math.nan])
    advantage = group_advantage(reward, 3, kind)
    assert advantage[:3].tolist() == [0, 0, 0]
    assert advantage[5] == 0
    assert advantage[3] < 0 < advantage[4]


def test_an_update_with_some_groups_undecided(model):
    metrics = trainer(model, Undecided("a")).step()
    assert 0 < metrics["dropped_rewards"] < 32
    assert metrics["dropped_rewards"] % 4 == 0
    assert metrics["updated"] == 1
    assert math.isfinite(metrics["loss"])
    assert math.isfinite(metrics["reward"])


def test_an_update_of_a_batch_without_rewards_is_skipped_and_says_so(model):
    training = trainer(model, Undecided())
    before = weights(model)
    for _ in range(4):  # it is no divergence, however often
        metrics = training.step()
        assert (metrics["dropped_rewards"], metrics["updated"], metrics["zero_advantage_fraction"]) == (32, 0, 1.0)
        assert (metrics["skipped_updates"], "loss" in metrics) == (0, False)
        assert math.isnan(metrics["reward"])
    assert not changed(model, before)
    assert training.update == 4


def test_an_evaluation_counts_what_is_undecided(model):
    task = Undecided("ab")
    problems = task.problems("test", 20, 0)
    found = evaluate(model, task, problems, EntropyBounded(0.5), LENGTHS)
    assert found.undecided == sum(problem in "ab" for problem in problems) > 0
    assert found.mean_reward is not None
    assert evaluate(model, Undecided(), problems, EntropyBounded(0.5), LENGTHS).mean_reward is None
