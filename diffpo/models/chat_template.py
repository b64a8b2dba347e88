"""Chats as text by the tokenizer's chat template: a program from a stranger's file, so it runs in a process that may fail.

transformers renders it in jinja's sandbox, which keeps it from the machine but not from looping or filling the memory.
"""

import gc
import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CPU_SECONDS = 1  # and one more for every hundred chats, each of which takes about a hundredth of that
_WALL_SECONDS = 60  # only for a process that hangs without working
_MEMORY = 150 * 2**20  # bytes beside what this process holds
_CHARACTERS = 1_000_000  # of a rendered chat, beside those of its messages

Chat = list[dict[str, str]]


class ChatTemplateError(ValueError):
    """The template could not render one of the chats: ``index`` and ``reason``."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"chat {index}: {reason}")
        self.index, self.reason = index, reason


def render_chats(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat]) -> list[str]:
    """Each chat in the template, up to where the assistant's answer begins. Special tokens are spelled out in it.

    A last message of the assistant is a turn already begun: its content follows the opened turn, as TRL continues it.
    ChatTemplateError for a template that does not parse, raises, is refused by the sandbox, renders nothing, takes too long or
    too much memory.
    """
    texts = []
    for index, outcome in enumerate(_outcomes(tokenizer, chats)):
        if "error" in outcome:
            raise ChatTemplateError(index, f"the tokenizer's chat template {outcome['error']}")
        texts.append(outcome["text"])
    return texts


def _outcomes(tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat]) -> list[dict[str, str]]:
    """{"text": ...} of each chat up to the first that fails, which is {"error": what the template does}."""

    read_end, write_end = os.pipe()
    with warnings.catch_warnings():  # the child touches neither torch nor the threads of this process
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render_and_exit(tokenizer, chats, read_end, write_end)
    os.close(write_end)
    try:
        lines = _read_until(read_end, time.monotonic() + _WALL_SECONDS + len(chats) / 100)
    finally:
        os.close(read_end)
        os.kill(child, signal.SIGKILL)  # it has written all it will, or hangs
        os.waitpid(child, 0)
    outcomes = [json.loads(line) for line in lines]
    if len(outcomes) < len(chats) and not (outcomes and "error" in outcomes[-1]):
        outcomes.append({"error": "takes too long or ends its process: does it loop without end?"})
    return outcomes


def _read_until(source: int, deadline: float) -> list[bytes]:
    """The whole lines that arrive before the writer closes or the deadline passes."""
    received = bytearray()
    while select.select([source], [], [], max(0.0, deadline - time.monotonic()))[0]:
        block = os.read(source, 1 << 16)
        if not block:
            break
        received += block
    return bytes(received).split(b"\n")[:-1]


def _render_and_exit(
    tokenizer: "PreTrainedTokenizerBase", chats: Sequence[Chat], read_end: int, write_end: int
) -> None:
    """In the child. Leaves without the interpreter's clean-up, which belongs to the parent."""
    try:
        os.close(read_end)
        gc.disable()  # what it would collect may live on a GPU, which belongs to the parent
        _limit_resources(len(chats))
        with os.fdopen(write_end, "wb") as sink:
            for chat in chats:
                outcome = _outcome(tokenizer, chat)
                sink.write(json.dumps(outcome).encode() + b"\n")
                if "error" in outcome:
                    break
    finally:
        os._exit(0)


def _limit_resources(chats: int) -> None:
    size = Path("/proc/self/statm")
    if size.exists():
        memory = int(size.read_text().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    seconds = _CPU_SECONDS + chats // 100
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _outcome(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> dict[str, str]:
    try:
        text = _render(tokenizer, chat)
    except MemoryError:
        return {"error": "needs too much memory"}
    except Exception as error:  # whatever a stranger's program raises
        return {"error": f"fails: {_one_line(error)}"}
    if not text.strip():
        return {"error": "renders nothing"}
    if len(text) > _CHARACTERS + sum(len(message["content"]) for message in chat):
        return {"error": f"renders {len(text):,} characters"}
    return {"text": text}


def _render(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> str:
    begun = chat[-1]["content"] if chat[-1]["role"] == "assistant" else None
    turns = chat if begun is None else chat[:-1]
    if not turns:
        raise ValueError("a chat needs a message before the assistant's")
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text if begun is None else text + begun


def _one_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + "..."
