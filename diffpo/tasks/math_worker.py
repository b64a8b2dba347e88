"""The process in which math-verify runs: batches of pairs of LaTeX answers in, a verdict per pair out.

Run as a script, so that it imports neither torch nor diffpo. It imports math-verify once and forks a child for each pair, several at a
time: a child that hangs is killed and costs nothing but its time. math-verify's own time limits rest on SIGALRM, which does not interrupt
arithmetic on huge integers: they are off, and the kernel ends a child that has used up its processor time.

A request is a line of JSON: pairs, seconds (of processor time for one pair), budget (seconds for all) and workers. The replies are lines
[index, verdict, final]: true, false or null, and whether more time would make no difference; then "done".
"""

import gc
import json
import logging
import os
import resource
import select
import selectors
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

_WARM_UP = [  # what sympy caches at first use, so that every child has it
    ("1", "1"),
    (r"\frac{x}{2}", r"0.5x + \sqrt{2} - \sqrt{2}"),
    (r"\sum_{k=1}^{3} k", r"\int_0^1 x\,dx"),
    (r"x<3 \text{ or } x>5", "2x<6"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\{1,2\}"),
    ("(1,2)", "[1,2)"),
    ("x^2=4", "2x^2=8"),
    (r"\sin x", r"\cos^2 x+1"),
]
_LEAST_SECONDS = 0.1
_CLOCK_GRACE = 1.0


def equal(gold: str, answer: str) -> bool:
    """What math-verify says; where it finds two numbers equal to its fifteen digits, many more are looked at."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    parsed = [parse(f"\\boxed{{{side}}}", config, parsing_timeout=None, raise_on_error=True) for side in (gold, answer)]
    if not parsed[0]:
        raise ValueError(f"math-verify cannot read the reference answer {gold!r}")
    return verify(*parsed, timeout_seconds=None, raise_on_error=True) and not _differ(*parsed)


def _differ(gold: list, answer: list) -> bool:
    """Whether the two are numbers that differ for certain."""
    from sympy import Expr

    pair = [side[0] for side in (gold, answer) if side and isinstance(side[0], Expr) and side[0].is_number]
    if len(pair) < 2:
        return False
    difference = (pair[0].doit() - pair[1].doit()).evalf(5, maxn=1000)
    return bool(difference.is_comparable and difference != 0 and difference._prec > 1)


class _Child:
    """A process that decides one pair."""

    def __init__(self, index: int, pair: list[str], seconds: float) -> None:
        self.index = index
        self.deadline = time.monotonic() + seconds + _CLOCK_GRACE  # should it sleep or the machine be busy
        self.pipe, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                reply: bool | str = equal(*pair)
            except (Exception, RecursionError) as error:
                reply = f"{type(error).__name__}: {error}"[:200]
            os.write(write, json.dumps(reply).encode()[:4000])
            os._exit(0)
        os.close(write)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def verdict(self) -> tuple[bool | None, int]:
        """(verdict, signal that ended it or 0), of a child whose pipe has something to say."""
        reply = os.read(self.pipe, 4096)
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        verdict = json.loads(reply) if reply else None
        return verdict if isinstance(verdict, bool) else None, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def decide(
    pairs: list[list[str]], seconds: float, budget: float, workers: int
) -> Iterator[tuple[int, bool | None, bool]]:
    """Yield (index, verdict, final): all pairs a little, simple ones first, and once more those that need longer, within the budget."""
    deadline = time.monotonic() + budget
    waiting = sorted(range(len(pairs)), key=lambda index: _difficulty(*pairs[index]))
    limit, part = 0.0, 0.25
    while waiting:
        share = part * (deadline - time.monotonic()) * workers / len(waiting)
        if min(share, seconds) < 2 * limit or share <= 0:
            break
        limit, part = min(max(share, _LEAST_SECONDS), seconds), 1.0
        unfinished = []
        for index, verdict, ended_by in _round(pairs, waiting, limit, deadline, workers):
            if ended_by == signal.SIGKILL or (ended_by == signal.SIGPROF and limit < seconds):
                unfinished.append(index)
            else:
                yield index, verdict, True
        waiting = unfinished
    for index in waiting:
        yield index, None, False


def _difficulty(gold: str, answer: str) -> float:
    return len(answer) + 20 * sum(map(answer.count, "^!"))


def _round(
    pairs: list[list[str]], waiting: list[int], limit: float, deadline: float, workers: int
) -> Iterator[tuple[int, bool | None, int]]:
    """Yield (index, verdict, signal or 0) of every waiting pair under one limit. SIGKILL: of the clock, or there was no time to begin."""
    waiting = list(waiting)
    with selectors.DefaultSelector() as running:
        try:
            while waiting or running.get_map():
                while waiting and len(running.get_map()) < workers and time.monotonic() < deadline:
                    child = _Child(waiting[0], pairs[waiting[0]], limit)
                    running.register(child.pipe, selectors.EVENT_READ, child)
                    del waiting[0]
                if not running.get_map():
                    break
                for key, _ in running.select(timeout=0.05):
                    running.unregister(key.fd)
                    yield key.data.index, *key.data.verdict()
                now = time.monotonic()
                for key in list(running.get_map().values()):
                    if now > min(key.data.deadline, deadline):
                        key.data.kill()
        finally:
            for key in running.get_map().values():
                key.data.kill()
    for index in waiting:
        yield index, None, signal.SIGKILL


def _requests() -> Iterator[dict[str, Any]]:
    """Lines of standard input, until it ends or the parent does, whose other children may hold the pipe open."""
    parent, buffer = os.getppid(), b""
    while os.getppid() == parent:
        if select.select([0], [], [], 5.0)[0]:
            part = os.read(0, 1 << 20)
            if not part:
                return
            buffer += part
            if buffer.endswith(b"\n"):
                yield json.loads(buffer)
                buffer = b""


def main(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    for pair in _WARM_UP:  # before the clock of the first pair starts
        equal(*pair)
    gc.freeze()
    print(json.dumps("ready"), file=replies, flush=True)
    for request in _requests():
        for reply in decide(**request):
            print(json.dumps(reply), file=replies, flush=True)
        print(json.dumps("done"), file=replies, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
