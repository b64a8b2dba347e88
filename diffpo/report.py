"""``python -m diffpo.report RUN...``: the page of a training from its folder, or of several trainings beside each other.

It reads what is there: a run in progress, interrupted, finished, or of an earlier version. Nothing else is changed.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from diffpo.config import Config, parse
from diffpo.models.file_replacement import write_atomically
from diffpo.reports.page import report_page
from diffpo.reports.run_record import read_run
from diffpo.runs import command
from diffpo.runs.faults import output_may_fail

REPORT = "report.html"
COMPARISON = "comparison.html"
_MARK = b'content="diffpo report"'  # in the head of each page


class ReportConfig(Config):
    """One HTML page of trainings: python -m diffpo.report RUN... [--flags]."""

    runs: tuple[Path, ...] = ()
    """folders of trainings; also without the flag"""
    output: Path | None = None
    """the page; default: report.html in the folder of a single run, comparison.html here for several"""


def main(arguments: list[str] | None = None) -> int:
    """The exit code, see ``diffpo.runs.faults``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = parse(ReportConfig, _runs_as_flag(arguments))
    return command.carry_out(lambda: make(config))


def make(config: ReportConfig) -> None:
    """ValueError for what is no training, or a file at the place of the page that is none. OSError of the disk."""
    if not config.runs:
        raise ValueError("runs: give the folder of a training, such as runs/diffpo-countdown")
    if len({os.path.realpath(run) for run in config.runs}) < len(config.runs):
        raise ValueError("runs: a folder stands there twice")
    target = config.output or (config.runs[0] / REPORT if len(config.runs) == 1 else Path(COMPARISON))
    runs = [read_run(path) for path in config.runs]
    _check(target)
    write_report(target, report_page(runs))
    print(target)


def write_report(target: Path, page: str) -> None:
    """The page is whole or as it was."""
    write_atomically(target, lambda temporary: Path(temporary).write_text(page, encoding="utf-8"))


def _check(target: Path) -> None:
    """ValueError unless the page can be written without a loss."""
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise ValueError(f"output: {target} is a link, a folder or a device: give another file")
    if not target.parent.is_dir():
        raise ValueError(f"output: there is no folder {target.parent}")
    if target.exists():
        with target.open("rb") as file:
            if _MARK not in file.read(1024):
                raise ValueError(f"output: {target} is somebody else's file: give another one, or move it away")


def _runs_as_flag(arguments: Sequence[str]) -> list[str]:
    """``["a", "b", "--output", "x"]`` -> ``["--output", "x", "--runs", "a", "b"]``."""
    runs, flags = [], []
    words = iter(arguments)
    for word in words:
        if word == "--output":
            flags += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word.startswith("-") and word != "--runs":
            flags.append(word)
        elif word != "--runs":
            runs.append(word)
    return [*flags, *(["--runs", *runs] if runs else [])]


if __name__ == "__main__":
    with output_may_fail():
        raise SystemExit(main())
