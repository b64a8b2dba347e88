"""What is shown while a command works, and how long it says that it will take."""

import io
import math
import re

import pytest

from diffpo.runs import phases
from diffpo.runs.phases import TimeLeft, TrainingProgress, counted, duration
from diffpo.runs.progress import Console


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass."""
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(phases, "monotonic", lambda: now)
    return wait


def console(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)


def said(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_slow_first_update_and_a_stall_do_not_decide():
    left = TimeLeft()
    for seconds in (600, *[2.0] * 18, 300):
        left.took("update", seconds)
    assert left.of({"update": 10}) == pytest.approx(20)


def test_old_durations_are_forgotten():
    left = TimeLeft()
    for seconds in (*[100.0] * 50, *[1.0] * 32):
        left.took("update", seconds)
    assert left.of({"update": 7}) == pytest.approx(7)


def test_what_was_never_done_does_not_count():
    left = TimeLeft()
    assert left.of({"update": 10}) == 0
    left.took("update", 2)
    assert left.of({"update": 10, "guard": 3, "save": 0}) == 20


def test_the_time_left_holds_all_that_is_still_to_come(clock):
    progress = TrainingProgress(console(), 20, 10, {"guard": 5, "save": 4, "samples": 0}, afterwards=7)
    assert progress.left() == 7
    with progress.doing("update"):
        clock(2)
    with progress.doing("guard"):
        clock(10)
    with progress.doing("save"):
        clock(1)
    progress.advance()  # 11 of 20: guard after 15 and 20, saved after 12, 16 and 20
    assert progress.left() == 9 * 2 + 2 * 10 + 3 * 1 + 7


def test_a_limit_of_time_ends_the_updates(clock):
    progress = TrainingProgress(console(), 1000, limit=60, afterwards=5)
    with progress.doing("update"):
        clock(10)
    progress.advance()
    assert progress.left() == 50 + 5
    clock(100)
    assert progress.left() == 5
    assert TrainingProgress(console(), 10, limit=math.inf).left() == 0


def test_the_seconds_of_what_is_done_now_and_then_are_told_once(clock):
    progress = TrainingProgress(console(), 4)
    for work, seconds in (("update", 1), ("guard", 2), ("save", 3)):
        with progress.doing(work):
            clock(seconds)
    assert progress.seconds() == {"seconds/guard": 2, "seconds/save": 3}  # the trainer counts an update's phases
    assert progress.seconds() == {}


def test_a_terminal_shows_the_phase_and_the_time_left(clock):
    shown = console(terminal=True)
    with TrainingProgress(shown, 100, periods={"guard": 50}) as progress:
        with progress.doing("update"):
            progress.show("rollout")
            progress._bar.refresh()
            clock(30)
        progress.advance()
        progress.show("score")
        progress._bar.refresh()
    text = said(shown)
    assert "rollout" in text
    assert "score" in text
    assert "1/100" in text
    assert "50 min left" in text


def test_without_a_terminal_nothing_is_drawn_and_long_phases_are_told(clock):
    shown = console()
    with TrainingProgress(shown, 100, done=6) as progress:
        progress.show("rollout")
        clock(31)
        assert progress.silent
        progress.show("score")
        progress.show("update")
        assert not progress.silent
    assert said(shown) == "update    7/100: score\n"


def test_counted_items_are_told_now_and_then(clock):
    shown = console()
    with counted(shown, "evaluation", 10) as count:
        for _ in range(10):
            clock(20)
            count({})
    assert said(shown).splitlines() == [
        f"  evaluation {done}/10, {left} left" for done, left in ((2, "3 min"), (4, "2 min"), (6, "80 s"), (8, "40 s"))
    ]


def test_quick_work_says_nothing_without_a_terminal(clock):
    shown = console()
    with counted(shown, "evaluation", 3) as count:
        for _ in range(3):
            clock(1)
            count({})
    assert said(shown) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (172799, "48.0 h"), (180000, "2.1 days")],
)  # fmt: skip
def test_durations_have_the_readers_unit(seconds, text):
    assert duration(seconds) == text
