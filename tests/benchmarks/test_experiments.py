"""The experiments run from end to end at the smallest size, and their bookkeeping."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "benchmarks" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
study = pytest.importorskip("study")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["surrogate_gap", "group_sharing"])
def test_smoke(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["rows"]
    assert document["provenance"]["git_commit"] is None or len(document["provenance"]["git_commit"]) >= 40
    if name == "group_sharing":
        assert all(row["calls"]["shared"] < row["calls"]["unshared"] for row in document["rows"])
        assert all(row["largest_logprob_difference"] < 1e-5 for row in document["rows"])
    else:
        gaps = {row["m"]: row["all"]["kl"] for row in document["rows"] if row["model"] == "tiny-countdown"}
        assert abs(gaps["T"]) < 1e-5 < gaps[1]


def test_curve_averages_windows_and_adds_up_seconds() -> None:
    lines = [{"update": i + 1, "reward": float(i), "seconds/rollout": 1.0, "seconds/update": 0.5} for i in range(4)]
    del lines[1]["reward"]  # an update without it
    curve = study.curve(lines, points=2)
    assert curve["update"] == [1.5, 3.5]
    assert curve["reward"] == [0.0, 2.5]
    assert curve["seconds"] == [3.0, 6.0]
    assert curve["kl"] == [None, None]


def test_switches_are_negated_by_name() -> None:
    assert study.no("algorithm.importance-correction") == "algorithm.no-importance-correction"
