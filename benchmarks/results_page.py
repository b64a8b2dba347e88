"""``python benchmarks/results_page.py [--check]``: writes docs/results.md, every number of it from the files in benchmarks/results.

docs/results.template.md is the page with a Python format field for each number, such as {countdown[joint][nfe][mean]:.2f}; `SOURCES` says
what the names stand for. With --check nothing is written: exit code 1 and the first line that differs. README.md quotes a few numbers;
`QUOTES` are these sentences with their fields, and --check looks for them too.
"""

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_EXPERIMENTS = "benchmarks/results/experiments"

# name in the template: file, then the keys that lead to the part of it that is meant
SOURCES: dict[str, tuple[str, ...]] = {
    "untrained": (f"{_EXPERIMENTS}/sampler/fronts/countdown-base.json",),
    "seed0_long": (f"{_EXPERIMENTS}/sampler/fronts/countdown-joint-long-seed0.json",),
    "seed0": (f"{_EXPERIMENTS}/sampler/fronts/countdown-joint-seed0.json",),
    "countdown": (f"{_EXPERIMENTS}/sampler.json", "tasks", "countdown", "arms"),
    "against": (f"{_EXPERIMENTS}/sampler.json", "tasks", "countdown", "ratios", "joint"),
    "race": (f"{_EXPERIMENTS}/sampler.json", "tasks", "countdown", "race"),
    "sudoku": (f"{_EXPERIMENTS}/sampler.json", "tasks", "sudoku", "arms"),
    "sudoku_base": (f"{_EXPERIMENTS}/sampler.json", "tasks", "sudoku", "base"),
    "sudoku_against": (f"{_EXPERIMENTS}/sampler.json", "tasks", "sudoku", "ratios", "joint"),
    "adaptive": (f"{_EXPERIMENTS}/adaptive.json", "tasks"),
    "gap": (f"{_EXPERIMENTS}/surrogate_gap.json", "kl"),
    "estimator": (f"{_EXPERIMENTS}/estimators.json", "tasks"),
    "pooled": (f"{_EXPERIMENTS}/estimators.json", "together"),
    "estimator_base": (f"{_EXPERIMENTS}/estimators.json", "untrained"),
    "first_run": ("benchmarks/results/train/countdown-default-seed0.json",),
    "keyed": ("benchmarks/results/train/keyed-draws.json",),
    "loop": ("benchmarks/results/decoding_cpu.json", "against_loops"),
}

QUOTES = (
    "**{countdown[joint-long][accuracy][mean]:.1%}** of them in **{countdown[joint-long][nfe][mean]:.2f}** evaluations",
    "{untrained[best][accuracy]:.1%} in {untrained[best][nfe]:.2f}",
    "{first_run[trained][accuracy]:.1%} in {first_run[trained][nfe]:.2f} evaluations",
    "in the mean {adaptive[countdown][arms][std][accuracy][mean]:.1%} [{adaptive[countdown][arms][std][accuracy][interval][0]:.1%}, {adaptive[countdown][arms][std][accuracy][interval][1]:.1%}]",
    "{adaptive[medley][arms][std][accuracy][mean]:.1%} in {adaptive[medley][arms][std][nfe][mean]:.2f} evaluations",
    "{adaptive[medley][best_for_all][accuracy]:.1%} in {adaptive[medley][best_for_all][nfe]:.2f}",
)


def sources(root: Path = ROOT) -> dict[str, Any]:
    """What the names of a template stand for: `SOURCES`, `kernel` by "operator, case" and `update`. FileNotFoundError, KeyError."""
    found = {}
    for name, (path, *keys) in SOURCES.items():
        found[name] = json.loads((root / path).read_text(encoding="utf-8"))
        for key in keys:
            found[name] = found[name][key]
    return found | {"kernel": kernels(root), "update": updates(root)}


def kernels(root: Path) -> dict[str, dict[str, Any]]:
    """The native kernels' measurements: seconds as text, how many times eager's and torch.compile's, extra memory in MiB."""
    rows = json.loads((root / "benchmarks/results/kernels_cpu.json").read_text(encoding="utf-8"))["rows"]
    return {
        f"{row['operator']}, {row['case']}": {
            "time": f"{row['seconds'] * 1e3:.2f} ms" if row["seconds"] >= 1e-3 else f"{row['seconds'] * 1e6:.0f} us",
            "eager": row["ratios"].get("eager", row["ratios"].get("reference")),
            "compile": row["ratios"].get("torch.compile"),
            "memory": row["extra_bytes"] / 2**20,
        }
        for row in rows
        if row["contestant"] == "native"
    }


def updates(root: Path) -> dict[str, dict[str, Any]]:
    """An update's measurements: by "update, variant", by "N rollouts" and by the latents of the exact likelihood; memory in MiB."""
    sections = json.loads((root / "benchmarks/results/likelihood_cpu.json").read_text(encoding="utf-8"))
    named = [(f"{row['update']}, {row['variant']}", row) for row in sections["update"]]
    named += [(f"{row['rollouts']} rollouts", row) for row in sections["rollouts"]]
    named += [(row["latents"], row) for row in sections["exact"]]
    return {name: row | {"memory": row["peak_bytes"] / 2**20} for name, row in named}


def filled(template: str, values: dict[str, Any]) -> str:
    """The template with its fields filled in. ValueError naming the line whose field the results do not have."""
    lines = []
    for number, line in enumerate(template.splitlines(), start=1):
        try:
            lines.append(line.format(**values))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"line {number} of the template, {line!r}: {error!r}") from error
    return "\n".join(lines) + "\n"


def first_difference(have: str, want: str) -> str | None:
    """What the page says and what the results say, at the first line that differs."""
    changed = [line for line in difflib.ndiff(have.splitlines(), want.splitlines()) if line[0] in "-+"]
    return "\n".join(changed[:2]) or None


def missing_quotes(readme: str, values: dict[str, Any]) -> list[str]:
    """The quoted sentences, filled in, that the README does not hold (line breaks and spaces are alike)."""
    text = " ".join(readme.split())
    return [quote for quote in (filled(template, values).strip() for template in QUOTES) if quote not in text]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(arguments).check
    page = ROOT / "docs/results.md"
    try:
        values = sources()
        want = filled((ROOT / "docs/results.template.md").read_text(encoding="utf-8"), values)
    except (OSError, KeyError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not check:
        page.write_text(want, encoding="utf-8")
        return 0
    difference = first_difference(page.read_text(encoding="utf-8"), want)
    if difference:
        print(f"{page.name} does not say what the results say:\n{difference}")
    missing = missing_quotes((ROOT / "README.md").read_text(encoding="utf-8"), values)
    for quote in missing:
        print(f"README.md does not hold {quote!r}")
    return 1 if difference or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
