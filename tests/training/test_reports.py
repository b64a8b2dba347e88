"""What a run leaves behind: metrics.jsonl, TensorBoard, summary.json, curves.png, the model."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import diffpo
import diffpo.train
from diffpo.evaluation import evaluate, fixed_problems
from diffpo.runs.digests import weights_digest
from diffpo.runs.metrics import summary_line
from diffpo.tasks import get_task
from diffpo.training.config import OptimizerConfig, TrainConfig
from diffpo.training.trainer import mean_diagnostics

BY_QUARTER = ("tokens", "weight_mean", "ess", "ess_uncapped", "weight_cap_fraction", "surrogate_kl", "weight_histogram")
LOGGED = {
    *("update", "reward", "task_reward", "accuracy", "nfe", "gamma", "gamma_histogram", "length"),
    *("loss", "gradient_norm", "lr", "ratio_mean", "clip_fraction", "ess", "kl", "weight_cap_fraction"),
    *("zero_advantage_fraction", "denoiser_calls", "skipped_updates"),
    *("seconds/rollout", "seconds/score", "seconds/update"),
    *(f"{name}/quarter_{q}" for name in BY_QUARTER for q in range(1, 5)),
    "weight_histogram",
}


@pytest.fixture(scope="module")
def run(sudoku_model, tmp_path_factory):
    """The folder of a finished run with the full sweep of rules."""
    runs = tmp_path_factory.mktemp("runs")
    flags = ("--model", sudoku_model, "--task", "sudoku", "--heldout", "8", "--updates", "3", "--seed", "5")
    small = ("--algorithm.prompts-per-update", "4", "--algorithm.group-size", "4")
    assert diffpo.train.main([*flags, *small, "--name", "run", "--runs", str(runs)]) == 0
    return runs / "run"


@pytest.fixture
def summary(run) -> dict:
    return json.loads((run / "summary.json").read_text())


@pytest.fixture
def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_summary_has_the_documented_shape(summary):
    numbers = {"accuracy": float, "nfe": float}
    shape = {
        "base": {"one_at_a_time": numbers, "best": {"rule": str, **numbers}},
        "trained": {**numbers, "gamma": float},
        "careful": {"rule": str, "base": numbers, "trained": numbers},
        "kinds": {"sudoku": {"problems": int, "base_careful": float, "careful": float, **numbers, "gamma": float}},
        "lost": list,
        "heldout": int,
        "seconds": float,
        "seed": int,
    }

    def check(value, expected) -> None:
        if isinstance(expected, dict):
            for key, inner in expected.items():
                check(value[key], inner)
        else:
            assert isinstance(value, expected)

    check(summary, shape)
    assert set(summary["base"]) == {"one_at_a_time", "best"}
    assert set(summary["base"]["one_at_a_time"]) == {"accuracy", "nfe"}
    assert set(summary["base"]["best"]) == {"rule", "accuracy", "nfe"}
    assert set(summary["trained"]) == {"accuracy", "nfe", "gamma"}
    assert (summary["heldout"], summary["seed"]) == (8, 5)


def test_the_summary_says_where_its_numbers_come_from(summary, sudoku_model, run):
    provenance = summary["provenance"]
    flags = "--model sudoku --task sudoku --heldout 8 --updates 3 --seed 5 --algorithm.prompts-per-update 4"
    assert provenance["command"].startswith(f"python -m diffpo.train {flags}")
    assert str(run.parent) not in provenance["command"]
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["diffpo"] == diffpo.__version__
    assert provenance["hardware"]["torch_threads"] == torch.get_num_threads()
    assert provenance["model_revision"] == weights_digest(Path(sudoku_model))
    assert "git_commit" in provenance


def test_the_summary_agrees_with_itself_and_with_the_saved_model(run, summary):
    sweep = summary["sweep"]["base"]
    best = max(sweep, key=lambda e: (e["accuracy"], -e["nfe"]))
    assert summary["base"]["best"]["rule"] == best["rule"]
    assert summary["base"]["one_at_a_time"]["nfe"] == 16
    task = get_task("sudoku")
    again = evaluate(diffpo.load(run / "model"), task, fixed_problems(task, 8), diffpo.PromptThreshold())
    assert summary["trained"] == {"accuracy": again.accuracy, "nfe": again.nfe, "gamma": again.gamma}


def test_metrics_hold_one_complete_line_per_update(lines):
    assert [line["update"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line.keys() >= LOGGED, LOGGED - line.keys()
        assert sum(line["gamma_histogram"]) == 16
        by_quarter = sum(line[f"tokens/quarter_{q}"] for q in range(1, 5))
        thresholds = sum(line["weight_histogram"]) - by_quarter  # they have a weight but belong to no step
        assert thresholds == pytest.approx(16 * (1 - line["zero_advantage_fraction"]))
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    calls = [line["denoiser_calls"] for line in lines]
    assert calls == sorted(calls)
    # at least every rollout's own evaluations, and the surrogate's on top
    assert calls[0] > 16 * lines[0]["nfe"]


def test_a_quarter_without_tokens_is_left_out():
    first = {"kl": torch.tensor(1.0), "bin/tokens": torch.tensor([4.0, 0.0]), "bin/ess": torch.tensor([0.5, 0.0])}
    second = {name: value + (value > 0) for name, value in first.items()}
    expected = {"kl": 1.5, "tokens/quarter_1": 4.5, "tokens/quarter_2": 0.0, "ess/quarter_1": 1.0}
    assert mean_diagnostics([first, second]) == expected


def test_the_learning_rate_warms_up_and_decays(lines):
    settings, updates = OptimizerConfig(), len(lines)
    assert settings.warmup_updates >= updates
    warmup = [(update + 1) / settings.warmup_updates for update in range(updates)]
    decay = [1 - (1 - settings.final_lr_fraction) * update / updates for update in range(updates)]
    expected = [settings.lr * a * b for a, b in zip(warmup, decay, strict=True)]
    assert [line["lr"] for line in lines] == pytest.approx(expected)


def test_tensorboard_holds_the_same_numbers(run, lines):
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("reward", "nfe", "seconds/update"):
        events = board.Scalars(name)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.value for event in events] == pytest.approx([line[name] for line in lines])


def test_the_folder_is_complete(run):
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (run / "report.html").read_text()
    assert "finished, 3 updates" in page
    assert f"{json.loads((run / 'summary.json').read_text())['trained']['accuracy']:.1%}" in page
    config = TrainConfig(**json.loads((run / "config.json").read_text()))
    assert config.algorithm.group_size == 4
    assert diffpo.load(run / "model").threshold is not None
    assert not list(run.rglob("*.partial"))


def test_a_summary_line_says_the_essential(lines):
    text = summary_line(lines[0], 3)
    for part in ("update    1/3", "reward", "accuracy", "NFE", " nats  no-advantage", "ESS", "clip", "KL", " nats  "):
        assert part in text


def test_a_summary_line_leaves_out_what_there_is_not(lines):
    """A rule without a threshold has no gamma; ESPO and TraceRL have a KL and no weights."""
    text = summary_line({k: v for k, v in lines[0].items() if k not in ("ess", "clip_fraction")} | {"gamma": None}, 3)
    assert "gamma" not in text
    assert "ESS" not in text
    assert "KL" in text
    assert "gamma" not in summary_line(lines[0] | {"gamma": float("nan")}, 3)


def test_a_time_limit_ends_training_and_still_reports(flags, tmp_path, metrics_of):
    assert diffpo.train.main([*flags, "--max-minutes", "1e-9"]) == 0
    assert metrics_of(tmp_path / "run") == []
    assert (tmp_path / "run/summary.json").exists()


def test_the_console_shows_the_table(train, capsys):
    assert train("--updates", "1") == 0
    output = capsys.readouterr().out
    for part in (
        "sudoku, 8 held-out problems",
        "one token at a time",
        "PromptThreshold(",
        "gamma",
        "(nats)",
    ):
        assert part in output


def test_without_the_sweep_only_the_trained_rule_is_evaluated(flags, tmp_path):
    assert diffpo.train.main([*flags, "--updates", "1", "--no-sweep"]) == 0
    sweep = json.loads((tmp_path / "run/summary.json").read_text())["sweep"]
    rules = {name: [point["rule"].partition("(")[0] for point in points] for name, points in sweep.items()}
    careful = ["FixedSchedule", "EntropyBounded"]
    assert rules == {"base": careful, "trained": ["PromptThreshold", *careful]}
