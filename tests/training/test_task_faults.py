"""A run whose task gives no reward goes on; one whose task gives something else than a grade ends in one line and can be resumed."""

import json
import math

import pytest

from diffpo.tasks import Grade, Sudoku


@pytest.mark.parametrize("reward", [None, math.nan, math.inf])
def test_a_run_without_any_reward_goes_on(train, monkeypatch, metrics_of, tmp_path, reward):
    monkeypatch.setattr(Sudoku, "grade", lambda self, problem, text: Grade(reward, None))
    assert train("--updates", "2") == 0
    lines = metrics_of(tmp_path / "run")
    assert [line["dropped_rewards"] for line in lines] == [16, 16]
    assert [line["reward"] for line in lines] == [None, None]
    for name in ("metrics.jsonl", "summary.json", "base.json", "config.json"):
        for line in (tmp_path / "run" / name).read_text().split("\n}\n"):
            assert "NaN" not in line
            assert "Infinity" not in line


def test_some_rewards_of_a_wrong_type_end_the_run_in_one_line(train, monkeypatch, tmp_path, capsys):
    grade, calls = Sudoku.grade, 0

    def late(self, problem, text):
        nonlocal calls
        calls += 1
        return grade(self, problem, text) if calls < 50 else Grade("0.5", False)

    with monkeypatch.context() as patch:
        patch.setattr(Sudoku, "grade", late)
        assert train() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "task sudoku: a reward must be a number or None, got str '0.5'" in error
    assert train("--resume") == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["heldout"] == 8
