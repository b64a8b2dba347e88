"""What every task promises, whatever its problems are."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpo.tasks import CompactTask, PublishedTask, get_task, task_names
from diffpo.tasks.task import chat_answer

TASKS = [task for task in map(get_task, task_names()) if isinstance(task, CompactTask)]
CHATS = [task for task in TASKS if isinstance(task, PublishedTask)]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"'countdwn'.*'countdown'"):
        get_task("countdwn")
    with pytest.raises(ValueError, match="'countdown' or 'gsm8k' or 'math500' or 'medley' or 'sudoku'"):
        get_task("zzz")


@every_task
def test_compact_form_is_closed_and_of_the_declared_length(task):
    assert len(set(task.vocabulary)) == len(task.vocabulary)
    assert task.gen_length % task.block_length == 0
    for prompt, completion in task.examples(2000, seed=0):
        assert set(prompt.split()) | set(completion.split()) <= set(task.vocabulary)
        words = len(completion.split()) + task.ends_with_eos
        assert words <= task.gen_length if task.name == "medley" else words == task.gen_length


@every_task
def test_solutions_are_right(task):
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for problem in task.problems(split, 300, seed=1):
            solution = task.solution(problem, rng)
            assert set(task.prompt(problem).split()) | set(solution.split()) <= set(task.vocabulary)
            for text in (solution, f"\n {solution}\n"):
                assert task.grade(problem, text).correct is True
                assert task.grade(problem, text).reward == 1.0


@every_task
def test_seeds_decide_everything(task):
    assert task.examples(50, seed=3) == task.examples(50, seed=3) != task.examples(50, seed=4)
    for split in ("train", "validation", "test"):
        assert task.problems(split, 50, seed=3) == task.problems(split, 50, seed=3) != task.problems(split, 50, seed=4)
    problem = task.problems("test", 1, seed=0)[0]
    assert task.solution(problem, np.random.default_rng(0)) == task.solution(problem, np.random.default_rng(0))


@every_task
def test_requests_are_checked(task):
    assert task.examples(0, seed=0) == task.problems("train", 0, seed=0) == []
    with pytest.raises(ValueError, match="'holdout'"):
        task.problems("holdout", 1, seed=0)
    with pytest.raises(ValueError, match="-1"):
        task.examples(-1, seed=0)
    with pytest.raises(ValueError, match=r"test split .* holds"):
        task.problems("test", 10**9, seed=0)


@pytest.mark.parametrize("task", CHATS, ids=lambda task: task.name)
def test_chat_is_one_user_turn_with_the_answer_format_and_the_answer_begun(task):
    turn, begun = task.asked("chat").prompt(task.problems("train", 1, seed=0)[0])
    assert begun == {"role": "assistant", "content": task.prefill}
    assert turn["role"] == "user"
    assert "<answer>" in turn["content"]
    assert task.prefill in turn["content"]


WORDS = sorted({word for task in TASKS for word in task.vocabulary})
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*WORDS, "(", ")", "<answer>", "</answer>", "\n", "\\boxed{", "\u0664"])).map(" ".join),
    st.text(alphabet="0123456789+-*/()= .", max_size=40).map("<answer>{}</answer>".format),
)


@every_task
@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_any_text_has_a_reward(task, text):
    problem = task.problems("test", 1, seed=0)[0]
    reward = task.grade(problem, text).reward
    assert math.isfinite(reward)
    assert 0 <= reward <= 1
    assert reward == 1 or not task.grade(problem, text).correct


@every_task
@pytest.mark.parametrize(
    "text",
    [
        *("", "\ud800", "<answer>" * 100_000, "</answer>" * 100_000, "<answer></answer>" * 50_000),
        *(" " * 10**6, "1" * 10**6, "1 " * 10**5, "1 + " * 10**5),
        *(f"<answer>{'(' * 10_000}1{')' * 10_000}</answer>", f"<answer>{'9' * 10**5}</answer>"),
    ],
    ids=lambda text: f"{text[:10]}..{len(text)}",
)
def test_hostile_texts_are_wrong_at_once(task, text):
    problem = task.problems("test", 1, seed=0)[0]
    assert task.grade(problem, text).correct is False
    assert task.grade(problem, text).reward < 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no tags", None),
        ("<answer>unclosed", None),
        ("</answer>backwards<answer>", None),
        ("reasoning</reasoning>\n<answer>\n 1 + 2 \n</answer> end", "1 + 2"),
        ("<answer>first</answer> <answer>last</answer>", "last"),
        ("<answer>complete</answer> <answer>unclosed", "complete"),
        ("<answer>outer <answer>inner</answer>", "inner"),
        ("<answer>first close</answer> wins </answer>", "first close"),
        ("<answer></answer>", ""),
    ],
)
def test_chat_answer_is_the_last_complete_one(text, answer):
    assert chat_answer(text) == answer
