"""Which tasks a run can train on, in which format and with which lengths."""

import json

import pytest
from chat_models import save_chat_model

import diffpo.train
from diffpo.models.checkpoints import load
from diffpo.tasks import Countdown, Sudoku, get_task
from diffpo.tasks.prompts import suited
from diffpo.training.config import TrainConfig
from diffpo.training.trainer import Trainer


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    return save_chat_model(tmp_path_factory.mktemp("models") / "chat")


def failing(train, capsys, *flags) -> str:
    """The one line of a run that ended with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        train(*flags)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1), error
    return error


@pytest.mark.parametrize("task", ["gsm8k", "math500"])
def test_a_task_without_training_problems_is_refused_before_anything_starts(train, tmp_path, capsys, task):
    error = failing(train, capsys, "--task", task, "--model", "no/such/model")
    assert (
        f"task: task {task} has no train split, its data is a test split; train on countdown, sudoku or medley" in error
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (
            ["--rollout.gen-length", "16", "--rollout.block-length", "5"],
            "gen_length 16 must be a multiple of block_length",
        ),
        (["--rollout.gen-length", "256"], "gen_length 256 more than the model's context of 256"),
        (["--rollout.gen-length", "0"], "rollout.gen_length"),
    ],
)
def test_lengths_that_do_not_fit_are_found_before_the_run(train, tmp_path, capsys, lengths, message):
    assert message in failing(train, capsys, *lengths)
    assert list(tmp_path.iterdir()) == []


def test_rollouts_have_the_lengths_that_are_set(sudoku_model):
    small = {"name": "diffpo", "prompts_per_update": 2, "group_size": 4}
    config = TrainConfig(task="sudoku", algorithm=small, rollout={"gen_length": 8, "block_length": 4})
    trainer = Trainer(config, load(sudoku_model), get_task("sudoku"))
    trajectory = trainer.collect().trajectory
    assert (trajectory.tokens.shape, trajectory.block_length) == ((8, 8), 4)
    default = Trainer(TrainConfig(task="sudoku", algorithm=small), load(sudoku_model), get_task("sudoku"))
    assert default.lengths == (16, 16)


def test_the_format_is_the_models(chat_model, sudoku_model):
    assert suited(Sudoku(), load(sudoku_model)).format == "compact"
    assert suited(Countdown(), load(chat_model)).format == "chat"
    with pytest.raises(ValueError, match="does not know words of task countdown"):
        suited(Countdown(), load(sudoku_model))
    with pytest.raises(ValueError, match="no chat template"):
        suited(Sudoku(), load(sudoku_model), "chat")


def test_a_run_on_chats(train, chat_model, tmp_path, metrics_of, monkeypatch):
    """An untrained model answers nothing; what the task reads begins as the prompt has begun it."""
    texts, grade = [], Sudoku.grade
    monkeypatch.setattr(Sudoku, "grade", lambda self, problem, text: texts.append(text) or grade(self, problem, text))
    lengths = ["--rollout.gen-length", "8", "--rollout.block-length", "4"]
    small = ["--updates", "2", "--heldout", "4", "--algorithm.prompts-per-update", "2", "--no-sweep"]
    assert train("--model", chat_model, *lengths, *small) == 0
    assert all(text.startswith("<reasoning>") for text in texts)
    first, second = metrics_of(tmp_path / "run")
    assert (first["update"], second["update"]) == (1, 2)
    assert first["length"] <= 8
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["base"]["one_at_a_time"]["nfe"] <= 8
    assert diffpo.load(tmp_path / "run/model").tokenizer.chat_template
