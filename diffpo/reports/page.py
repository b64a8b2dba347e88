"""The page of one training, or of several beside each other."""

from collections.abc import Sequence
from typing import Any

from diffpo.html_page import html_page
from diffpo.prompt_file import prompt_text
from diffpo.reports import results
from diffpo.reports.charts import Chart, Curve, chart, histogram, points
from diffpo.reports.run_record import RunRecord, Table, number, table, text

_MOST_SAMPLED = 12  # updates whose samples are on the page
_MOST_PIECES = 4096  # tokens of a sample
_MAIN = (("accuracy", "accuracy of the rollouts", "percent", 0.0), ("nfe", "NFE of the rollouts", "number", 0.0),
         ("reward", "reward", "number", None), ("gamma", "threshold (nats)", "number", 0.0))  # fmt: skip
_MORE = (
    ("loss", "loss", "number", None), ("gradient_norm", "gradient norm", "number", 0.0), ("kl", "KL to the reference (nats)", "number", None),
    ("ess", "effective sample size (share)", "percent", 0.0), ("clip_fraction", "clipped tokens", "percent", 0.0),
    ("zero_advantage_fraction", "groups without an advantage", "percent", 0.0), ("length", "tokens of an answer", "number", 0.0),
    ("dropped_rewards", "dropped rewards", "number", 0.0), ("lr", "learning rate", "number", 0.0),
)  # fmt: skip
_SECONDS = ("rollout", "score", "update")


def report_page(runs: Sequence[RunRecord]) -> str:
    """At least one run."""
    charts, more = _charts(runs, _MAIN), _charts(runs, _MORE)
    if len(runs) == 1:
        charts += _only(watched(runs[0]))
    more += _only(
        chart("seconds of an update", [Curve(run.name, points(run.lines, _update_seconds)) for run in runs], floor=0.0)
    )
    histograms = [drawn for run in runs if (drawn := histogram(run.name, run.lines, results.gammas(run)))]
    sampled = samples(runs[0]) if len(runs) == 1 else []
    data = {
        "charts": [each.data for each in [*charts, *more]],
        "histograms": [each.data for each in histograms],
        "samples": sampled,
    }
    return html_page(
        "report.html", ("page.css", "report.css"), ("page.js", "report.js"), data,
        title=runs[0].name if len(runs) == 1 else " · ".join(run.name for run in runs), runs=[_values(run) for run in runs],
        charts=charts, more=more, histograms=histograms, sampled=sampled, result_names=results.RESULTS, differing=results.differing(runs),
    )  # fmt: skip


def _charts(runs: Sequence[RunRecord], metrics: Sequence[tuple[str, str, str, float | None]]) -> list[Chart]:
    drawn = (
        chart(title, [Curve(run.name, points(run.lines, name)) for run in runs], kind, floor)
        for name, title, kind, floor in metrics
    )
    return [each for each in drawn if each is not None]


def _only(drawn: Chart | None) -> list[Chart]:
    return [] if drawn is None else [drawn]


def watched(run: RunRecord) -> Chart | None:
    """Accuracy by kind at the guard's checks, with what the base model solves."""
    names = dict.fromkeys(name for line in run.lines for name in line if name.startswith("watched/"))
    base = table(run.base, "watched")
    curves = []
    for name in names:
        kind = name.removeprefix("watched/")
        level = number(base, "kinds", kind, "accuracy")
        curves.append(Curve(kind, points(run.lines, name), number(base, "accuracy") if level is None else level))
    return chart("accuracy by kind, validation (dashed: base model)", curves, "percent", 0.0)


def _update_seconds(line: Any) -> float | None:
    seconds = [value for phase in _SECONDS if (value := number(line, f"seconds/{phase}")) is not None]
    return sum(seconds) if seconds else None


def samples(run: RunRecord) -> list[Table]:
    """By prompt: the prompt and its answers, the first, the last, and some between."""
    updates = sorted({row["update"] for row in run.samples})
    if len(updates) > _MOST_SAMPLED:
        last = len(updates) - 1
        updates = [updates[round(i * last / (_MOST_SAMPLED - 1))] for i in range(_MOST_SAMPLED)]
    of_prompt: dict[Any, Table] = {}
    for row in run.samples:
        if row["update"] in updates and (answer := _answer(row)) is not None:
            prompt = row.get("prompt")
            known = isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt))
            asked = _prompt(prompt) if known else ""
            of_prompt.setdefault(str(row.get("index")), {"prompt": asked, "answers": []})["answers"].append(answer)
    return list(of_prompt.values())


def _prompt(prompt: Any) -> str:
    try:
        return str(prompt_text(prompt))
    except (KeyError, TypeError, ValueError):
        return str(prompt)


def _answer(row: Table) -> Table | None:
    """None unless it is whole."""
    pieces, steps, special = row.get("pieces"), row.get("commit_step"), row.get("special")
    if not (isinstance(pieces, list) and isinstance(steps, list) and isinstance(special, list)):
        return None
    whole = len(pieces) == len(steps) == len(special) <= _MOST_PIECES and all(
        isinstance(piece, str) for piece in pieces
    )
    if not (whole and all(type(step) is int and 0 <= step <= _MOST_PIECES for step in steps)):
        return None
    correct, gamma = row.get("correct"), row.get("gamma")
    return {
        "update": number(row, "update"),
        "text": text(row, "completion"),
        "reward": number(row, "reward"),
        "correct": correct if isinstance(correct, bool) else None,
        "nfe": max([int(min(number(row, "nfe") or 0, _MOST_PIECES)), *steps]),
        "gamma": gamma if gamma == "inf" else number(row, "gamma"),
        "pieces": pieces,
        "special": [int(bool(s)) for s in special],
        "steps": steps,
    }


def _values(run: RunRecord) -> Table:
    changes, where = results.headline(run)
    seconds = results.phases(run)
    total = sum(s for _, s in seconds) or 1.0
    started = 0.0
    bars = []
    for i, (name, of) in enumerate(seconds):
        bars.append({"name": name, "start": f"{100 * started / total:.3f}%", "width": f"{100 * of / total:.3f}%", "colour": i % 8,
                     "seconds": results.spent(of), "share": f"{of / total:.0%}"})  # fmt: skip
        started += of
    return {
        "name": run.name, "status": results.status(run), "finished": run.finished, "changes": changes, "where": where,
        "facts": [(name, value) for name, value in (
            ("task", text(run.settings, "task")), ("model", text(run.settings, "model")), ("algorithm", _algorithm(run))) if value],
        "warnings": results.warnings(run), "best": results.best_untrained(run) if run.finished else "",
        "rules": results.rules_table(run), "kinds": results.kinds_table(run), "bars": bars, "cost": results.cost(run),
        "settings": results.settings(run), "provenance": results.provenance(run), "results": results.results(run),
    }  # fmt: skip


def _algorithm(run: RunRecord) -> str:
    algorithm = table(run.settings, "algorithm")
    trains = algorithm.get("train")
    parts = " + ".join(map(str, trains)) if isinstance(trains, list) else ""
    return ", ".join(filter(None, (text(algorithm, "name"), parts)))
