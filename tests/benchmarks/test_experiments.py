"""The bookkeeping of the experiments."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "benchmarks" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
study = pytest.importorskip("study")


def test_curve_averages_windows_and_adds_up_seconds() -> None:
    lines = [{"update": i + 1, "reward": float(i), "seconds/rollout": 1.0, "seconds/update": 0.5} for i in range(4)]
    del lines[1]["reward"]  # an update without it
    curve = study.curve(lines, points=2)
    assert curve["update"] == [1.5, 3.5]
    assert curve["reward"] == [0.0, 2.5]
    assert curve["seconds"] == [3.0, 6.0]
    assert curve["kl"] == [None, None]


def test_switches_are_negated_by_name() -> None:
    assert study.no("algorithm.fresh-latents") == "algorithm.no-fresh-latents"


def fake_result(run, accuracy: float = 0.4, cpu: str = "a") -> dict:
    columns = {name: [0.1, 0.2, 0.3] for name in study.CURVE} | {"update": [10, 20, 30]}
    columns |= {"denoiser_calls": [100, 200, 300], "seconds": [1, 2, 3]}
    found = {"arm": run.arm, "task": run.task, "seed": run.seed, "flags": run.flags, "curve": columns, "weights": None}
    evaluation, made_on = {"accuracy": accuracy, "nfe": 5.0}, {"provenance": {"hardware": {"cpu": cpu}}}
    return found | made_on | {"trained": evaluation, "base": {"one_at_a_time": evaluation}, "denoiser_calls": 300}


@pytest.fixture
def given(tmp_path: Path):
    return study.Options(("countdown",), 2, 1, "cpu", False, True, tmp_path, tmp_path / "runs")


def test_a_report_takes_the_results_there_are_and_trains_nothing(given) -> None:
    runs = [study.Run("a", "countdown", seed, {"updates": 3}) for seed in range(3)]
    study.write(given.output / "s" / f"{runs[1].name}.json", fake_result(runs[1]))
    (result,) = study.train_all("s", runs, given, lambda run: 1.0)
    assert result["seed"] == 1


def test_results_of_other_settings_are_refused(given, capsys) -> None:
    run = study.Run("a", "countdown", 0, {"updates": 3})
    study.write(given.output / "s" / f"{run.name}.json", fake_result(run))
    with pytest.raises(SystemExit) as stopped:
        study.train_all("s", [study.Run("a", "countdown", 0, {"updates": 4})], given, lambda run: 1.0)
    assert stopped.value.code == 2
    assert "updates: 3 -> 4" in capsys.readouterr().err


def test_a_smoke_result_is_refused_by_the_full_study(given, monkeypatch, capsys) -> None:
    run = study.Run("a", "countdown", 0, {"updates": 300})
    monkeypatch.setattr(
        study, "train", lambda name, run, given: study.write(given.output / name / f"{run.name}.json", fake_result(run))
    )
    (result,) = study.train_all("s", [run], replace(given, smoke=True, report=False), lambda run: 1.0)
    assert result["flags"] == run.flags | study.SMOKE_FLAGS
    with pytest.raises(SystemExit):
        study.train_all("s", [run], given, lambda run: 1.0)
    assert "updates: 2 -> 300" in capsys.readouterr().err


def test_late_weights_are_the_last_tenth_by_quarter() -> None:
    lines = [{"update": i, "ess/quarter_1": float(i), "weight_histogram/quarter_1": [i, 3 * i]} for i in range(1, 21)]
    weights = study.late_weights(lines)
    assert weights["ess"] == [19.5, None, None, None]
    assert weights["weight_histogram"] == [[0.25, 0.75], None, None, None]


def test_estimators_pair_the_seeds_and_say_so(given) -> None:
    import estimators

    gains = {("mf", 0): 0.40, ("mf", 1): 0.30, ("2mf", 0): 0.45, ("2mf", 1): 0.35, ("2mf", 2): 0.9}
    runs = {(run.arm, run.seed): run for run in estimators.runs(3, ("countdown",))}
    summary = estimators.summarise([fake_result(runs[key], accuracy) for key, accuracy in gains.items()])
    paired = summary["countdown"]["2mf"]["to_mf_points"]
    assert paired["n"] == 2
    assert paired["values"] == pytest.approx([5.0, 5.0])
    assert summary["countdown"]["2mf"]["accuracy"]["n"] == 3
    assert any("2mf against mf" in sentence and "above zero" in sentence for sentence in estimators.reading(summary))
    both = summary | {"sudoku": {"2mf": {"to_mf_points": {"values": [2.0, 3.0]}}}}
    assert estimators.together(both)["2mf"]["to_mf_points"]["values"] == pytest.approx([5.0, 5.0, 2.0, 3.0])
    assert "mf" not in estimators.together(both)  # on one task only


def test_training_is_measured_against_the_untrained_model_on_the_same_prompts(tmp_path: Path) -> None:
    import estimators

    rewards = {
        ("mf", 0): [0.1, 0.9, 0.5],
        ("mf", 1): [0.1, 0.9, 0.8],
        ("untrained", 0): [0.1, 0.95, 0.4],  # easy prompts in the middle
        ("2mf", 0): [0.1, 0.95, 0.9],
        ("2mf", 1): [0.0] * 3,
    }
    runs = {(run.arm, run.seed): run for run in estimators.runs(2, ("sudoku",))}
    results = [fake_result(runs[key]) for key in rewards]
    for result, values in zip(results, rewards.values(), strict=True):
        result["curve"] |= {"reward": values, "accuracy": values, "update": [20, 40, 60]}
    document = estimators.summarise(results)
    summary = document["sudoku"]
    assert set(summary) == {"mf", "2mf"}  # the untrained model is no competitor
    assert summary["mf"]["reward_over_untrained"]["values"] == pytest.approx([0.1])
    assert summary["2mf"]["calls_mf"]["level"] == pytest.approx(0.1)  # at the end, not where the prompts were easy
    assert summary["2mf"]["calls_mf"]["their_calls"] == pytest.approx(300)
    alone = estimators.summarise([result for result in results if result["arm"] != "untrained"])
    assert alone["sudoku"]["mf"]["reward_over_untrained"] is None
    assert estimators.reading(alone)
    estimators.draw(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_the_untrained_arm_is_mean_field_that_moves_no_weight() -> None:
    import estimators
    import torch

    mf, untrained = estimators.ARMS["mf"], estimators.ARMS["untrained"]
    assert {name for name in mf | untrained if mf.get(name) != untrained.get(name)} == {"optimizer.lr"}
    weight = torch.nn.Parameter(torch.randn(1000) * 1e-8)
    before = weight.detach().clone()
    weight.grad = torch.randn(1000)
    torch.optim.AdamW([weight], lr=untrained["optimizer.lr"]).step()
    assert torch.equal(weight, before)


def test_the_gap_of_an_answer_is_one_observation() -> None:
    import torch
    from surrogate_gap import describe

    gap = torch.tensor([[0.0, 2.0, 2.0, 2.0]])
    apart, together = (describe(gap, torch.tensor(answer))["kl_error"] for answer in ([0, 1, 2, 3], [0, 1, 1, 1]))
    assert together == pytest.approx(2 * (1.5**2) ** 0.5 / 4 / 2**0.5)
    assert together > apart
    assert describe(gap.expand(8, 4), torch.arange(4))["kl_error"] == pytest.approx(apart), "views are no new answers"


def test_an_interrupted_measurement_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    computed, folder = [], tmp_path / "measurement"

    def part(name: str, fails: bool = False):
        def compute() -> dict:
            computed.append(name)
            if fails:
                raise KeyboardInterrupt
            return {"value": name}

        return compute

    def run(settings: dict, fails: str = "", report=lambda: None) -> list:
        parts = {name: part(name, name == fails) for name in "abc"}
        with study.in_parts(folder, settings, parts) as values:
            report()
        return values

    with pytest.raises(KeyboardInterrupt):
        run({"prompts": 4}, fails="b")
    with pytest.raises(ZeroDivisionError):  # a report that fails loses nothing either
        run({"prompts": 4}, report=lambda: 1 / 0)
    assert run({"prompts": 4}) == [{"value": name} for name in "abc"]
    assert computed == ["a", "b", "b", "c"]
    assert not folder.exists()  # done: the next run measures anew

    with pytest.raises(KeyboardInterrupt):
        run({"prompts": 4}, fails="c")
    with pytest.raises(KeyboardInterrupt):
        run({"prompts": 8}, fails="c")  # other settings: nothing is taken over
    assert computed[4:] == [*"abc", *"abc"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "changed.py").write_text("")
    monkeypatch.setattr(study, "SOURCES", [source])
    run({"prompts": 8})  # nor from other code
    assert computed[10:] == [*"abc"]


def test_a_smoke_run_leaves_the_results_of_a_full_one_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def folders(*flags: str) -> tuple[Path, Path]:
        given = study.read(study.parser("").parse_args(flags))
        return given.output, given.runs

    assert folders() == (study.RESULTS, study.RUNS)
    assert study.RESULTS not in folders("--smoke")
    assert folders("--smoke")[0] != folders("--smoke")[0]  # each anew
    assert folders("--smoke", "--output", str(tmp_path))[0] == tmp_path
    assert study.RUNS not in folders("--smoke", "--output", str(tmp_path))


def test_a_study_without_runs_is_refused(given, capsys) -> None:
    with pytest.raises(SystemExit):
        study.train_all("s", [], given, lambda run: 1.0)
    assert "tasks and arms" in capsys.readouterr().err


def test_seconds_are_compared_on_the_processor_of_most_runs(given) -> None:
    import estimators

    made_on = {("mf", 0): "a", ("mf", 1): "b", ("2mf", 0): "b", ("2mf", 1): "b"}
    runs = {(run.arm, run.seed): run for run in estimators.runs(2, ("countdown",))}
    results = [fake_result(runs[key], cpu=cpu) for key, cpu in made_on.items()]
    results[0]["curve"]["seconds"] = [100, 200, 300]
    summary = estimators.summarise(results)["countdown"]
    assert summary["mf"]["seconds"]["values"] == [3.0]
    assert summary["mf"]["accuracy"]["n"] == 2


def test_an_arm_has_its_own_number_of_seeds() -> None:
    import sampler_arms

    runs = sampler_arms.runs(5, ("countdown", "sudoku"), ("joint", "model-0.1", "model-0.5-priced"))
    assert sum(run.arm == "joint" and run.task == "countdown" for run in runs) == 5
    assert [run.seed for run in runs if run.arm == "model-0.1"] == [0]
    assert {run.task for run in runs if run.arm == "model-0.5-priced"} == {"sudoku"}
    assert {run.seed for run in sampler_arms.runs(1, ("countdown",))} == {0}


def fake_front(accuracy: float, learned: bool) -> dict:
    """Three bounds and perhaps a learned threshold, at 1, 2, 4 tokens per forward."""
    points = [
        {"rule": "r", "learned": False, "accuracy": accuracy / rho, "nfe": 12 / rho, "tokens_per_forward": float(rho), "gamma": gamma}
        for rho, gamma in ((1, 0.0), (2, 0.5), (4, "inf"))
    ]  # fmt: skip
    chosen = {"rule": "p", "learned": True, "accuracy": accuracy, "nfe": 6.0, "tokens_per_forward": 2.0, "gamma": 0.5}
    return {"points": points + ([chosen] if learned else []), "bins": [0.0, 0.5] if learned else None}


def test_sampler_divides_areas_by_seed_and_measures_the_target() -> None:
    import sampler
    from sampler_report import summarise

    results, best = [], {"joint": 0.5, "d1": 0.4, "model-2": 0.45}
    for run in sampler.runs(2, ("countdown",), tuple(best)):
        front = fake_front(best[run.arm], run.arm == "joint")
        results.append(
            fake_result(run) | {"front": front, "adaptation": None, "denoiser_calls": 1000 * run.flags["updates"]}
        )
    base = fake_front(0.25, False) | {"best": {"rule": "b", "accuracy": 0.3, "nfe": 8.0}, "rules": 3}
    numbers = summarise(results, {"countdown": base})["countdown"]
    assert numbers["limit"] == 4
    assert numbers["best_accuracy"] == 0.5
    assert numbers["target"]["joint"]["gain_points"]["mean"] == pytest.approx(20)
    assert numbers["target"]["joint"]["nfe_share"]["mean"] == pytest.approx(0.75)
    areas = {arm: of["area"]["mean"] for arm, of in numbers["arms"].items()}
    assert numbers["ratios"]["joint"]["d1"]["area"]["mean"] == pytest.approx(areas["joint"] / areas["d1"])
    assert numbers["ratios"]["joint"]["base"]["area"]["mean"] == pytest.approx(areas["joint"] / numbers["base"]["area"])
    assert numbers["ratios"]["joint"]["d1"]["area"]["n"] == 2
    assert numbers["ratios"].keys() == {"joint"}
    assert numbers["ratios"]["joint"]["d1"]["calls"]["values"] == pytest.approx([800 / 240, 800 / 240])
    assert numbers["best"]["gain_points"]["values"] == pytest.approx([10, 10]), (
        "the learned threshold is no point of the sweep"
    )
    assert numbers["best"]["calls_share"]["mean"] == pytest.approx(800 / 240)
    few = summarise([result for result in results if result["arm"] == "joint"], {"countdown": base})["countdown"]
    assert (few["best"], few["race"], few["ratios"]["joint"].keys()) == (None, None, {"base"})


def test_a_front_of_another_run_is_refused(tmp_path: Path, capsys) -> None:
    import sampler

    (run,) = sampler.runs(1, ("countdown",), ("joint",))
    result = fake_result(run) | {"denoiser_calls": 7}
    study.write(tmp_path / f"{run.name}.json", fake_front(0.5, False) | {"denoiser_calls": 8})
    study.write(tmp_path / "countdown-base.json", fake_front(0.2, False))
    study.write(tmp_path / "countdown-difficulty.json", {"solve_rate": [0.5]})
    with pytest.raises(SystemExit):
        sampler.gather([result], tmp_path)
    assert "is of another run" in capsys.readouterr().err


def test_joint_is_what_the_defaults_of_training_were() -> None:
    """All but the threshold's advantage and what it reads, which had no choice up to 0.1."""
    import sampler_arms

    from diffpo.training.config import BINS, ROLLOUT_ORDER, TrainConfig, parse_train

    flags = [part for flag, value in sampler_arms.ARMS["joint"].items() for part in study.as_flag(flag, value)]
    rollout = {"order": ROLLOUT_ORDER, "threshold_gammas": BINS, "threshold_reads": "completion"}
    algorithm = {"name": "diffpo", "threshold_advantage": "mean"}
    assert parse_train(flags) == TrainConfig(algorithm=algorithm, rollout=rollout)


@pytest.mark.parametrize("name", ["adaptive", "estimators", "importance", "sampler"])
def test_every_run_has_valid_flags_and_a_name_of_its_own(name: str) -> None:
    from diffpo.training.config import parse_train

    runs = importlib.import_module(name).runs(2, ("countdown", "sudoku"))
    assert len({run.name for run in runs}) == len(runs)
    for run in (run for run in runs if run.seed == 0):
        flags = [part for flag, value in run.flags.items() for part in study.as_flag(flag, value)]
        parse_train(flags)


def test_flags_of_earlier_results_are_those_of_today(tmp_path: Path) -> None:
    import sampler

    (run,) = sampler.runs(1, ("countdown",), ("joint",))
    old = {
        "rollout.proxy" if name == "rollout.order" else name: value
        for name, value in run.flags.items()
        if name not in study.EARLIER
    }
    study.write(tmp_path / "x.json", {"flags": old})
    study.check_flags(run, tmp_path / "x.json")
    for switch, weights in ((True, "token"), (False, "none")):
        flags = study.flags_of({"flags": {"algorithm.importance-correction": switch}})
        assert flags == {"algorithm.importance-weights": weights}
    assert sampler.order_of({"flags": old | {"rollout.proxy": "margin"}}) == "margin"
