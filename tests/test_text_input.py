"""Text and JSON that others wrote: what is read, and that every fault names its line."""

import gzip

import pytest

from diffpo.chats import as_messages
from diffpo.text_input import decode, json_rows, looks_like_json, numbered_lines, parse_json


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a\nb".encode("utf-16"), "UTF-16"),
        ("a\nb".encode("utf-16-be"), "line 1 holds a NUL byte: if the file is UTF-16"),
        ("a\nb".encode("utf-16-le"), "NUL byte"),
        (b"\xfe\xff\0a", "UTF-16"),
        ("a".encode("utf-32"), "UTF-16"),
        (gzip.compress(b'{"prompt": "a"}', mtime=0), "gzip: unpack it first"),
        (b"PK\x03\x04rest", "zip"),
        (b"one\ntwo\ncaf\xe9\n", r"f, line 3 is not UTF-8 \(byte 0xe9\)"),
        (b"one\n\xed\xa0\xbd", "f, line 2 is not UTF-8"),
        (b"one\ntw\0o", "f, line 2 holds a NUL byte"),
    ],
)
def test_what_is_no_utf8(content, named):
    with pytest.raises(ValueError, match=named):
        decode(content, "f")


def test_lines_of_every_kind_keep_their_numbers():
    text = decode(b"\xef\xbb\xbfa\r\n\r\n \t\n b \r\xef\xbb\xbfc\nd\xe2\x80\xa8e", "f")
    assert numbered_lines(text) == [(1, "a"), (4, " b "), (5, "c"), (6, "d\u2028e")]
    assert numbered_lines("") == numbered_lines("\ufeff\n \r\n") == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 100_000, "f, line 7 is not valid JSON: it is nested too deeply"),
        ('{"a":' * 100_000, "f, line 7 is not valid JSON: it is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "f, line 7 is not valid JSON: a number of 5000 digits"),
        ('{"a": -' + "1" * 4301 + "}", "f, line 7 is not valid JSON: a number of"),
        ('{"a": 1, "b": 2, "a": 3}', "f, line 7 is not valid JSON: key 'a' stands twice"),
        ('{"a": 1', "f, line 7 is not valid JSON: Expecting ',' delimiter at column 8"),
        ('{"a":\n 1\n "b"}', "f, line 9 is not valid JSON"),
        ('{"a": "\t"}', "f, line 7 is not valid JSON"),
        (r'{"a": "half \ud83d emoji"}', r"f, line 7: not valid Unicode: \\ud83d is half of a character"),
        (r'{"a": ["\ude00\ud83d"]}', r"f, line 7: not valid Unicode: \\ude00"),
        (r'{"\uDC00": 1}', r"f, line 7: not valid Unicode: \\udc00"),
    ],
)
def test_json_that_is_refused(text, named):
    with pytest.raises(ValueError, match=named):
        parse_json(text, "f", 7)


def test_json_that_is_read():
    assert parse_json(r'{"a": "\ud83d\ude00 \u0000", "b": [1e5, 123456789012345678901234567890]}', "f") == {
        "a": "\U0001f600 \0",
        "b": [1e5, 123456789012345678901234567890],
    }


def test_rows_as_lines_as_an_array_and_as_one_object():
    one, two = {"a": 1}, {"a": 2}
    assert json_rows('{"a": 1}\n\n{"a": 2}', "f") == [("f, line 1", one), ("f, line 3", two)]
    assert json_rows(' [{"a": 1},\n {"a": 2}]\n', "f") == [("f, item 1", one), ("f, item 2", two)]
    assert json_rows('\n{\n "a": 1\n}\n', "f") == [("f, line 2", one)]
    assert json_rows("\n", "f") == []
    for text, named in [
        ('{"a": 1}\n{"a": ', "f, line 2"),
        ('[{"a": 1},\n\n {]', "f, line 3"),
        ('{\n"a": 1\n}\n{\n"a": 2\n}', "f, line 1"),
    ]:
        with pytest.raises(ValueError, match=f"{named} is not valid JSON"):
            json_rows(text, "f")


@pytest.mark.parametrize("text", ['{"a": 1}', 'x\n  {"a', "{\n 'a': 1}", "{}", '[\n {"a": 1}]', '\ufeff{ "a'])
def test_text_that_looks_like_json(text):
    assert looks_like_json(text)


@pytest.mark.parametrize(
    "text", ["{x} is a set", "[1, 2] is a list", "[[link]]", 'say {"a": 1}', "7 3 11 -> 32", "{% if %}"]
)
def test_text_that_does_not(text):
    assert not looks_like_json(text)


# ---- chats


def test_content_parts_are_one_text():
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "plus two?"}]
    assert as_messages([{"role": "user", "content": parts, "name": "x"}]) == [
        {"role": "user", "content": "Two plus two?"}
    ]
    assert as_messages([{"role": "user", "content": []}]) == [{"role": "user", "content": ""}]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "message 1: content part of type 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "'input_audio'"),
        (
            {"role": "user", "content": [{"type": "text", "text": 3}]},
            "message 1: the text of a content part must be a string, got 3",
        ),
        ({"role": "user", "content": ["a"]}, "content part must be"),
        ({"role": "user", "content": None}, "messages must be a list"),
        ({"role": "user", "content": {"type": "text"}}, "messages must be a list"),
        ({"role": 1, "content": "a"}, "messages must be a list"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "message 1: tool_calls is not supported"),
    ],
)
def test_messages_that_would_lose_something(message, named):
    with pytest.raises(ValueError, match=named):
        as_messages([message])
