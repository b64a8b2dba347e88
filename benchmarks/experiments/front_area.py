"""Accuracy over tokens per forward as one number: the AUP metric of d3LLM, and the same area between limits that all models share.

A point is (rho, y): rho = tokens generated up to and including EOS / network evaluations, both summed over the problems (tokens per
forward); y = accuracy in [0, 1]. Accuracies below the best are worth less: W(y) = min(exp(-ALPHA (1 - y / y_max)), 1), ALPHA = 3, where
y_max is the best accuracy of any model compared.

AUP (d3LLM, get_aup of its leaderboard): points sorted by rho, those with y < y_1 - .05 dropped;
    rho_1 y_1 + sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2.
It runs to wherever a model's accuracy has fallen by five points: different limits for different models, and a jump when a point crosses
that line.

Area: the same sum, over the points up to one limit for all models instead: `high`, in tokens per forward; the last trapezoid ends there, on
the straight line between the two points around it. Both are taken of the front alone: points no other beats in rho and y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

ALPHA = 3.0
DROP = 0.05  # in accuracy, below the point with the fewest tokens per forward
Front = Sequence[tuple[float, float]]


def front(points: Front) -> list[tuple[float, float]]:
    """The points for which no other has at least the tokens per forward and at least the accuracy; by rising tokens per forward."""
    found: list[tuple[float, float]] = []
    for rho, y in sorted(set(points), reverse=True):
        if not found or y > found[-1][1]:
            found.append((rho, y))
    return found[::-1]


def worth(y: float, y_max: float) -> float:
    """y W(y); 0 where no model solves anything."""
    return y * min(math.exp(-ALPHA * (1 - y / y_max)), 1.0) if y_max > 0 else 0.0


def aup(points: Front, y_max: float) -> float:
    """d3LLM's accuracy under parallelism, with accuracies in [0, 1] (theirs are in percent: 100 times as much)."""
    kept = front(points)
    kept = [(rho, y) for rho, y in kept if y >= kept[0][1] - DROP]
    return kept[0][0] * kept[0][1] + _trapezoids(kept, y_max)


def area(points: Front, y_max: float, high: float) -> float:
    """AUP's sum up to `high` tokens per forward, which the front must reach."""
    line = front(points)
    if line[-1][0] < high:
        raise ValueError(f"the front ends at {line[-1][0]} tokens per forward, before the limit {high}")
    if line[0][0] >= high:
        return high * line[0][1]
    kept = [point for point in line if point[0] < high]
    (left, y_left), (right, y_right) = kept[-1], line[len(kept)]
    end = (high, y_left + (y_right - y_left) * (high - left) / (right - left))
    return kept[0][0] * kept[0][1] + _trapezoids([*kept, end], y_max)


def _trapezoids(line: Front, y_max: float) -> float:
    return sum(
        (right - left) * (worth(y_left, y_max) + worth(y_right, y_max)) / 2
        for (left, y_left), (right, y_right) in pairwise(line)
    )


def common_limit(fronts: Sequence[Front]) -> float:
    """The most tokens per forward that all of the fronts reach."""
    return min(max(rho for rho, _ in points) for points in fronts)
