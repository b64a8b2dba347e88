"""Shared by the training tests: a tiny random sudoku model and a complete run in about a second.

Sudoku, because its reward is the fraction of right cells: an untrained model already has groups of unequal reward.
"""

import functools
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import torch

import diffpo.train
from diffpo.config import ModelSize
from diffpo.decoding.rules import EntropyBounded
from diffpo.models.checkpoints import load
from diffpo.pretrain import build_model
from diffpo.tasks import get_task
from diffpo.training.config import TrainConfig
from diffpo.training.trainer import Trainer

SIZE = ModelSize(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="session")
def sudoku_model(tmp_path_factory) -> str:
    """The folder of an untrained sudoku model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "sudoku"
    build_model(get_task("sudoku"), SIZE).save(folder)
    return str(folder)


def flags_of_a_run(model: str, runs: Path) -> list[str]:
    """Of a short run called "run" in the folder ``runs``."""
    return [
        *("--model", model, "--task", "sudoku", "--name", "run", "--runs", str(runs)),
        *("--heldout", "8", "--updates", "4", "--save-every", "1"),
        *("--algorithm.prompts-per-update", "4", "--algorithm.group-size", "4"),
    ]


def shorten_the_report(patch: pytest.MonkeyPatch) -> None:
    """Without the full sweep of rules and without the figure, which take longer than the training; see test_reports.py."""
    patch.setattr(diffpo.train, "parallel_rules", lambda task: [EntropyBounded(0.5)])
    patch.setattr(diffpo.train, "draw_curves", lambda lines, path, title: None)


@pytest.fixture
def flags(sudoku_model, tmp_path) -> list[str]:
    """Flags of a short run called "run" in tmp_path."""
    return flags_of_a_run(sudoku_model, tmp_path)


@pytest.fixture
def train(flags, monkeypatch):
    """train(*more flags) -> exit code of ``python -m diffpo.train`` with a short report; a flag given twice takes its last value."""
    shorten_the_report(monkeypatch)
    return lambda *more: diffpo.train.main([*flags, *more])


@pytest.fixture(scope="session")
def train_into(sudoku_model):
    """train_into(runs, *more flags) -> exit code, as ``train``, of a run in the folder ``runs``."""

    def run(runs: Path, *more: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            shorten_the_report(patch)
            return diffpo.train.main([*flags_of_a_run(sudoku_model, runs), *more])

    return run


@pytest.fixture(scope="session")
def whole_run(train_into, tmp_path_factory):
    """whole_run(*more flags) -> the folder of ``train(*more flags)`` when nothing stops it, made once: to compare with, not to change."""

    @functools.cache
    def run(*more: str) -> Path:
        runs = tmp_path_factory.mktemp("whole")
        assert train_into(runs, *more) == 0
        return runs / "run"

    return run


@pytest.fixture
def finished_run(whole_run, tmp_path):
    """finished_run(*more flags) -> what ``train(*more flags)`` leaves in tmp_path when nothing stops it: a copy of the whole run."""
    return lambda *more: Path(shutil.copytree(whole_run(*more), tmp_path / "run"))


@pytest.fixture
def make_trainer(sudoku_model):
    """make_trainer(**AlgorithmConfig fields) -> Trainer on the sudoku model, or another one of the task."""

    def build(
        rollout: dict | None = None, compile: bool = False, update: dict | None = None, model=None, **algorithm
    ) -> Trainer:
        algorithm = {"name": "diffpo", "prompts_per_update": 4, "group_size": 4} | algorithm
        config = TrainConfig(task="sudoku", updates=4, compile=compile, algorithm=algorithm, rollout=rollout or {},
                             update=update or {})  # fmt: skip
        return Trainer(config, model or load(sudoku_model), get_task("sudoku"))

    return build


@pytest.fixture
def metrics_of():
    """metrics_of(run folder) -> the lines of metrics.jsonl without their wall-clock values."""

    def read(folder) -> list[dict]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in lines]

    return read


@pytest.fixture
def assert_same_weights():
    """assert_same_weights(folder, folder): two checkpoint folders hold bitwise equal models."""

    def check(first, second) -> None:
        a, b = load(first).state_dict(), load(second).state_dict()
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name

    return check


@pytest.fixture
def killed_at():
    """killed_at(n, act) -> whether a child process that does ``act`` was killed before its n-th change of a file; it cleans nothing up."""

    def kill(event: int, act) -> bool:
        child = os.fork()
        if child == 0:
            left = event

            def watch(name, arguments):
                nonlocal left
                writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if writes or name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                    left -= 1
                    if left == 0:
                        os._exit(9)

            try:
                sys.addaudithook(watch)
                act()
            except BaseException:
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        return code == 9

    return kill


@pytest.fixture
def in_a_child():
    """in_a_child(act) -> exit code (of a signal: less than zero) and standard error of a forked process that returns what ``act`` does."""

    def run(act) -> tuple[int, str]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with open(os.devnull, "w") as sys.stdout, open(writing, "w") as sys.stderr:
                    try:
                        code = act()
                    except BaseException:
                        traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writing)
        with open(reading) as errors:
            said = errors.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

    return run
