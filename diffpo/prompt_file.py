"""Prompts of a command: text, one prompt per line, or JSON rows with ``prompt`` or ``messages``; strings or chats."""

from pathlib import Path
from typing import Literal

from diffpo.chats import as_messages
from diffpo.text_input import decode, json_rows, looks_like_json, numbered_lines, read

Prompt = str | list[dict[str, str]]
Format = Literal["text", "jsonl"]
_JSON_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".json")
_TABLES = (".csv", ".tsv", ".parquet", ".xlsx")


def numbered_prompts(source: str, format: Format | None = None) -> list[tuple[str, Prompt]]:
    """The prompts of a file, or of standard input ("-"), each behind the words that name its place in a message; blank lines are skipped.

    Text holds a prompt in each line. JSONL (or an array) holds objects with ``prompt``, a string or the messages of a chat, or with
    ``messages``. ``format`` None: jsonl for a file named so and for content that looks like JSON, otherwise text.
    ValueError names the source and the line.
    """
    name = "input standard input" if source == "-" else f"input {source}"
    ending = Path(source).suffix.lower()
    if format is None and ending in _TABLES:
        raise ValueError(f"{name}: {ending[1:]} files are not read: give text (one prompt per line) or JSONL")
    text = decode(read(source, name), name)
    guessed = format is None and ending not in _JSON_ENDINGS
    is_json = format == "jsonl" or (format is None and (not guessed or looks_like_json(text)))
    try:
        prompts = _json_prompts(text, name) if is_json else _text_prompts(text, name)
    except ValueError as error:
        hint = "; it looks like JSON: if it is text, add --input-format text" if guessed and is_json else ""
        raise ValueError(f"{error}{hint}") from error
    if not prompts:
        raise ValueError(f"{name} holds no prompt: give one per line")
    return prompts


def _text_prompts(text: str, name: str) -> list[tuple[str, Prompt]]:
    return [(f"{name}, line {number}", line) for number, line in numbered_lines(text)]


def _json_prompts(text: str, name: str) -> list[tuple[str, Prompt]]:
    return [(place, _prompt_of(row, place)) for place, row in json_rows(text, name)]


def _prompt_of(fields: object, place: str) -> Prompt:
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        raise ValueError(f'{place} must be a JSON object with either "prompt" or "messages"')
    if fields.get("tools"):
        raise ValueError(f"{place}: tools are not supported: leave them out")
    prompt = fields.get("prompt", fields.get("messages"))
    if "prompt" in fields and isinstance(prompt, str):
        return prompt
    if "prompt" in fields and not isinstance(prompt, list):
        raise ValueError(f"{place}: prompt must be a string or a list of messages, got {prompt!r}")
    try:
        return as_messages(prompt)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


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
    chats = [prompt for prompt in prompts if isinstance(prompt, list)]
    return [chat if chat[0]["role"] == "system" else [{"role": "system", "content": system}, *chat] for chat in chats]


def prompt_text(prompt: Prompt) -> str:
    """The prompt for a reader: the string, or each message under its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
