"""A part, or a context, that is too small for one sequence: found before any work, or where a later prompt is longer, in one line."""

import json

import pytest

from diffpo.tasks import Sudoku


def test_a_part_too_small_for_one_sequence_is_a_mistake(train, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train("--update.tokens-at-once", "31")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: update.tokens_at_once must be at least 32, the length of one sequence, got 31\n"
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_is_longer_than_those_before_ends_the_run_in_one_line(
    train, monkeypatch, metrics_of, tmp_path, capsys
):
    prompt, asked = Sudoku.prompt, 0

    def longer(self, problem):
        nonlocal asked
        asked += 1
        return prompt(self, problem) + (" 1" if asked > 60 else "")

    with monkeypatch.context() as patch:
        patch.setattr(Sudoku, "prompt", longer)
        assert train("--update.tokens-at-once", "32") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tokens_at_once must be at least 33" in error
    done = len(metrics_of(tmp_path / "run"))
    assert train("--resume", "--update.tokens-at-once", "64") == 0
    assert [line["update"] for line in metrics_of(tmp_path / "run")][:done] == list(range(1, done + 1))
    assert json.loads((tmp_path / "run/summary.json").read_text())["heldout"] == 8
