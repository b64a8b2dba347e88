"""What every command prints on, and its progress bar."""

from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Console(rich.console.Console):
    """One whose reader may go away: a BrokenPipeError, after which a command saves what it has, where rich ends the program."""

    def on_broken_pipe(self) -> None:
        raise  # what rich has just caught


def progress_bar(console: Console, **options: Any) -> Progress:
    """Description, bar, count, time so far and time left; ``options`` are rich's."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, **options)
