"""The pure parts against brute force, and the whole script on tiny models."""

import json

import nfe_pareto
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nfe_pareto import Point, fronts, labels, pareto_front

from diffpo.config import ModelSize
from diffpo.decoding.rules import PromptThreshold
from diffpo.pretrain import build_model
from diffpo.tasks import get_task

# few values, so that ties are common
coordinates = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30)


@given(coordinates)
def test_the_front_holds_what_no_other_point_beats(points):
    front = pareto_front(points, lambda p: p[0], lambda p: p[1])
    unbeaten = {
        p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
    }  # fmt: skip
    assert set(front) == unbeaten
    assert len(front) == len(unbeaten), "listed a point twice"
    assert front == sorted(front)


def test_fronts_want_few_evaluations_and_much_throughput():
    def point(accuracy, nfe, tokens_per_second):
        return Point("m", "f", "r", accuracy, (0.0, 1.0), nfe, tokens_per_second, None)

    slow, fast, beaten = point(0.9, 8, 10), point(0.5, 2, 100), point(0.4, 4, 50)
    assert fronts([slow, beaten, fast]) == {"nfe": [fast, slow], "tokens_per_second": [fast, slow]}


def test_labels_are_short_and_distinct():
    assert labels(["tiny-countdown", "runs/joint/model", "somewhere/m"]) == ["tiny-countdown", "joint", "m"]
    assert labels(["a/m", "b/m", "c"]) == ["a/m", "b/m", "c"]


@pytest.fixture
def models(tmp_path) -> list[str]:
    """Two untrained sudoku models, the second with a threshold policy."""
    torch.manual_seed(0)
    model = build_model(get_task("sudoku"), ModelSize(hidden_size=32, intermediate_size=48, num_hidden_layers=1))
    model.save(tmp_path / "base")
    model.add_threshold((0.0, 0.5))
    model.save(tmp_path / "trained")
    return [str(tmp_path / "base"), str(tmp_path / "trained")]


def test_the_script_writes_every_point_and_a_figure(models, tmp_path, capsys):
    nfe_pareto.main(
        ["--model", *models, "--task", "sudoku", "--heldout", "8", "--quick", "--output", str(tmp_path / "o")]
    )
    result = json.loads((tmp_path / "o/nfe_pareto_sudoku.json").read_text())
    assert result.keys() >= {"command", "seeds", "hardware", "versions", "git_commit", "task", "heldout", "points"}
    points = result["points"]
    assert [p["rule"] for p in points if p["family"] == "learned threshold"] == [repr(PromptThreshold("entropy"))]
    per_model = [[p for p in points if p["model"] == name] for name in ("base", "trained")]
    assert len(per_model[1]) == len(per_model[0]) + 1
    for p in points:
        assert p["interval"][0] <= p["accuracy"] <= p["interval"][1]
        assert 1 <= p["nfe"] <= 16
        assert p["tokens_per_second"] > 0
    assert all(any(p["on_nfe_front"] for p in mine) for mine in per_model)
    one_at_a_time = [p["nfe"] for p in points if p["rule"] == "FixedSchedule(steps=16)"]
    assert one_at_a_time == [16, 16]
    assert (tmp_path / "o/nfe_pareto_sudoku.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy (95%)" in capsys.readouterr().out


def test_a_shipped_model_that_is_missing_gets_one_line(monkeypatch, capsys):
    monkeypatch.setattr(nfe_pareto, "shipped_models", lambda: ["tiny-sudoku"])
    console = nfe_pareto.Console()
    assert nfe_pareto.chosen_models("sudoku", None, console) == ["tiny-sudoku"]
    output = capsys.readouterr().out
    assert output.count("\n") == 2
    assert "tiny-sudoku-d1" in output


@pytest.mark.parametrize("arguments", [["--model", "tiny-nothing"], ["--heldout", "100000000", "--model", "x"]])
def test_mistakes_have_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        nfe_pareto.main(arguments)
    assert stopped.value.code == 2
