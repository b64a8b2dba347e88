"""The statistics of the experiments against values by hand."""

import math
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "experiments"))
import adaptive
import adaptive_arms
import adaptive_figure
import front_area
import headroom
from difficulty import adaptation, mutual_information, quartiles
from learning_curves import cost_to_reach, mean_curve, race, smooth
from seed_statistics import difference, estimate, ratio, text, verdict


def test_interval_is_students():
    """Five values 1..5: mean 3, s = sqrt(2.5), t(4) = 2.776."""
    found = estimate([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert found["interval"] == pytest.approx([3 - half, 3 + half], abs=1e-5)
    assert found["n"] == 5
    assert estimate([7.0])["interval"] is None
    assert estimate([]) is None
    assert text(estimate([0.454]), 100, 1) == "45.4"


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [estimate(rng.normal(2.0, 3.0, size=5).tolist())["interval"] for _ in range(4000)]
    assert np.mean([low <= 2.0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.012)


def test_pairs_use_common_seeds_only():
    assert difference({0: 3.0, 1: 5.0, 2: 9.0}, {1: 1.0, 0: 2.0})["values"] == [1.0, 4.0]
    assert ratio({0: 3.0}, {0: 2.0})["mean"] == 1.5
    assert ratio({0: 3.0}, {0: 0.0}) is None
    assert verdict(difference({0: 1.0, 1: 1.1}, {0: 0.0, 1: 0.0})) == "above zero"
    assert verdict(difference({0: 1.0, 1: -1.0}, {0: 0.0, 1: 0.0})) == "not told apart from zero"
    assert verdict(estimate([3.0])) == "one seed, no interval"


def curve(accuracy, calls_per_update=100, updates_per_point=15):
    n = len(accuracy)
    update = [updates_per_point * (i + 1) for i in range(n)]
    return {"update": update, "denoiser_calls": [calls_per_update * u for u in update], "accuracy": accuracy}


def test_smoothing_is_by_updates_not_by_points():
    fine = {"update": list(range(1, 31)), "accuracy": [float(i) for i in range(1, 31)]}
    assert smooth(fine, "accuracy")[-1] == pytest.approx(np.mean(range(16, 31)))
    assert smooth(fine, "accuracy")[2] == pytest.approx(2.0)
    assert smooth(curve([1.0, 2.0, 3.0]), "accuracy").tolist() == [1.0, 2.0, 3.0]


def test_mean_curves_and_the_race():
    slow, fast = curve([0.1, 0.2, 0.3, 0.4]), curve([0.2, 0.4, 0.5, 0.6])
    grid, mean, error = mean_curve([slow, fast], "update", "accuracy")
    assert (grid[0], grid[-1]) == (15, 60)
    assert mean[-1] == pytest.approx(0.5)
    assert error[-1] == pytest.approx(0.1)
    assert cost_to_reach([slow], 0.3) == pytest.approx(4500, rel=0.01)
    assert cost_to_reach([slow], 0.7) is None
    found = race([fast], [slow])
    assert found["level"] == pytest.approx(0.4)
    assert found["ratio"] == pytest.approx(0.5, rel=0.01)
    assert race([slow], [fast])["ratio"] is None
    assert race([slow], [slow])["ratio"] == 1


POINTS = [(1.0, 0.80), (2.0, 0.78), (4.0, 0.76), (6.0, 0.50), (3.0, 0.60)]


def test_aup_is_the_published_sum():
    """The point (3, .6) is beaten by (4, .76), and (6, .5) is more than five points below the first."""
    weight = {y: y * math.exp(-3 * (1 - y / 0.9)) for y in (0.80, 0.78, 0.76)}
    expected = 1.0 * 0.80 + 1.0 * (weight[0.80] + weight[0.78]) / 2 + 2.0 * (weight[0.78] + weight[0.76]) / 2
    assert front_area.aup(POINTS, 0.9) == pytest.approx(expected)


def test_area_ends_at_the_limit():
    """At 5 tokens per forward the front stands at (.76 + .5) / 2."""
    worth = [front_area.worth(y, 0.8) for y in (0.80, 0.78, 0.76, 0.63)]
    expected = 0.80 + (worth[0] + worth[1]) / 2 + (worth[1] + worth[2]) + (worth[2] + worth[3]) / 2
    assert front_area.area(POINTS, 0.8, 5.0) == pytest.approx(expected)
    assert front_area.area(POINTS, 0.8, 0.5) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="ends at"):
        front_area.area(POINTS, 0.8, 7.0)
    assert front_area.common_limit([POINTS, [(1.0, 0.5), (3.0, 0.1)]]) == 3.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 20)), min_size=1, max_size=12))
def test_the_front_holds_what_no_other_point_beats(points):
    unbeaten = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)}
    assert front_area.front(points) == sorted(unbeaten)


def test_areas_grow_with_accuracy():
    better = [(rho, y + 0.02) for rho, y in POINTS]
    assert front_area.area(better, 0.9, 6.0) > front_area.area(POINTS, 0.9, 6.0)
    assert front_area.aup(better, 0.9) > front_area.aup(POINTS, 0.9)


def test_quartiles_are_equal_and_ordered():
    difficulty = [0.5, 0.1, 0.9, 0.9, 0.1, 0.5, 0.0, 1.0]
    group = quartiles(difficulty)
    assert np.bincount(group).tolist() == [2, 2, 2, 2]
    assert max(np.array(difficulty)[group == 0]) <= min(np.array(difficulty)[group == 3])


def test_adaptation_tells_a_dependent_threshold_from_a_collapsed_and_a_random_one():
    rng = np.random.default_rng(0)
    difficulty, bins = rng.random(800), [0.0, 0.1, 1.0]
    group = quartiles(difficulty)
    follows = adaptation((group // 2), bins, difficulty)
    assert follows["p_value"] < 0.01
    assert follows["information"] == pytest.approx(math.log(2), abs=0.01)
    assert follows["spearman"] > 0.8
    collapsed = adaptation(np.ones(800, dtype=int), bins, difficulty)
    assert (collapsed["top_share"], collapsed["top_gamma"], collapsed["spearman"]) == (1.0, 0.1, None)
    assert collapsed["p_value"] == 1.0
    assert collapsed["information"] == pytest.approx(0)
    random = [adaptation(rng.integers(3, size=800), bins, difficulty, seed) for seed in range(10)]
    assert sum(found["p_value"] < 0.05 for found in random) <= 3
    assert abs(np.mean([found["information"] for found in random])) < 0.004
    assert np.array(follows["histogram"]).sum(axis=1) == pytest.approx(1)


def test_mutual_information_of_independent_parts_is_zero():
    chosen, group = np.tile([0, 1], 8), np.repeat([0, 1, 2, 3], 4)
    assert mutual_information(chosen, group, 2) == pytest.approx(0)
    assert mutual_information(group, group, 4) == pytest.approx(math.log(4))


def test_headroom_finds_a_bound_that_depends_on_the_prompt() -> None:
    """Half of the prompts are solved at any bound, half at the smallest only, and a feature says which."""
    generator = torch.Generator().manual_seed(0)

    def made(told: bool) -> object:
        easy = torch.rand(600, generator=generator, dtype=torch.float64) < 0.5
        solved = easy[:, None].double().expand(600, len(headroom.GAMMAS)).clone()
        solved[:, 0] = 1.0
        nfe = torch.linspace(9, 1, len(headroom.GAMMAS), dtype=torch.float64).expand(600, -1)
        noise = torch.randn(600, 4, generator=generator, dtype=torch.float64)
        features = torch.cat([noise, easy[:, None].double() * 4], dim=1) if told else noise
        kinds = torch.stack([easy, ~easy], dim=1).double() if told else torch.ones(600, 1, dtype=torch.float64)
        return headroom.Outcomes(solved, nfe, features, kinds)

    (told,) = headroom.compare(made(told=True), prices=[0.05])
    assert told["price"] == 0.05
    assert told["fixed"]["bins"][0] == 600, "at this price the smallest bound is the best for all"
    assert told["fitted"]["gain"] == pytest.approx(told["oracle"]["gain"], abs=0.01)
    assert told["kind"]["gain"] == pytest.approx(told["oracle"]["gain"], abs=0.01)
    assert told["oracle"]["gain"] == pytest.approx(0.5 * 8 * 0.05, abs=0.03), "half of them save 8 evaluations at .05"
    (untold,) = headroom.compare(made(told=False), prices=[0.05])
    assert untold["kind"]["gain"] == 0, "one kind has one bound"
    assert abs(untold["fitted"]["gain"]) <= 3 * untold["fitted"]["standard_error"]


def test_the_bound_a_problem_bears_is_the_last_that_solves_it():
    points = [{"solved": solved} for solved in ([1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0])]
    assert adaptive_figure.bearable(points).tolist() == [2, -1, 2, 1]


def test_what_a_kind_needs_is_found_on_the_base_model():
    """Two kinds: one is solved at any bound, the other at the careful one alone."""
    size, bounds = 40, len(adaptive.GAMMAS)
    careful = adaptive.GAMMAS.index(adaptive.BINS[0])
    points = [
        {"solved": [1] * size + [int(i <= careful)] * size, "nfe": [12 - i] * 2 * size, "tokens": [12] * 2 * size}
        for i in range(bounds)
    ]
    base = {"kinds": ["easy"] * size + ["hard"] * size, "fixed": points}
    assert adaptive.best_for_all(base, base) == careful
    oracle = adaptive.oracle_by_kind(base)
    assert oracle["bits"] == pytest.approx(1), "the bound tells the kind"
    fastest = adaptive.GAMMAS.index(adaptive.BINS[-1])
    assert oracle["nfe"] == pytest.approx((12 - fastest + 12 - careful) / 2)
    assert oracle["accuracy"] == 1
    learned = points[careful] | {"chosen": [len(adaptive.BINS) - 1] * size + [0] * size}
    ruined = points[fastest] | {"chosen": [len(adaptive.BINS) - 1] * 2 * size}
    found = adaptive.numbers(base | {"learned": learned}, base)
    assert (found["worst"], found["bits"]) == (0, pytest.approx(1))
    found = adaptive.numbers(base | {"learned": ruined}, base)
    assert (found["worst"], found["bits"]) == (-1, pytest.approx(0))


def test_the_recipe_of_the_medley_is_the_studys():
    recipe = tomllib.loads((Path(__file__).parents[2] / "configs" / "medley.toml").read_text())
    own = {name: recipe.pop(name) for name in ("name", "model", "task")}
    assert own == {"name": "medley", "model": "tiny-medley", "task": "medley"}
    tables = {name: value for name, value in recipe.items() if isinstance(value, dict)}
    flags = {name: value for name, value in recipe.items() if name not in tables}
    flags |= {f"{table}.{name.replace('_', '-')}": value for table, of in tables.items() for name, value in of.items()}
    assert flags == {name: list(v) if isinstance(v, tuple) else v for name, v in adaptive_arms.MEDLEY.items()}
