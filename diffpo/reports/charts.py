"""Curves as SVG: paths in a box of 1000 x 1000 that the page stretches, ticks as shares of it, and the numbers for the pointer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from diffpo.reports.run_record import Table, number

SIZE = 1000
_POINTS = 400  # of one curve; more are drawn as means
_SMOOTH = 15  # updates of the running mean, at most

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """name: for the legend. points: (update, value), in order. level: a value to compare with, drawn as a line."""

    name: str
    points: Sequence[Point]
    level: float | None = None


@dataclass(frozen=True)
class Drawn:
    """raw, mean: path data. colour: its number."""

    name: str
    colour: int
    raw: str
    mean: str
    level: str
    dots: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """ticks: (percent of the box from its left or its top, text). data: JSON for the pointer."""

    title: str
    curves: list[Drawn]
    x_ticks: list[tuple[str, str]]
    y_ticks: list[tuple[str, str]]
    data: Table
    summary: str


def chart(title: str, curves: Sequence[Curve], kind: str = "number", floor: float | None = None) -> Chart | None:
    """None without a number to draw. kind: percent or number; floor: the lowest value that the axis begins at, if there is one."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    means = [running_mean(curve.points) for curve in curves]
    values = [y for curve in curves for _, y in curve.points]
    values += [curve.level for curve in curves if curve.level is not None]
    x_low, x_high = min(c.points[0][0] for c in curves), max(c.points[-1][0] for c in curves)
    y_low, y_high, y_ticks = axis(min(values) if floor is None else min(floor, *values), max(values))
    x_ticks = [tick for tick in axis(x_low, x_high, 6)[2] if x_low <= tick <= x_high and tick == int(tick)]

    def x(update: float) -> float:
        return (update - x_low) / (x_high - x_low) if x_high > x_low else 0.5

    def y(value: float) -> float:
        return 1 - (value - y_low) / (y_high - y_low)

    def path(points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{SIZE * x(a):.1f} {SIZE * y(b):.1f}" for a, b in points)

    shown = formatter(kind, max(abs(y_low), abs(y_high)))
    drawn = [
        Drawn(
            curve.name, i % 8, path(thinned(curve.points)), path(mean) if len(curve.points) >= 8 else "",
            "" if curve.level is None else f"{100 * y(curve.level):.2f}%",
            [(f"{100 * x(a):.2f}%", f"{100 * y(b):.2f}%") for a, b in curve.points] if len(curve.points) <= 30 else [],
        )
        for i, (curve, mean) in enumerate(zip(curves, means, strict=True))
    ]  # fmt: skip
    data = {
        "title": title, "kind": kind, "x": [x_low, x_high], "y": [y_low, y_high],
        "curves": [
            {"name": curve.name, "at": [a for a, _ in points], "value": [rounded(b) for _, b in points], "level": curve.level}
            for curve, points in ((curve, thinned(curve.points)) for curve in curves)
        ],
    }  # fmt: skip
    parts = [f"{c.name + ': ' if len(curves) > 1 else ''}from {shown(m[0][1])} to {shown(m[-1][1])}"
             for c, m in zip(curves, means, strict=True)]  # fmt: skip
    return Chart(
        title, drawn,
        [(f"{100 * x(tick):.2f}%", f"{tick:,.0f}") for tick in x_ticks],
        [(f"{100 * y(tick):.2f}%", shown(tick)) for tick in y_ticks if y_low <= tick <= y_high],
        data, "; ".join(parts),
    )  # fmt: skip


def points(lines: Sequence[Mapping], value: str | Callable[[Mapping], float | None]) -> list[Point]:
    """(update, value) of the lines that have it. value: a metric's name, or a function of a line."""
    read = (lambda line: number(line, value)) if isinstance(value, str) else value
    found = ((number(line, "update"), read(line)) for line in lines)
    return sorted((update, y) for update, y in found if update is not None and y is not None)


def running_mean(points: Sequence[Point]) -> list[Point]:
    """Of the last 15 points, or a quarter of all where that is fewer; thinned."""
    width = max(1, min(_SMOOTH, len(points) // 4))
    mean = [(points[i][0], fmean(y for _, y in points[max(0, i + 1 - width) : i + 1])) for i in range(len(points))]
    return thinned(mean)


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most 400 of them: means of neighbours."""
    size = math.ceil(len(points) / _POINTS)
    parts = (points[i : i + size] for i in range(0, len(points), size))
    return [(part[-1][0], fmean(y for _, y in part)) for part in parts]


def axis(low: float, high: float, wanted: int = 4) -> tuple[float, float, list[float]]:
    """Both ends, and round numbers between them: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{step * i:.12g}") for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def formatter(kind: str, largest: float) -> Callable[[float], str]:
    if kind == "percent":
        return lambda value: f"{100 * value:.3g}%"
    if largest >= 1000:
        return lambda value: f"{value:,.0f}"
    return lambda value: f"{value:.3g}"


def rounded(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass(frozen=True)
class Histogram:
    """The share of each bin over time, as columns of rectangles in the box. bins: their names; data: JSON for the pointer."""

    name: str
    bins: list[tuple[str, int]]
    rectangles: list[tuple[float, float, float, float, int]]
    x_ticks: list[tuple[str, str]]
    data: Table
    summary: str


def histogram(name: str, lines: Sequence[Mapping], gammas: Sequence[float], columns: int = 60) -> Histogram | None:
    """Of the lines' gamma_histogram; None without any. gammas: nats, of the bins in their order."""
    rows = [(update, counts) for line in lines for update, counts in [(number(line, "update"), _counts(line))]
            if update is not None and counts]  # fmt: skip
    bins = max((len(counts) for _, counts in rows), default=0)
    rows = [row for row in rows if len(row[1]) == bins]
    if not rows:
        return None
    known = len(gammas) == bins
    order = sorted(range(bins), key=lambda i: gammas[i]) if known else list(range(bins))
    names = [f"{gammas[i]:g}" if known else f"bin {i + 1}" for i in order]
    size = math.ceil(len(rows) / columns)
    shares, ends = [], []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        sums = [sum(counts[i] for _, counts in part) for i in order]
        shares.append([s / (sum(sums) or 1) for s in sums])
        ends.append([part[0][0], part[-1][0]])
    width = SIZE / len(shares)
    rectangles = []
    for column, of_column in enumerate(shares):
        top = float(SIZE)
        for rank, share in enumerate(of_column):
            top -= SIZE * share
            if share > 0:
                rectangles.append(
                    (
                        round(column * width, 2),
                        round(top, 2),
                        round(width, 2),
                        round(SIZE * share, 2),
                        shade(rank, bins),
                    )
                )
    first, last = ends[0][0], ends[-1][1]
    ticks = (
        [tick for tick in axis(first, last, 8)[2] if first <= tick <= last and tick == int(tick)]
        if last > first
        else [first]
    )
    x_ticks = [
        (f"{100 * ((tick - first) / (last - first) if last > first else 0.5):.2f}%", f"{tick:,.0f}") for tick in ticks
    ]
    means = [" ".join(f"{n}: {s:.0%}" for n, s in zip(names, at, strict=True)) for at in (shares[0], shares[-1])]
    return Histogram(
        name, [(n, shade(rank, bins)) for rank, n in enumerate(names)], rectangles, x_ticks,
        {"updates": ends, "bins": names, "shares": [[rounded(s) for s in of_column] for of_column in shares]},
        f"at first {means[0]}; at last {means[1]}",
    )  # fmt: skip


def shade(rank: int, of: int) -> int:
    """0 to 9, of ten colours from slow to fast."""
    return round(9 * rank / (of - 1)) if of > 1 else 5


def _counts(line: Mapping) -> list[float]:
    counts = line.get("gamma_histogram")
    known = isinstance(counts, list) and all(type(count) in (int, float) and 0 <= count < math.inf for count in counts)
    return counts if known and isinstance(counts, list) and sum(counts) > 0 else []
