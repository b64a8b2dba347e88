"""The pool of processes that asks math-verify: limits on time and memory, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffpo.tasks.math_equivalence import MathEquivalence

TOWER = "9^{9^{9^{9}}}"
SUM = r"\sum_{k=1}^{%d} k"  # nothing that is read here: math-verify is asked


def endless(k: int) -> str:
    return rf"\sum_{{n=1}}^{{10^9+{k}}} \frac{{n!}}{{n^n}}"


@pytest.fixture(scope="module")
def equal() -> MathEquivalence:
    return MathEquivalence()


def test_math_verify_is_asked_what_is_not_read_here(equal):
    assert equal("6", SUM % 3) is True
    assert equal("6", SUM % 4) is False
    assert equal(r"\frac12", r"\int_0^1 x\,dx") is True
    assert equal("6", "x^") is False
    assert equal("", "6") is None  # nothing to compare with


def test_what_math_verify_takes_for_equal_is_looked_at_again(equal):
    assert equal(r"\sum_{k=1}^{2} \frac{k}{10^{20}}", r"\frac{4}{10^{20}}") is False
    assert equal(r"\sum_{k=1}^{2} \frac{k}{10^{20}}", r"\frac{3}{10^{20}}") is True


def test_absurd_sizes_are_wrong_at_once():
    equal = MathEquivalence()
    started = time.monotonic()
    pairs = [("3", rf"9^{{9^{{{k}}}}}") for k in range(9, 400)] + [("3", f"({10**6 + k})!") for k in range(121)]
    assert equal.many([*pairs, ("3", TOWER), ("3", "3.0")]) == [False] * 513 + [True]
    assert time.monotonic() - started < 10
    assert equal._process is None  # nobody was asked


def test_a_check_that_hangs_is_undecided_and_the_next_one_works():
    equal = MathEquivalence(seconds=0.5)
    assert equal("6", SUM % 3) is True
    started = time.monotonic()
    assert equal("3", endless(0)) is None
    assert time.monotonic() - started < 20
    started = time.monotonic()
    assert equal("3", endless(0)) is None  # remembered
    assert time.monotonic() - started < 0.4
    assert equal("6", SUM % 4) is False


@pytest.fixture(scope="module")
def hasty() -> MathEquivalence:
    return MathEquivalence(seconds=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [r"\sum_{n=1}^{\infty} \frac{1}{n^{1+1/10^{9}}}", r"\prod_{k=1}^{10^{8}} (1+\frac1k)"]
)
def test_one_slow_check_ends_by_the_clock(hasty, answer):
    assert hasty("6", SUM % 3) is True
    started = time.monotonic()
    assert hasty("2", answer) is None
    assert time.monotonic() - started < 4


@pytest.mark.slow
def test_many_that_hang_stay_within_the_budget_and_the_others_are_decided():
    equal = MathEquivalence(budget=4.0, workers=2)
    assert equal("6", SUM % 3) is True  # the pool has started
    pairs = [("3", endless(k)) for k in range(40)]
    pairs[20:20] = [("10", SUM % 4), ("3", "3.0"), ("15", SUM % 4)]
    started = time.monotonic()
    verdicts = equal.many(pairs)
    assert time.monotonic() - started < 4 + 5
    assert verdicts[20:23] == [True, True, False]
    assert set(verdicts[:20] + verdicts[23:]) == {None}


@pytest.mark.slow
def test_checks_that_hang_one_after_the_other_share_a_budget():
    """512 of them would take 512 times the limit for one."""
    equal = MathEquivalence(seconds=3.0, budget=3.0)
    assert equal("6", SUM % 3) is True
    assert equal("3", endless(0)) is None
    started = time.monotonic()
    assert [equal("3", endless(k)) for k in range(1, 6)] == [None] * 5
    assert time.monotonic() - started < 5 * 1.5
    assert equal("10", SUM % 4) is True


def test_equal_pairs_are_asked_once(equal, monkeypatch):
    asked = []
    ask = equal._ask
    monkeypatch.setattr(equal, "_ask", lambda pairs: asked.extend(pairs) or ask(pairs))
    assert equal.many([("21", SUM % 6), ("21", SUM % 7)] * 10) == [True, False] * 10
    assert equal("21", SUM % 6) is True
    assert asked == [("21", SUM % 6), ("21", SUM % 7)]


def test_memory_is_limited():
    equal = MathEquivalence(memory_gib=0.75)
    assert equal("6", SUM % 3) is True
    limits = Path(f"/proc/{equal._process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert line.split()[3:5] == [str(3 * 2**28)] * 2


def test_a_killed_pool_is_replaced():
    equal = MathEquivalence()
    assert equal("6", SUM % 3) is True
    os.killpg(equal._process.pid, signal.SIGKILL)
    equal._process.wait()
    assert equal("10", SUM % 4) is None
    assert equal("10", SUM % 4) is True  # not remembered


def test_the_pool_ends_with_its_owner():
    equal = MathEquivalence()
    assert equal("6", SUM % 4) is False
    process = equal._process
    del equal
    assert process.poll() is not None


def test_the_pool_ends_with_the_process_even_if_that_is_killed():
    script = (
        "import os, signal; from diffpo.tasks.math_equivalence import MathEquivalence; equal = MathEquivalence();"
        f"equal('6', {SUM % 3!r}); print(equal._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120).stdout
    for _ in range(100):
        if not Path(f"/proc/{int(out)}").exists():
            return
        time.sleep(0.1)
    pytest.fail("the pool is still there")


def test_threads_share_one_pool(equal):
    verdicts = {}

    def ask(k: int) -> None:
        verdicts[k] = equal(str(k * (k + 1) // 2), SUM % k)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(31, 39)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(31, 39), True)


def test_a_forked_child_has_a_pool_of_its_own(equal):
    assert equal("6", SUM % 3) is True
    parents = equal._process.pid
    child = os.fork()
    if child == 0:
        right = equal("66", SUM % 11) is True and equal._process.pid != parents
        equal._stop()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert equal("78", SUM % 12) is True
    assert equal._process.pid == parents


def undecided_with_one_warning(equal: MathEquivalence, words: str) -> None:
    with pytest.warns(RuntimeWarning, match=words) as caught:
        verdicts = [equal.many([("1", SUM % 1), ("2", "2.0"), ("3", SUM % 2)]), equal("3", SUM % 2)]
    assert verdicts == [[None, True, None], None]
    assert len(caught) == 1
    assert "pip install math-verify" in str(caught[0].message)


def test_a_pool_that_cannot_start_leaves_undecided(monkeypatch):
    monkeypatch.setattr("diffpo.tasks.math_equivalence._WORKER", "no/such/file.py")
    undecided_with_one_warning(MathEquivalence(), "math-verify does not start")


def test_a_process_that_cannot_be_had_leaves_undecided(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    undecided_with_one_warning(MathEquivalence(), "math-verify does not start")


def test_without_math_verify_what_is_exact_is_still_decided(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    undecided_with_one_warning(MathEquivalence(), "needs math-verify")


def test_only_undecided_pairs_use_up_the_shared_budget_and_decided_calls_give_back():
    equal = MathEquivalence(budget=40.0)
    equal._account(30.0, 5.0, [True] * 9 + [None])
    assert equal._patience == 35.0
    equal._account(2.0, 5.0, [None])
    assert equal._patience == 33.0
    equal._account(4.0, 5.0, [True, False])
    assert equal._patience == 37.0
    equal._account(20.0, 5.0, [True])
    assert equal._patience == 40.0
    equal._account(60.0, 5.0, [None] * 100)
    assert equal._patience == 0.0
