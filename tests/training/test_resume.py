"""Stopping and going on again ends in the same bits as never having stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import diffpo
from diffpo.training import checkpointing
from diffpo.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def interrupt_in(monkeypatch):
    """interrupt_in(k, signal): the signal really arrives during update k, once."""

    def arm(update: int, number=signal.SIGINT) -> None:
        step = Trainer.step

        def interrupted(self):
            metrics = step(self)
            if self.update == update:
                monkeypatch.setattr(Trainer, "step", step)
                signal.raise_signal(number)
            return metrics

        monkeypatch.setattr(Trainer, "step", interrupted)

    return arm


@pytest.fixture
def assert_same_run(metrics_of, assert_same_weights):
    """Two finished run folders hold equal metrics and bitwise equal weights and optimizers."""

    def check(first: Path, second: Path) -> None:
        assert metrics_of(first) == metrics_of(second)
        assert_same_weights(first / "model", second / "model")
        a, b = (load_file(folder / "checkpoints/000004/optimizer.safetensors") for folder in (first, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)

    return check


@pytest.mark.parametrize(("k", "number"), [(1, signal.SIGINT), (3, signal.SIGTERM)])
def test_resume_diamond(train, whole_run, interrupt_in, assert_same_run, metrics_of, tmp_path, capsys, k, number):
    run = tmp_path / "run"
    interrupt_in(k, number)
    assert train() == 0
    assert f"interrupted after update {k}; continue with --resume" in capsys.readouterr().err
    assert [line["update"] for line in metrics_of(run)] == list(range(1, k + 1))
    assert not (run / "summary.json").exists()
    assert train("--resume") == 0
    assert f"resuming after update {k}" in capsys.readouterr().out
    assert_same_run(run, whole_run())


def test_resume_diamond_with_a_reference_model(train, interrupt_in, assert_same_run, tmp_path):
    """The KL is to the model the run began with, not to the one it was resumed from."""
    kl = ("--algorithm.kl-coefficient", "0.5", "--optimizer.lr", "1e-2")
    interrupt_in(2)
    assert train(*kl) == 0
    assert train(*kl, "--resume") == 0
    assert train(*kl, "--name", "whole") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_updates_after_the_last_checkpoint_are_repeated_and_logged_once(
    train, whole_run, finished_run, assert_same_run
):
    """As after a kill: the log is ahead of the checkpoints and ends in half a line."""
    run = finished_run()
    for path in run.glob("checkpoints/000004/*"):
        path.unlink()
    run.joinpath("checkpoints/000004").rmdir()
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + '{"update": 5, "rew')
    assert train("--resume") == 0
    assert_same_run(run, whole_run())


def test_handlers_are_restored(train):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train("--updates", "1") == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_finished_run_resumes_to_the_same_summary(train, finished_run, tmp_path):
    finished_run()
    before = json.loads((tmp_path / "run/summary.json").read_text())
    assert train("--resume") == 0
    after = json.loads((tmp_path / "run/summary.json").read_text())
    assert [after[key] for key in ("base", "heldout", "seed")] == [before[key] for key in ("base", "heldout", "seed")]
    assert {k: after["trained"][k] for k in ("accuracy", "nfe")} == {
        k: before["trained"][k] for k in ("accuracy", "nfe")
    }


def killed_before_the_rename(patch) -> None:
    rename = os.replace

    def killed(source, target):
        if str(target).endswith("000003"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    patch.setattr(os, "replace", killed)


def killed_while_writing(patch) -> None:
    save_file = checkpointing.save_file

    def killed(tensors, path):
        if "000003" in str(path):
            Path(path).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)

    patch.setattr(checkpointing, "save_file", killed)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [killed_before_the_rename, killed_while_writing])
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    train, whole_run, in_a_child, monkeypatch, assert_same_run, tmp_path, capsys, fault
):
    with monkeypatch.context() as patch:
        fault(patch)
        code, errors = in_a_child(train)
    assert code == -signal.SIGKILL, errors
    assert train("--resume") == 0
    assert "resuming after update 2" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole_run())
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir()) if not p.name.startswith(".")] == [
        "000003",
        "000004",
    ]


# What a child process runs: the real command with the quick sweep of the ``train`` fixture.
COMMAND = """
import sys
import torch
torch.set_num_threads(1)
import diffpo.train
from diffpo.decoding.rules import EntropyBounded
diffpo.train.parallel_rules = lambda task: [EntropyBounded(0.5)]
sys.exit(diffpo.train.main(sys.argv[1:]))
"""


def start(flags: list[str]) -> subprocess.Popen:
    search_path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    command = [sys.executable, "-c", COMMAND, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves_with_exit_code_0(train, flags, tmp_path):
    many = [*flags, "--updates", "100000"]
    process = start(many)
    log, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    finished = int(output.split("interrupted after update ")[1].split(";")[0])
    newest = max((tmp_path / "run/checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["update"] == finished == log.read_text().count("\n")
    diffpo.load(newest)


@pytest.mark.slow
@pytest.mark.parametrize("first", [24, 41, 58, 77, 96, 117, 149])
def test_a_run_killed_between_any_two_changes_of_files_goes_on(
    train, whole_run, killed_at, assert_same_run, tmp_path, first
):
    """The numbers are spread over a run of about 200 changes, the first ones of which are the copy of the tokenizer: of logs, checkpoints and the model."""
    assert killed_at(first, train)
    assert train("--resume") == 0
    assert_same_run(tmp_path / "run", whole_run())
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name not in (".lock", ".diffpo-run")]
