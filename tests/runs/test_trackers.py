"""A tracker may be missing, raise or hang: the run goes on, and metrics.jsonl is complete."""

import json
import sys
import threading
import types
import warnings

import pytest

from diffpo.runs import trackers
from diffpo.runs.metrics import MetricsLog
from diffpo.runs.trackers import check_tracker, numbers, open_tracker

LINES = [{"update": n, "reward": n / 4, "gamma": None, "gamma_histogram": [1, 2]} for n in range(1, 5)]


@pytest.fixture
def module(monkeypatch):
    """module(init, log, finish): stands for wandb; what it was told is in ``told``."""

    def make(init=None, log=None, finish=None) -> list:
        told: list = []

        class Run:
            def log(self, metrics, step):
                told.append((step, metrics))
                if log:
                    log(step)

            def finish(self):
                told.append("finished")
                if finish:
                    finish()

        def begin(**settings):
            told.append(settings)
            if init:
                init()
            return Run()

        fake = types.ModuleType("wandb")
        fake.init = begin
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return told

    return make


def written(folder, finished: int = 0) -> list[dict]:
    """The lines of a run of LINES whose tracker is wandb."""
    tracker = open_tracker("wandb", folder, {"seed": 0}, finished + 1, "name")
    log = MetricsLog(folder, finished, tracker)
    for line in LINES[finished:]:
        log.write(line)
    log.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_is_told_the_numbers_of_each_update(module, tmp_path):
    told = module()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert written(tmp_path) == LINES
    assert told[0] == {"project": "diffpo", "name": "name", "group": "name", "config": {"seed": 0}}
    assert told[1:] == [*((n, {"update": n, "reward": n / 4}) for n in range(1, 5)), "finished"]


def test_a_resumed_training_is_a_run_of_its_own_in_the_same_group(module, tmp_path):
    module()
    written(tmp_path)
    told = module()
    assert written(tmp_path, finished=2) == LINES
    assert (told[0]["name"], told[0]["group"]) == ("name from update 3", "name")
    assert [line[0] for line in told[1:-1]] == [3, 4]


def fault(*_):
    raise ConnectionError("the network\nis down")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_fault_is_one_warning(module, tmp_path, where):
    module(**{where: fault})
    with pytest.warns(UserWarning, match="wandb is not written any more") as said:
        assert written(tmp_path) == LINES
    (warning,) = said
    assert "wandb is not written any more: ConnectionError: the network is down; metrics.jsonl" in str(warning.message)


def test_a_tracker_that_ends_the_program_does_not(module, tmp_path):
    module(init=lambda: sys.exit(3))
    with pytest.warns(UserWarning, match="SystemExit: 3"):
        assert written(tmp_path) == LINES


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_costs_a_moment_and_a_warning(module, tmp_path, monkeypatch, where):
    release = threading.Event()
    module(**{where: lambda *_: release.wait(60)})
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    try:
        with pytest.warns(UserWarning, match="wandb is not written any more") as said:
            assert written(tmp_path) == LINES
    finally:
        release.set()
    (warning,) = said
    assert "did not end within 0.2 seconds" in str(warning.message)


def test_a_tracker_that_cannot_follow_does_not_fill_the_memory(module, tmp_path, monkeypatch):
    release = threading.Event()
    module(init=lambda: release.wait(60))
    monkeypatch.setattr(trackers, "_WAITING", 2)
    try:
        with pytest.warns(UserWarning, match="wandb is not written any more") as said:
            assert written(tmp_path) == LINES
    finally:
        release.set()
    (warning,) = said
    assert "2 updates behind" in str(warning.message)


def test_a_package_that_is_missing_is_a_mistake(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="tracker: wandb ") as refused:
        check_tracker("wandb")
    assert "\n" not in str(refused.value)


def test_a_package_that_does_not_import_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    (tmp_path / "trackio.py").write_text("raise TypeError('no such descriptor')\n")
    with pytest.raises(ValueError, match="tracker: trackio does not import: no such descriptor"):
        check_tracker("trackio")
    (tmp_path / "trackio.py").write_text("import no_such_module_of_trackio\n")
    with pytest.raises(ValueError, match="tracker: trackio does not import: No module named"):
        check_tracker("trackio")


def test_nothing_is_imported_that_was_not_chosen(tmp_path, monkeypatch):
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    check_tracker(None)
    check_tracker("none")
    tracker = open_tracker("none", tmp_path, {}, 1, "name")
    tracker.write({"update": 1})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_lists_and_nulls_are_no_numbers():
    assert numbers({"a": 1, "b": 0.5, "c": None, "d": [1], "e": "x"}) == {"a": 1, "b": 0.5}
