"""MATH: equivalence in a worker process that may hang, raise or die, and the published training reward by hand."""

import os
import signal
import time
from pathlib import Path

import pytest

from diffpo.tasks import Math500
from diffpo.tasks.math import format_reward
from diffpo.tasks.math_equivalence import MathEquivalence

HANGS = "9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def equal() -> MathEquivalence:
    return MathEquivalence()


@pytest.fixture
def task(equal) -> Math500:
    return Math500(equal)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", r"\dfrac{2}{4}", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
        ("p - q", "-q + p", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("1,234", "1234", True),
        (r"\text{Evelyn}", r"\text{Bob}", False),
        ("6", "7", False),
        ("(1, 2)", "(2, 1)", False),
        ("6", "", False),
        ("6", "x^", False),
    ],
)
def test_equality_is_mathematical(equal, gold, answer, verdict):
    assert equal(gold, answer) is verdict


def test_an_unreadable_reference_is_undecided(equal):
    assert equal("", "6") is None
    assert equal("6", "6.0") is True  # and the process goes on


def test_a_check_that_hangs_is_undecided_and_the_next_one_works():
    equal = MathEquivalence(seconds=1.0)
    assert equal("3", "3.0") is True
    started = time.monotonic()
    assert equal("3", HANGS) is None
    assert time.monotonic() - started < 10
    assert equal._process is None
    started = time.monotonic()
    assert equal("3", HANGS) is None  # remembered
    assert time.monotonic() - started < 0.5
    assert equal("3", "4") is False


def test_memory_is_limited():
    equal = MathEquivalence(memory_gib=0.75)
    assert equal("3", "3.0") is True
    limits = Path(f"/proc/{equal._process.pid}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert line.split()[3:5] == [str(3 * 2**28)] * 2


def test_a_killed_worker_is_undecided_and_replaced():
    equal = MathEquivalence()
    assert equal("3", "3.0") is True
    os.killpg(equal._process.pid, signal.SIGKILL)
    equal._process.wait()
    assert equal("3", "3.00") is None
    assert equal("3", "3.000") is True


def test_the_worker_ends_with_its_owner():
    equal = MathEquivalence()
    assert equal("3", "4") is False
    process = equal._process
    del equal
    assert process.poll() is not None


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr("diffpo.tasks.math_equivalence._WORKER", "no/such/file.py")
    with pytest.raises(RuntimeError, match="math-verify does not start"):
        MathEquivalence()("1", "2")


def test_rows_hold_the_answer_or_a_solution(task):
    assert task.problem_from_row({"problem": "q", "answer": "3", "solution": r"\boxed{4}"}).answer == "3"
    assert task.problem_from_row({"problem": "q", "solution": r"so \boxed{\frac{1}{2}}."}).answer == r"\frac{1}{2}"
    with pytest.raises(ValueError, match=r"answer.*columns: problem, level"):
        task.problem_from_row({"problem": "q", "level": 3})


def test_the_last_box_is_the_answer(task):
    problem = task.problem_from_row({"problem": "q", "answer": r"\frac{1}{2}"})
    assert task.grade(problem, r"\boxed{1} no, \boxed{0.5}").correct is True
    assert task.grade(problem, r"\boxed{0.5} no, \boxed{1}").correct is False
    assert task.grade(problem, "<answer>0.5</answer>").correct is False
    assert task.grade(problem, r"\boxed{}").correct is False
    assert "\\boxed{your answer}" in task.chat(problem)[0]["content"]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"<answer>\boxed{1}</answer>", 1.0),
        (r"\boxed{1} <answer>1</answer>", 0.75),
        (r"\boxed{1}", 0.5),
        (r"\boxed{1} <answer>1", 0.5),
        ("1", 0.25),
    ],
)
def test_format_reward(task, text, reward):
    assert format_reward(text) == reward
    problem = task.problem_from_row({"problem": "q", "answer": "1"})
    assert task.grade(problem, text).reward == reward + 2.0 * (r"\boxed" in text)


def test_an_undecided_answer_has_no_reward():
    task = Math500(lambda gold, answer: None)
    problem = task.problem_from_row({"problem": "q", "answer": "1"})
    assert task.grade(problem, r"\boxed{2}").correct is None
    assert task.grade(problem, r"\boxed{2}").reward is None
    assert task.grade(problem, "no box").reward == 0.25
