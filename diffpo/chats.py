"""Chats: lists of messages, each a role and a text; what TRL, OpenAI and transformers write is brought into that form."""


def as_messages(value: object) -> list[dict[str, str]]:
    """Messages with text contents. A content of parts ({"type": "text", "text": ...}) is their texts, one after the other.

    ValueError for anything else, e.g. an image part or a tool call, which would otherwise be lost without a word.
    """
    if not isinstance(value, list) or not value or not all(_has_role_and_content(message) for message in value):
        raise ValueError('messages must be a list of {"role": ..., "content": ...} with strings')
    return [_message(message, f"message {number}") for number, message in enumerate(value, 1)]


def _has_role_and_content(value: object) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str | list)
    )


def _message(value: dict, place: str) -> dict[str, str]:
    for key in ("tool_calls", "function_call"):
        if value.get(key):
            raise ValueError(f"{place}: {key} is not supported, only text")
    return {"role": value["role"], "content": as_text(value["content"], place)}


def as_text(content: str | list, place: str) -> str:
    """A content as one string."""
    return content if isinstance(content, str) else "".join(_part_text(part, place) for part in content)


def _part_text(part: object, place: str) -> str:
    if not isinstance(part, dict) or "type" not in part:
        raise ValueError(f'{place}: a content part must be {{"type": "text", "text": ...}}, got {part!r}')
    if part["type"] != "text":
        raise ValueError(f"{place}: content part of type {part['type']!r} is not supported, only text")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{place}: the text of a content part must be a string, got {part.get('text')!r}")
    return part["text"]
