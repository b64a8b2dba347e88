"""Each mode trains what it says and nothing else; every objective runs; what cannot learn costs nothing."""

import math

import pytest
import torch

from diffpo.decoding.rules import EntropyBounded, FixedSchedule, PromptThreshold
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.tasks import Grade


def changed_parameters(trainer, updates: int = 2) -> set[str]:
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    for _ in range(updates):
        trainer.step()
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("train", [("model", "threshold"), ("model",), ("threshold",)], ids=str)
def test_what_is_trained_changes_and_nothing_else(make_trainer, train):
    trainer = make_trainer(train=train)
    names = {name for name, _ in trainer.model.named_parameters()}
    threshold = {name for name in names if name.startswith("threshold.")}
    expected = (threshold if "threshold" in train else set()) | (names - threshold if "model" in train else set())
    assert bool(threshold) == ("threshold" in train)
    assert changed_parameters(trainer) == expected


def test_training_the_model_leaves_an_existing_threshold_alone(make_trainer, sudoku_model, tmp_path):
    make_trainer().model.save(tmp_path)
    trainer = make_trainer(train=("model",))
    trainer.model.add_threshold((0.0, 1.0))
    trainer = type(trainer)(trainer.config, trainer.model, trainer.task)
    assert not any(name.startswith("threshold.") for name in changed_parameters(trainer))


def test_rules_of_the_rollouts(make_trainer):
    joint, model = make_trainer(), make_trainer({"gamma": 0.25, "order": "margin"}, train=("model",))
    assert isinstance(joint.rule, PromptThreshold)
    assert joint.rule.sample
    assert not joint.evaluation_rule.sample
    assert isinstance(model.rule, EntropyBounded)
    assert (model.rule.gamma.item(), model.rule.order) == (0.25, "margin")
    alone = make_trainer(train=("model",)).rule
    assert (alone.gamma.item(), alone.order) == (pytest.approx(0.1), "confidence")


def test_d1_is_rolled_out_as_published(make_trainer):
    trainer = make_trainer({"rule": "fixed", "steps": 8}, name="d1", inner_updates=1)
    assert isinstance(trainer.rule, FixedSchedule)
    assert trainer.step()["nfe"] == 8


def test_bins_other_than_the_model_was_trained_with_start_a_fresh_threshold(make_trainer):
    trainer = make_trainer({"threshold_gammas": (0.0, 0.5)})
    assert trainer.model.threshold.gammas.tolist() == [0.0, 0.5]
    assert len(trainer.step()["gamma_histogram"]) == 2


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "d1", "inner_updates": 3},
        {"name": "espo"},
        {"name": "tracerl", "merged_steps": 3},
        {"m": 0},
        {"m": 3, "kl_coefficient": 0.1, "advantage": "leave_one_out"},
        {"m": 1, "importance_weights": "none", "advantage": "std", "inner_updates": 1},
    ],
    ids=["d1", "espo", "tracerl", "exact", "three-times mean field", "mean field"],
)  # fmt: skip
def test_objectives_run_with_finite_metrics(make_trainer, algorithm):
    trainer = make_trainer(**algorithm)
    for _ in range(2):
        metrics = trainer.step()
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    assert metrics["ratio_mean"] == pytest.approx(1, abs=0.1)
    assert metrics["skipped_updates"] == 0


def test_d1_runs_from_the_command_line_with_its_published_settings(train, tmp_path, metrics_of):
    assert train("--algorithm.name", "d1", "--updates", "2") == 0
    assert len(metrics_of(tmp_path / "run")) == 2
    assert '"inner_updates": 12' in (tmp_path / "run/config.json").read_text()


def test_equal_rewards_leave_the_model_alone_and_are_counted(make_trainer, monkeypatch):
    trainer = make_trainer({"speed_exponent": 0.0}, kl_coefficient=0.0)
    monkeypatch.setattr(trainer.task, "grade", lambda problem, text: Grade(0.5, False))
    before = trainer.denoiser_calls.copy()
    assert changed_parameters(trainer, updates=1) == set()
    assert trainer.step()["zero_advantage_fraction"] == 1
    assert set(trainer.denoiser_calls) - set(before) == {"rollout"}, "scored a batch without a gradient"


def test_nan_rewards_are_dropped(make_trainer, monkeypatch):
    trainer = make_trainer()
    grade = trainer.task.grade
    nothing = Grade(math.nan, None)
    monkeypatch.setattr(trainer.task, "grade", lambda p, text: nothing if text.startswith("1") else grade(p, text))
    metrics = trainer.step()
    assert 0 < metrics["dropped_rewards"] < 16
    assert math.isfinite(metrics["reward"])
    assert math.isfinite(metrics["loss"])
    assert metrics["skipped_updates"] == 0


def test_equal_configurations_give_equal_trajectories(make_trainer):
    """A KL of weight zero, or next to it, changes the cost of an update and not its result."""
    without, negligible = make_trainer(kl_coefficient=0.0), make_trainer(kl_coefficient=1e-30)
    assert without.reference is None
    assert negligible.reference is not None
    for _ in range(2):
        first, second = without.step(), negligible.step()
        assert [first[k] for k in ("reward", "loss", "ess")] == [second[k] for k in ("reward", "loss", "ess")]


def test_compiled_layers_train_alike(make_trainer):
    eager, compiled = make_trainer(m=1, inner_updates=1), make_trainer(m=1, inner_updates=1, compile=True)
    metrics = [trainer.step() for trainer in (eager, compiled)]
    for name in ("reward", "nfe", "denoiser_calls"):
        assert metrics[0][name] == metrics[1][name]
    assert metrics[1]["gradient_norm"] == pytest.approx(metrics[0]["gradient_norm"], rel=1e-3)


def test_latents_drawn_once_a_batch_are_scored_by_old_and_reference_once(make_trainer, monkeypatch):
    trainer = make_trainer(inner_updates=3)
    scored, loss = [], trainer.objective.loss

    def spy(batch, signal, new, old, reference):
        scored.append((new, old, reference))
        return loss(batch, signal, new, old, reference)

    monkeypatch.setattr(trainer.objective, "loss", spy)
    trainer.step()
    first = scored[0][0].logprob
    for new, old, reference in scored:
        assert torch.equal(old.logprob, first), "old is the policy that rolled out, in every inner update"
        assert not old.logprob.requires_grad
        assert torch.equal(reference.logprob, scored[0][2].logprob)
        assert new.logprob.requires_grad
    assert not torch.equal(scored[2][0].logprob, first), "theta moves between inner updates"
    assert trainer.denoiser_calls["update"] == 3 * trainer.denoiser_calls["score"]


def test_fresh_latents_differ_between_inner_updates(make_trainer, monkeypatch):
    trainer = make_trainer(inner_updates=3, fresh_latents=True)
    drawn, latents = [], trainer.objective.latents
    monkeypatch.setattr(trainer.objective, "latents", lambda *given: drawn.append(latents(*given)) or drawn[-1])
    trainer.step()
    assert len({tuple(one.masked.flatten().tolist()) for one in drawn}) == 3


def test_an_update_in_parts_is_the_update_at_once(make_trainer):
    whole, parts = make_trainer(), make_trainer(update={"tokens_at_once": 100})
    for trainer in (whole, parts):
        trainer.model.double()  # rounding in float32 may change what the second update's rollouts commit
    for _ in range(2):
        first, second = whole.step(), parts.step()
        for name in ("reward", "nfe", "update"):
            assert first[name] == second[name]
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-6)
        assert second["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-5)


def test_rollouts_say_who_they_are(make_trainer, monkeypatch):
    trainer, seen = make_trainer(), []
    optimise = trainer._optimise
    monkeypatch.setattr(trainer, "_optimise", lambda batch: seen.append(batch.trajectory) or optimise(batch))
    trainer.step(), trainer.step()
    keys = torch.cat([trajectory.key for trajectory in seen])
    assert len(keys.unique()) == len(keys)
    assert all((trajectory.group == trajectory.key // 4 * 4).all() for trajectory in seen), "its first member's"
    assert [int(trajectory.version[0]) for trajectory in seen] == [0, 1]


def test_a_run_that_goes_on_with_other_batches_draws_nothing_twice(make_trainer, monkeypatch):
    first, second = make_trainer(), make_trainer(prompts_per_update=3, group_size=3)
    seen = []
    for trainer in (first, second):
        collect = trainer.collect
        monkeypatch.setattr(trainer, "collect", lambda collect=collect: seen.append(collect()) or seen[-1])
    first.step(), first.step()
    second.restore(first.state())
    second.step(), second.step()
    keys = torch.cat([rollout.trajectory.key for rollout in seen])
    assert len(keys.unique()) == len(keys) == 16 + 16 + 9 + 9
    groups = [rollout.trajectory.group.unique(return_counts=True) for rollout in seen]
    assert [counts.tolist() for _, counts in groups] == [[4] * 4] * 2 + [[3] * 3] * 2
    assert len(torch.cat([group for group, _ in groups]).unique()) == 14


def test_a_new_threshold_reads_the_prompt_and_a_trained_one_what_it_read(make_trainer):
    rollout = {"threshold_gammas": (0.1, 4.0)}
    model = make_trainer(rollout=rollout).model
    assert model.config.threshold_reads == "both"
    policy = model.threshold
    assert make_trainer(rollout=rollout, model=model).model.threshold is policy, "training goes on with it"
    earlier = make_trainer(rollout=rollout | {"threshold_reads": "completion"}).model
    policy = earlier.threshold
    assert policy.linear.in_features == earlier.config.hidden_size
    assert make_trainer(rollout=rollout, model=earlier).model.threshold is policy
    assert make_trainer(rollout=rollout | {"threshold_reads": "both"}, model=earlier).model.threshold is not policy


def test_a_frozen_threshold_is_no_action_of_the_model(make_trainer, monkeypatch):
    joint = make_trainer(rollout={"threshold_gammas": (0.1, 4.0)})
    trainer = make_trainer(train=["model"], rollout={"rule": "learned"}, model=joint.model)
    seen, optimise = [], trainer._optimise
    monkeypatch.setattr(trainer, "_optimise", lambda batch: seen.append(batch.trajectory) or optimise(batch))
    metrics = trainer.step()
    assert seen[0].actions == {}
    assert sum(metrics["gamma_histogram"]) == 16, "what it drew is still reported"
    assert all(p.grad is None for p in trainer.model.threshold.parameters())


def test_no_pass_of_a_training_is_larger_than_asked(train, monkeypatch):
    largest, forward = [], MaskedDiffusionLM.forward

    def seen(self, tokens, *others, **more):
        largest.append(tokens.numel())
        return forward(self, tokens, *others, **more)

    monkeypatch.setattr(MaskedDiffusionLM, "forward", seen)
    assert train("--update.tokens-at-once", "100", "--updates", "1") == 0
    assert 50 < max(largest) <= 100


def test_tracerl_keeps_and_scores_no_starting_model(make_trainer):
    """Its KL is to the policy that rolled out."""
    trainer = make_trainer(name="tracerl", kl_coefficient=0.1, inner_updates=2)
    metrics = trainer.step()
    assert trainer.reference is None
    assert metrics["updated"] == 1
    assert trainer.denoiser_calls["score"] == 0
    assert metrics["kl"] > 0
