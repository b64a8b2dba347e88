"""The tables of a report: what a training reached, what it cost, how it was set, as text for the page. A field that a folder lacks is left out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from diffpo.reports.run_record import RunRecord, Table, flat, number, table, tables, text
from diffpo.runs.phases import duration
from diffpo.training.config import BINS, TrainConfig

_OF_THE_FOLDER = ("name", "runs", "resume", "overwrite", "dry_run", "allow_config_change")
_PHASES = ("rollout", "score", "update", "guard", "samples", "save")
ABSENT = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Change:
    """One number before and after, as text. better: how a reader should take it; None: neither."""

    title: str
    before: str
    after: str
    difference: str
    better: bool | None


def headline(run: RunRecord) -> tuple[list[Change], str]:
    """Accuracy and NFE, before and after, and what they were measured on."""
    single, trained = table(run.summary, "base", "one_at_a_time"), table(run.summary, "trained")
    if run.finished and single and trained:
        problems = count(number(run.summary, "heldout"))
        where = f"{problems} held-out problems. Before: the model as it came, one token at a time. After: the trained model by its own rule."
        return _changes(single, trained), where
    if not run.lines:
        return [], "No update is done yet."
    few = max(1, len(run.lines) // 10)
    first, last = mean_line(run.lines[:few]), mean_line(run.lines[-few:])
    where = f"Rollouts of the training, sampled: the first {_updates(few)} and the last {_updates(few)} so far."
    return _changes(first, last), where


def _changes(before: Table, after: Table) -> list[Change]:
    found = []
    a, b = number(before, "accuracy"), number(after, "accuracy")
    if a is not None and b is not None:
        found.append(Change("accuracy", percent(a), percent(b), f"{100 * (b - a):+.1f} points", _better(b - a)))
    a, b = number(before, "nfe"), number(after, "nfe")
    if a and b:
        times = f"{a / b:.3g} times fewer" if b <= a else f"{b / a:.3g} times more"
        found.append(Change("network evaluations (NFE) an answer", decimal(a), decimal(b), times, _better(a - b)))
    return found


def _better(gain: float) -> bool | None:
    return None if abs(gain) < 1e-9 else gain > 0


def mean_line(lines: Sequence[Table]) -> Table:
    means: dict[str, float] = {}
    for name in ("accuracy", "nfe", "gamma", "reward"):
        values = [value for line in lines if (value := number(line, name)) is not None]
        means |= {name: fmean(values)} if values else {}
    return means


def best_untrained(run: RunRecord) -> str:
    best = table(run.summary, "base", "best")
    if not best:
        return ""
    return f"{percent(number(best, 'accuracy'))} in {decimal(number(best, 'nfe'))} NFE by {text(best, 'rule')}"


def rules_table(run: RunRecord) -> list[list[str]]:
    """Rule, accuracy and NFE before, accuracy and NFE after, the threshold after."""
    if not run.finished:
        sweeps = {"base": tables(run.base, "heldout"), "trained": list[Table]()}
    else:
        sweeps = {name: tables(run.summary, "sweep", name) for name in ("base", "trained")}
    by_rule = {name: {text(point, "rule"): point for point in sweep} for name, sweep in sweeps.items()}
    rows = []
    for rule in dict.fromkeys([*by_rule["trained"], *by_rule["base"]]):
        cells = [rule]
        for name in ("base", "trained"):
            point = by_rule[name].get(rule, {})
            cells += [_with_interval(point), decimal(number(point, "nfe"))]
        rows.append([*cells, nats(number(by_rule["trained"].get(rule, {}), "gamma"))])
    return rows


def _with_interval(point: Table) -> str:
    share, interval = number(point, "accuracy"), point.get("accuracy_interval_95")
    if share is None or not (isinstance(interval, list) and len(interval) == 2):
        return percent(share)
    low, high = (number({"end": end}, "end") for end in interval)
    return percent(share) if low is None or high is None else f"{percent(share)} [{100 * low:.1f}, {100 * high:.1f}]"


def kinds_table(run: RunRecord) -> list[tuple[list[str], bool]]:
    """Kind, problems, accuracy careful before, careful after, by the trained rule, its NFE and threshold; and whether it is lost."""
    lost = {text(loss, "kind") for loss in tables(run.summary, "lost")}
    kinds = table(run.summary, "kinds") if run.finished else {}
    rows = []
    for kind in kinds:
        of = table(kinds, kind)
        shares = [percent(number(of, name)) for name in ("base_careful", "careful", "accuracy")]
        cells = [
            str(kind),
            count(number(of, "problems")),
            *shares,
            decimal(number(of, "nfe")),
            nats(number(of, "gamma")),
        ]
        rows.append((cells, kind in lost))
    return rows


def warnings(run: RunRecord) -> list[str]:
    """What the guard found lost, and what of the folder was not readable."""
    found = []
    for loss in tables(run.summary, "lost") if run.finished else ():
        now, base = percent(number(loss, "now")), percent(number(loss, "base"))
        problems = count(number(loss, "problems"))
        found.append(
            f"{text(loss, 'kind')} is lost: {now} of {problems} problems solved, the base model solves {base}."
        )
    return [*found, *(f"{note}." for note in run.unreadable)]


def gammas(run: RunRecord) -> list[float]:
    """Nats, of the bins of the threshold that is trained."""
    given = table(run.settings, "rollout").get("threshold_gammas")
    values = [float(g) for g in (given if isinstance(given, list) else BINS) if _is_number(g)]
    return [g for g in values if g == g]


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]  # JSON of ours writes infinity as text
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def phases(run: RunRecord) -> list[tuple[str, float]]:
    """Seconds of each phase, in all processes that worked on the run, by the metrics; the evaluations by their decoding."""
    names = sorted({name for line in run.lines for name in line if name.startswith("seconds/")}, key=_place)
    found = [(name.removeprefix("seconds/"), sum(number(line, name) or 0 for line in run.lines)) for name in names]
    points = tables(run.summary, "sweep", "base") + tables(run.summary, "sweep", "trained") or tables(
        run.base, "heldout"
    )
    evaluation = sum(number(point, "decoding_seconds") or 0 for point in points)
    return [(name, seconds) for name, seconds in [*found, ("evaluation", evaluation)] if seconds > 0]


def _place(name: str) -> tuple[int, str]:
    phase = name.removeprefix("seconds/")
    return (_PHASES.index(phase) if phase in _PHASES else len(_PHASES), phase)


def cost(run: RunRecord) -> list[tuple[str, str]]:
    of_phases = phases(run)
    total = sum(seconds for _, seconds in of_phases)
    calls = (
        number(run.summary, "denoiser_calls")
        if run.finished
        else number(run.lines[-1], "denoiser_calls")
        if run.lines
        else None
    )
    algorithm = table(run.settings, "algorithm")
    rollouts = run.updates * (number(algorithm, "prompts_per_update") or 0) * (number(algorithm, "group_size") or 0)
    rows = [
        ("time", duration(total) if total else ""),
        ("updates", count(run.updates)),
        ("rollouts", count(rollouts) if rollouts else ""),
    ]
    if total and run.updates:
        rows.append(("time of an update", duration(sum(s for n, s in of_phases if n in ("rollout", "score", "update")) / run.updates)
                     if total >= 60 * run.updates else f"{total / run.updates:.2f} s"))  # fmt: skip
    rows.append(("sequences through the network", count(calls)))
    rows.append(("skipped updates", count(number(run.lines[-1], "skipped_updates")) if run.lines else ""))
    return [(name, value) for name, value in rows if value and value != ABSENT]


def settings(run: RunRecord) -> list[tuple[str, str, bool]]:
    """Name, value, and whether it differs from the algorithm's defaults."""
    defaults = _defaults(run.settings)
    return [(name, shown(value), bool(defaults) and name in defaults and defaults[name] != value)
            for name, value in flat(run.settings).items() if name not in _OF_THE_FOLDER]  # fmt: skip


def _defaults(settings: Table) -> Table:
    try:
        config = TrainConfig(algorithm={"name": text(settings, "algorithm", "name")})
    except ValueError:
        return {}  # of a version that knew other algorithms
    return flat(config.model_dump(mode="json"))


def differing(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings, and inputs, that are not the same in all runs."""
    every = [
        {name: shown(value) for name, value in flat(run.settings).items() if name not in _OF_THE_FOLDER}
        | {f"{name} (content)": shown(digest)[:19] for name, digest in run.inputs.items()}
        for run in runs
    ]
    names = dict.fromkeys(name for values in every for name in values)
    rows = [(name, [values.get(name, ABSENT) for values in every]) for name in names]
    return [(name, cells) for name, cells in rows if len(set(cells)) > 1]


def provenance(run: RunRecord) -> list[tuple[str, str]]:
    of = table(run.summary, "provenance") or table(run.summary, "environment")
    inputs = {f"{name}_revision": digest for name, digest in run.inputs.items()}
    return [
        (name.replace("_", " ").replace(".", ": "), shown(value))
        for name, value in flat(of or inputs).items()
        if value not in (None, [])
    ]


def results(run: RunRecord) -> list[str]:
    """A row of the comparison."""
    trained = table(run.summary, "trained") if run.finished else {}
    single = table(run.summary, "base", "one_at_a_time") if run.finished else {}
    lost = [text(loss, "kind") for loss in tables(run.summary, "lost")] if run.finished else []
    rollouts = mean_line(run.lines[-max(1, len(run.lines) // 10) :])
    return [
        status(run), percent(number(single, "accuracy")), percent(number(trained, "accuracy")), decimal(number(trained, "nfe")),
        nats(number(trained, "gamma")), ", ".join(lost) or (ABSENT if not run.finished else "none"), percent(number(rollouts, "accuracy")),
        decimal(number(rollouts, "nfe")), duration(sum(seconds for _, seconds in phases(run))),
    ]  # fmt: skip


RESULTS = ("run", "state", "accuracy before", "accuracy after", "NFE after", "threshold after (nats)", "lost", "rollouts' accuracy (last tenth)",
           "rollouts' NFE (last tenth)", "time")  # fmt: skip


def spent(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def status(run: RunRecord) -> str:
    if run.finished:
        return f"finished, {_updates(run.updates)}"
    planned = f" of {run.planned:,}" if run.planned else ""
    return f"not finished: {run.updates:,}{planned} updates"


def _updates(number_of: int) -> str:
    return f"{number_of:,} update{'' if number_of == 1 else 's'}"


def percent(share: float | None) -> str:
    return ABSENT if share is None else f"{share:.1%}"


def decimal(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def nats(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3g}"


def count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def shown(value: object) -> str:
    """A setting."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    known: Iterable = {None: ABSENT, True: "yes", False: "no"}.items()
    return next((words for constant, words in known if value is constant), str(value))
