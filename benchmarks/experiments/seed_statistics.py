"""Numbers over seeds: mean, standard error, 95% interval; differences and ratios of runs that share a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def estimate(values: Sequence[float]) -> dict | None:
    """n, mean, standard_error = s / sqrt(n), and interval = mean -+ t(n - 1) standard errors, Student's 95% interval; `values` themselves.

    With one value there is no error and no interval: both are None. None without any value.
    """
    if len(values) == 0:
        return None
    mean = float(np.mean(values))
    found = {
        "n": len(values),
        "mean": mean,
        "standard_error": None,
        "interval": None,
        "values": list(map(float, values)),
    }
    if len(values) > 1:
        error = float(np.std(values, ddof=1) / len(values) ** 0.5)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
        found |= {"standard_error": error, "interval": [mean - half, mean + half]}
    return found


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict | None:
    """Estimate of ours - theirs over the seeds both have. Equal seeds see equal problems in equal order, hence the pairing."""
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict | None:
    """Estimate of ours / theirs over the seeds both have; None if one of theirs is 0."""
    seeds = sorted(ours.keys() & theirs.keys())
    return None if any(theirs[seed] == 0 for seed in seeds) else estimate([ours[seed] / theirs[seed] for seed in seeds])


def verdict(found: dict | None) -> str:
    """Where the interval of a difference lies: above zero, below zero, or around it; without an interval, that there is none."""
    if found is None or found["interval"] is None:
        return "one seed, no interval"
    low, high = found["interval"]
    return "above zero" if low > 0 else "below zero" if high < 0 else "not told apart from zero"


def text(found: dict | None, scale: float = 1.0, digits: int = 2, sign: str = "") -> str:
    """ "45.3 [43.1, 47.5]", or the mean alone where there is no interval."""
    if found is None:
        return "-"
    mean = f"{found['mean'] * scale:{sign}.{digits}f}"
    if found["interval"] is None:
        return mean
    low, high = (f"{value * scale:{sign}.{digits}f}" for value in found["interval"])
    return f"{mean} [{low}, {high}]"
