"""Injected faults: a run survives them, or stops with everything that was good still there."""

import errno
import io
import json
import math
import os
import resource
import shutil
import sys

import pytest
import torch

import diffpo.train
from diffpo.objectives.diffpo import Diffpo
from diffpo.training.checkpointing import checkpoints, newest, restore, save_state


def poison_loss(monkeypatch, calls: set[int]) -> None:
    """Make the loss, and with it the gradient, NaN in these calls, counted from 1."""
    loss, count = Diffpo.loss, 0

    def poisoned(self, *arguments):
        nonlocal count
        count += 1
        result = loss(self, *arguments)
        return result._replace(value=result.value * math.nan) if count in calls else result

    monkeypatch.setattr(Diffpo, "loss", poisoned)


def test_a_nan_gradient_with_a_finite_loss_is_skipped_and_counted(make_trainer):
    trainer = make_trainer(inner_updates=1)
    handle = trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.step()
    assert metrics["skipped_updates"] == 1
    assert math.isfinite(metrics["loss"])
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    handle.remove()
    metrics = trainer.step()
    assert (metrics["skipped_updates"], trainer.skipped_in_a_row) == (1, 0)
    assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_two_nan_losses_in_a_row_do_not_stop_a_run(train, monkeypatch, metrics_of, tmp_path):
    poison_loss(monkeypatch, {2, 3})
    assert train("--algorithm.inner-updates", "1") == 0
    assert [line["skipped_updates"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 2]


def test_three_in_a_row_stop_with_the_last_good_checkpoint(
    train, monkeypatch, assert_same_weights, metrics_of, tmp_path, capsys
):
    one = ("--algorithm.inner-updates", "1", "--updates", "8")
    with monkeypatch.context() as patch:
        poison_loss(patch, set(range(3, 100)))
        assert train(*one) == 1
    output = capsys.readouterr().err
    assert "3 updates in a row were not finite" in output.replace("\n", " ")
    assert not (tmp_path / "run/summary.json").exists()
    # an update whose groups are all of equal rewards has no loss to poison
    lines = metrics_of(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines if line["updated"]] == [0, 0, 1, 2]
    last_good = [line["update"] for line in lines if line["skipped_updates"] == 0][-1]
    newest = checkpoints(tmp_path / "run/checkpoints")[0]
    assert newest.name == f"{last_good:06}"
    assert train(*one, "--name", "clean") == 0
    assert train(*one, "--resume") == 0  # without the poison
    assert_same_weights(tmp_path / "clean/model", tmp_path / "run/model")


def test_a_reader_that_leaves_stops_a_run_with_all_that_was_done(
    train, whole_run, monkeypatch, assert_same_weights, tmp_path, capsys
):
    class Leaving(io.StringIO):
        def write(self, text):
            if "update    1/" in text:
                raise BrokenPipeError
            return super().write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Leaving())
        assert train("--save-every", "100") == 1
    assert capsys.readouterr().err == ""
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["000001"]
    assert train("--save-every", "100", "--resume") == 0
    assert_same_weights(tmp_path / "run/model", whole_run() / "model")


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink()], ids=["truncated", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(make_trainer, tmp_path, name, damage):
    trainer, weights = make_trainer(), []
    for _ in range(2):
        trainer.step()
        save_state(tmp_path, trainer.model, trainer.optimizer, trainer.state())
        weights.append(trainer.model.lm_head.weight.detach().clone())
    damage(tmp_path / "000002" / name)
    fresh = make_trainer()
    with pytest.warns(UserWarning, match="000002 is not readable"):
        state = restore(newest(tmp_path, fresh.model), fresh.model, fresh.optimizer)
    assert state["update"] == 1
    assert torch.equal(fresh.model.lm_head.weight, weights[0])


def test_a_run_goes_on_after_its_newest_checkpoint_was_damaged(
    train, whole_run, finished_run, assert_same_weights, tmp_path
):
    finished_run()
    truncate(tmp_path / "run/checkpoints/000004/model.safetensors")
    with pytest.warns(UserWarning, match="not readable"):
        assert train("--resume") == 0
    assert_same_weights(tmp_path / "run/model", whole_run() / "model")


def test_without_a_readable_checkpoint_a_run_begins_again(
    train, whole_run, finished_run, assert_same_weights, tmp_path
):
    finished_run()
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert train("--resume") == 0
    assert_same_weights(tmp_path / "run/model", whole_run() / "model")


def test_only_the_newest_checkpoints_stay_and_leftovers_do_not_count(make_trainer, tmp_path):
    trainer = make_trainer()
    (tmp_path / ".000009.partial").mkdir()
    for update in range(1, 5):
        save_state(tmp_path, trainer.model, trainer.optimizer, {"update": update})
    assert [path.name for path in checkpoints(tmp_path)] == ["000004", "000003"]


def limit_file_size(patch, size: int = 10_000) -> None:
    """A limit on file size makes every larger write fail in the kernel, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = diffpo.train.save_state

    def limited(folder, model, optimizer, state):
        if state["update"] != 3:
            return save(folder, model, optimizer, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            save(folder, model, optimizer, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    patch.setattr(diffpo.train, "save_state", limited)


def fail_rename(patch) -> None:
    rename = os.replace

    def full(source, target):
        if str(target).endswith("000003"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    patch.setattr(os, "replace", full)


@pytest.mark.parametrize("fault", [limit_file_size, fail_rename], ids=["weights", "rename"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(train, monkeypatch, tmp_path, capsys, fault):
    with monkeypatch.context() as patch:
        fault(patch)
        assert train() == 0
    assert "checkpoint not saved, training goes on" in capsys.readouterr().out
    assert [path.name for path in checkpoints(tmp_path / "run/checkpoints")] == ["000004", "000002"]
    assert not list((tmp_path / "run/checkpoints").glob(".*")), "left a partial checkpoint behind"
    assert json.loads((tmp_path / "run/summary.json").read_text())["heldout"] == 8


def test_weights_whose_logits_are_not_finite_are_not_called_good(train, monkeypatch, tmp_path, capsys):
    """They are finite themselves, but nothing can go on from them."""
    step = diffpo.train.Trainer.step

    def huge(self):
        metrics = step(self)
        if self.update == 2:
            self.model.lm_head.weight.data.fill_(3e38)
        return metrics

    monkeypatch.setattr(diffpo.train.Trainer, "step", huge)
    assert train("--save-every", "100") == 1
    error = capsys.readouterr().err
    assert "logits are NaN or infinite" in error
    assert error.strip().endswith("there is no checkpoint")
    assert checkpoints(tmp_path / "run/checkpoints") == []
