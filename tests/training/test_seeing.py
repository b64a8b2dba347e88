"""What a training shows while it goes on: lines, a tracker, and the page of a run that was stopped."""

import json
import sys
import threading
import types

import pytest

import diffpo.report
from diffpo.runs import trackers
from diffpo.training.trainer import Trainer


@pytest.fixture
def wandb(monkeypatch):
    """wandb(act): a module whose log does ``act``; returns the steps that it was told."""

    def make(act) -> list[int]:
        steps: list[int] = []

        def log(metrics, step):
            steps.append(step)
            act()

        fake = types.ModuleType("wandb")
        fake.init = lambda **_: types.SimpleNamespace(log=log, finish=lambda: None)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return steps

    return make


def test_a_tracker_sees_every_update(train, wandb, tmp_path):
    steps = wandb(lambda: None)
    assert train("--tracker", "wandb") == 0
    assert steps == [1, 2, 3, 4]
    assert not (tmp_path / "run/tensorboard").exists()


def fault() -> None:
    raise ConnectionError("down")


def test_a_tracker_that_fails_changes_nothing(train, wandb, tmp_path, metrics_of, whole_run, assert_same_weights):
    steps = wandb(fault)
    with pytest.warns(UserWarning, match="ConnectionError: down; metrics.jsonl has every number"):
        assert train("--tracker", "wandb") == 0
    assert steps == [1]
    assert metrics_of(tmp_path / "run") == metrics_of(whole_run())
    assert_same_weights(tmp_path / "run/model", whole_run() / "model")


def test_a_tracker_that_hangs_changes_nothing(train, wandb, tmp_path, metrics_of, whole_run, monkeypatch):
    release = threading.Event()
    wandb(lambda: release.wait(60))
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    try:
        with pytest.warns(UserWarning, match="did not end within"):
            assert train("--tracker", "wandb") == 0
    finally:
        release.set()
    assert metrics_of(tmp_path / "run") == metrics_of(whole_run())
    assert (tmp_path / "run/summary.json").exists()


def test_a_missing_tracker_is_a_mistake_before_anything_is_loaded(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(SystemExit) as stopped:
        train("--tracker", "trackio", "--model", "no such model")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: tracker: trackio ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_tracker_and_samples_may_change_on_a_resume_and_be_unknown_to_an_earlier_version(train, finished_run):
    run = finished_run()
    settings = json.loads((run / "config.json").read_text())
    del settings["samples"], settings["tracker"]
    (run / "config.json").write_text(json.dumps(settings))
    assert train("--resume", "--tracker", "none", "--samples.every", "3") == 0


def test_lines_say_the_time_that_is_left(train, capsys):
    assert train() == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update    1/4")]
    assert line.endswith(" s left")
    assert len(line) < 200


def test_the_trainer_says_its_phases(make_trainer):
    trainer, phases = make_trainer(), []
    trainer.on_phase = phases.append
    trainer.step()
    assert phases == ["rollout", "score", "update"]


def test_what_is_done_beside_the_updates_is_in_the_metrics(train, tmp_path):
    assert train("--guard.every", "2", "--guard.problems", "4", "--samples.every", "3", "--save-every", "2") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    beside = [{name for name in line if name in ("seconds/guard", "seconds/samples", "seconds/save")} for line in lines]
    assert beside == [set(), {"seconds/guard"}, {"seconds/samples", "seconds/save"}, {"seconds/guard"}]


def test_an_interrupted_run_has_a_page_and_its_continuation_another(train, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(self):
        metrics = step(self)
        if self.update == 2:
            raise KeyboardInterrupt
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert train() == 0
    assert not (tmp_path / "run/report.html").exists()
    assert diffpo.report.main([str(tmp_path / "run")]) == 0
    assert "not finished: 1 of 4 updates" in (tmp_path / "run/report.html").read_text()
    assert train("--resume") == 0
    assert "finished, 4 updates" in (tmp_path / "run/report.html").read_text()
