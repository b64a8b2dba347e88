"""Axes, means and paths."""

import re
from itertools import pairwise

import pytest

from diffpo.reports.charts import Curve, axis, chart, histogram, points, running_mean, thinned


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 0.8, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3, 17, [-5, 0, 5, 10, 15, 20]),
        (0.3, 0.3, [0.26, 0.28, 0.3, 0.32, 0.34]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
        (1e-7, 3e-7, [1e-7, 1.5e-7, 2e-7, 2.5e-7, 3e-7]),
        (-1e299, 1e299, [-1e299, -5e298, 0, 5e298, 1e299]),
    ],
)
def test_an_axis_holds_the_values_between_round_numbers(low, high, ticks):
    first, last, found = axis(low, high)
    assert first <= low <= high <= last
    if found != pytest.approx(ticks):
        steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
        assert steps == {1}
        assert 3 <= len(found) <= 7


def test_a_running_mean_begins_with_the_first_point():
    few = [(1.0, 0.0), (2.0, 4.0)]
    assert running_mean(few) == few
    many = [(float(i), float(i % 2)) for i in range(100)]
    mean = running_mean(many)
    assert len(mean) == 100
    assert mean[0] == (0, 0)
    assert all(abs(y - 0.5) < 0.05 for _, y in mean[20:])


def test_many_points_become_few():
    many = [(float(i), float(i)) for i in range(10_001)]
    few = thinned(many)
    assert 300 < len(few) <= 400
    assert few[-1][0] == 10_000
    assert [x for x, _ in few] == sorted(x for x, _ in few)


def coordinates(path: str) -> list[float]:
    return [float(part) for part in re.findall(r"-?[\d.]+", path)]


def test_curves_stay_within_their_box():
    drawn = chart("t", [Curve("a", [(1, -2.0), (5, 7.0)], level=9.0), Curve("b", [(3, 1e-9)]), Curve("none", [])])
    assert [curve.name for curve in drawn.curves] == ["a", "b"]
    for curve in drawn.curves:
        assert all(0 <= c <= 1000 for c in coordinates(curve.raw))
    assert coordinates(drawn.curves[0].raw)[::2] == [0, 1000]
    assert 0 <= float(drawn.curves[0].level.rstrip("%")) <= 100
    assert drawn.data["curves"][0] == {"name": "a", "at": [1, 5], "value": [-2.0, 7.0], "level": 9.0}


def test_without_a_number_there_is_no_chart():
    assert chart("t", []) is None
    assert chart("t", [Curve("a", [])]) is None
    assert chart("t", [Curve("a", [(1, 0.0)])]) is not None


def test_points_are_the_numbers_there_are():
    lines = [
        {"update": 2, "x": 1},
        {"update": 1, "x": None},
        {"update": 3, "x": float("nan")},
        {"x": 1},
        {"update": 1, "x": 5},
    ]
    assert points(lines, "x") == [(1, 5), (2, 1)]


def test_a_histogram_orders_its_bins_and_adds_up():
    lines = [{"update": u, "gamma_histogram": [1, 0, 3]} for u in range(1, 131)]
    drawn = histogram("run", lines, [4.0, 0.5, float("inf")])
    assert [name for name, _ in drawn.bins] == ["0.5", "4", "inf"]
    assert drawn.data["shares"][0] == [0, 0.25, 0.75]
    assert len(drawn.data["updates"]) <= 60
    assert drawn.data["updates"][0][0] == 1
    assert drawn.data["updates"][-1][1] == 130
    for x, y, width, height, _ in drawn.rectangles:
        assert -0.1 <= x <= x + width <= 1000.1
        assert -0.1 <= y <= y + height <= 1000.1


@pytest.mark.parametrize("counts", [None, [], [0, 0], "ab", [1, -1], [1, None], [float("inf")], {"a": 1}])
def test_what_is_no_histogram_is_left_out(counts):
    assert histogram("run", [{"update": 1, "gamma_histogram": counts}], [1.0, 2.0]) is None


def test_bins_without_a_known_threshold_are_numbered():
    drawn = histogram("run", [{"update": 1, "gamma_histogram": [1, 1]}], [1.0])
    assert [name for name, _ in drawn.bins] == ["bin 1", "bin 2"]
