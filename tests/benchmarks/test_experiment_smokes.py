"""The experiments run from end to end at the smallest size."""

import importlib
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffpo.tasks.medley.kinds import KINDS

EXPERIMENTS = Path(__file__).parents[2] / "benchmarks" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
study = pytest.importorskip("study")


def run_smoke(monkeypatch, name: str, flags: list[str], output: Path) -> dict:
    """In this process; sampler's training and decoding start their own."""
    monkeypatch.setattr(sys, "argv", [str(EXPERIMENTS / f"{name}.py"), "--smoke", *flags])
    importlib.import_module(name).main()
    document = json.loads((output / f"{name}.json").read_text())
    assert str(output) not in json.dumps(document), "a folder of this machine was recorded"
    return document


def train_here(command: list[str], **_) -> subprocess.CompletedProcess:
    """``python -m diffpo.train`` in this process, which has everything imported."""
    from diffpo.train import main

    assert command[:3] == [sys.executable, "-m", "diffpo.train"]
    return subprocess.CompletedProcess(command, main(command[3:]), "")


def train_in_this_process(monkeypatch) -> None:
    """One run after the other."""
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=train_here, PIPE=None, STDOUT=None))
    monkeypatch.setattr(study, "ThreadPoolExecutor", lambda jobs: nullcontext(SimpleNamespace(map=map)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["estimators", "sampler"])
def test_smoke_of_a_study(name: str, tmp_path: Path, monkeypatch) -> None:
    if name == "estimators":
        train_in_this_process(monkeypatch)
    folders = ["--output", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    flags = ["--jobs", "1", "--tasks", "countdown", *folders]
    document = run_smoke(monkeypatch, name, flags, tmp_path / "results")
    assert document["reading"]
    assert document["tasks"]
    assert document["provenance"]["versions"]["torch"]
    assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_smoke_of_the_adaptive_study(tmp_path: Path, monkeypatch) -> None:
    train_in_this_process(monkeypatch)
    folders = ["--output", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    flags = ["--jobs", "1", "--tasks", "medley", "--arms", "std", *folders]
    found = run_smoke(monkeypatch, "adaptive", flags, tmp_path / "results")["tasks"]["medley"]
    assert [(run["arm"], run["seed"]) for run in found["runs"]] == [("std", 0)]
    assert found["arms"]["std"]["kinds"].keys() == found["careful"].keys() == set(KINDS)
    decoded = json.loads((tmp_path / "results/adaptive/decoded/medley-std-seed0.json").read_text())
    assert set(decoded["unseen"]["kinds"]) == set(KINDS) - {"countdown"}, "it has one difficulty"


@pytest.mark.slow
def test_smoke_of_the_importance_study(tmp_path: Path, monkeypatch) -> None:
    train_in_this_process(monkeypatch)
    folders = ["--output", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    arms = ["default-none", "default-quarter", "careful-sequence"]
    found = run_smoke(
        monkeypatch, "importance", ["--tasks", "countdown", "--arms", *arms, *folders], tmp_path / "results"
    )
    numbers = found["tasks"]["countdown"]
    assert list(numbers) == arms
    assert numbers["default-quarter"]["to_default-none_points"]["n"] == 1
    assert "to_careful-none_points" not in numbers["careful-sequence"], "there is none to compare with"
    assert all(
        0 < mean <= 1 + 1e-5 for mean in numbers["default-quarter"]["weights"]["weight_mean"] if mean is not None
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["surrogate_gap", "headroom"])
def test_smoke(name: str, tmp_path: Path, monkeypatch) -> None:
    folders = ["--output", str(tmp_path), "--runs", str(tmp_path / "runs")]
    document = run_smoke(monkeypatch, name, folders, tmp_path)
    assert document["rows"]
    assert document["reading"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert document["provenance"]["git_commit"] is None or len(document["provenance"]["git_commit"]) >= 40
    if name == "headroom":
        assert all(
            row["oracle"]["value"] >= row[way]["value"] for row in document["rows"] for way in ("fixed", "fitted")
        )
    else:
        gaps = {row["m"]: row["all"]["kl"] for row in document["rows"] if row["model"] == "tiny-countdown"}
        assert abs(gaps["T"]) < 1e-5 < gaps[1]
