"""Prompts of a command: text, one prompt per line, or JSONL with ``prompt`` or ``messages``; strings or chats."""

import json
import sys
from pathlib import Path
from typing import Literal

Prompt = str | list[dict[str, str]]
Format = Literal["text", "jsonl"]


def read_prompts(source: str, format: Format | None = None) -> list[Prompt]:
    """The prompts of a file, or of standard input ("-"); blank lines are skipped.

    ``format`` None: jsonl for a file named so, otherwise text. ValueError names the source and the line.
    """
    name = "standard input" if source == "-" else source
    try:
        text = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        lines = text.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"input {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"input {name} is not UTF-8: {error}") from error
    format = format or ("jsonl" if source.endswith(".jsonl") else "text")
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ValueError(f"input {name} holds no prompt: give one per line")
    if format == "text":
        return [line for _, line in numbered]
    return [_prompt_of(line, f"input {name}, line {number}") for number, line in numbered]


def _prompt_of(line: str, place: str) -> Prompt:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ValueError(f'{place} must be a JSON object with either "prompt" or "messages"')
    if "prompt" in fields:
        if not isinstance(fields["prompt"], str):
            raise ValueError(f"{place}: prompt must be a string, got {fields['prompt']!r}")
        return fields["prompt"]
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise ValueError(f'{place}: messages must be a list of {{"role": ..., "content": ...}} with strings')
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def as_chats(prompts: list[Prompt], chat: bool, system: str | None) -> list[Prompt]:
    """All strings or all chats: with ``chat`` strings become user messages. ``system`` comes first in chats without one.

    ValueError when strings and chats are mixed without ``chat``, or ``system`` is given without any chat.
    """
    if chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    strings = sum(isinstance(prompt, str) for prompt in prompts)
    if 0 < strings < len(prompts):
        raise ValueError("input mixes prompts and messages: --chat makes every prompt a chat")
    if system is None:
        return prompts
    if strings:
        raise ValueError("system is for chats: add --chat")
    return [p if p[0]["role"] == "system" else [{"role": "system", "content": system}, *p] for p in prompts]


def prompt_text(prompt: Prompt) -> str:
    """The prompt for a reader: the string, or each message under its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
