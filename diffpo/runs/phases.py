"""What a command does now and how long it will take: a bar on a terminal, elsewhere a line now and then."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from time import monotonic

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diffpo.runs.progress import Console, progress_bar

_WINDOW = 32  # the newest durations of each kind of work
_TRIMMED = 0.2  # share of them that is left out at either end: a first update compiles, another waits for the disk
QUIET_SECONDS = 30.0  # without a terminal, after which the reader is told what goes on
_UPDATE = "update"


class TimeLeft:
    """How long work will take, by how long the same kinds of work took: a mean without the shortest and the longest fifth."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))

    def took(self, work: str, seconds: float) -> None:
        self._seconds[work].append(seconds)

    def of(self, to_do: Mapping[str, int]) -> float:
        """Seconds. to_do: how often each kind of work is still done; one that was never done does not count."""
        return sum(times * self._mean(work) for work, times in to_do.items() if times > 0 and self._seconds[work])

    def _mean(self, work: str) -> float:
        seconds = sorted(self._seconds[work])
        trimmed = int(_TRIMMED * len(seconds))
        return fmean(seconds[trimmed : len(seconds) - trimmed])


class TrainingProgress:
    """Updates that are done, the phase of now, and the time that is left with all that is still to come.

    done: updates of an earlier process. periods: updates between what is done now and then, by name; 0 = never. limit: seconds that the
    updates may take. afterwards: seconds that are expected behind the last update.
    """

    def __init__(
        self,
        console: Console,
        updates: int,
        done: int = 0,
        periods: Mapping[str, int] | None = None,
        limit: float = math.inf,
        afterwards: float = 0.0,
    ):
        self.console, self.updates, self.done = console, updates, done
        self._periods = {work: every for work, every in (periods or {}).items() if every > 0}
        self._ends, self._afterwards = monotonic() + limit, afterwards
        self._time, self._taken = TimeLeft(), dict[str, float]()
        self._said = monotonic()
        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = TextColumn("{task.fields[left]}")
        self._bar = Progress(*columns, left, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=updates, completed=done, left="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, phase: str) -> None:
        """Say what is done from now on."""
        self._bar.update(self._task, description=phase)
        if not self.console.is_terminal and monotonic() - self._said > QUIET_SECONDS:
            self.print(f"update {self.done + 1:>4}/{self.updates}: {phase}")

    @contextmanager
    def doing(self, work: str) -> Iterator[None]:
        """Show work and count its time."""
        self.show(work)
        started = monotonic()
        yield
        seconds = monotonic() - started
        self._time.took(work, seconds)
        if work != _UPDATE:  # whose phases the trainer counts
            self._taken[f"seconds/{work}"] = seconds

    def seconds(self) -> dict[str, float]:
        """By name as in a line of metrics, what was done since the last call beside the updates."""
        taken, self._taken = self._taken, {}
        return taken

    def advance(self) -> None:
        self.done += 1
        left = self.left()
        self._bar.update(self._task, completed=self.done, left=f"{duration(left)} left" if left else "")

    def left(self) -> float:
        """Seconds till the end; 0 where nothing is known yet."""
        to_do = {work: self.updates // every - self.done // every for work, every in self._periods.items()}
        updates = self._time.of(to_do | {_UPDATE: self.updates - self.done})
        return min(updates, max(self._ends - monotonic(), 0)) + self._afterwards

    def print(self, line: str) -> None:
        self.console.print(line, markup=False)
        self._said = monotonic()

    @property
    def silent(self) -> bool:
        """Whether nothing has been printed for a while."""
        return monotonic() - self._said > QUIET_SECONDS


@contextmanager
def counted(console: Console, what: str, total: int) -> Iterator[Callable[[object], None]]:
    """A function to call with each of ``total`` items when it is done."""
    done, started = 0, monotonic()
    said = started
    with progress_bar(console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def count(item: object) -> None:
            nonlocal done, said
            done += 1
            bar.advance(task)
            now = monotonic()
            if not console.is_terminal and now - said > QUIET_SECONDS and done < total:
                said = now
                left = duration((now - started) / done * (total - done))
                console.print(f"  {what} {done}/{total}, {left} left", markup=False)

        yield count


def duration(seconds: float) -> str:
    """In the unit that a reader would take: 40 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
