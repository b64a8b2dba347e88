"""A chat model, a data file and a run, for ``python -m diffpo.evaluate``."""

import json
import os
import signal
import time

import pytest
from chat_models import save_chat_model
from evaluate_runs import GSM8K_ROWS

import diffpo
import diffpo.evaluation
from diffpo.decoding.generation import stream
from diffpo.evaluate import main


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """The folder of an untrained model whose tokenizer reads any text and has a chat template."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def gsm8k(tmp_path) -> str:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K_ROWS))
    return str(path)


@pytest.fixture
def run(tmp_path):
    """run(*flags) -> exit code of a run called "run" in tmp_path."""
    return lambda *flags: main([*map(str, flags), "--name", "run", "--runs", str(tmp_path)])


@pytest.fixture
def chat_flags(chat_model, gsm8k) -> list[str]:
    return ["--model", chat_model, "--task", "gsm8k", "--data", gsm8k, "--gen-length", "16", "--block-length", "8"]


@pytest.fixture
def interrupted_after(monkeypatch):
    """interrupted_after(n): Ctrl-C while the network works on what follows the n-th row."""

    def patch(rows: int) -> None:
        def interrupted(*arguments, **options):
            for count, row in enumerate(stream(*arguments, **options)):
                if count == rows:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(10)  # the signal arrives here
                yield row

        monkeypatch.setattr(diffpo.evaluation, "stream", interrupted)

    return patch
