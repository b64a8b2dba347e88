"""The one log: rows are whole or absent, half a row gives way, and nothing changes before the first new one."""

import json
import math

import pytest

from diffpo.runs.json_lines import JsonLines, own_file


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.jsonl"


def opened(path, **options) -> JsonLines:
    return JsonLines(own_file(path), "x.jsonl", "row", **options)


def test_half_a_row_gives_way_to_the_next_one_and_not_before(path):
    path.write_text('{"a": 1}\n{"a": 2')
    lines = opened(path)
    assert lines.rows == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n{"a": 2'
    lines.write({"a": 3})
    lines.close()
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_what_an_editor_leaves_is_read(path):
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\n\n')
    lines = opened(path)
    lines.write({"a": 3})
    assert lines.rows == [{"a": 1}, {"a": 2}, {"a": 3}]
    lines.keep(1)
    lines.close()
    assert path.read_bytes() == b'\xef\xbb\xbf{"a": 1}\r\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n\n[1]\n', "x.jsonl, line 3 is no row, but '\\[1\\]'"),
        ('{"a": 1}\n{"a\n{"a": 2}\n', "line 2 is not valid JSON"),
        ('{"a": 1, "a": 2}\n', "line 1 is not valid JSON: key 'a' stands twice"),
        ('{"a": 1}\nletter', "ends in a line that is no row"),
    ],
)
def test_anything_else_is_refused_and_stays(path, content, message):
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{message}.*; start again with --overwrite"):
        opened(path)
    assert path.read_text() == content


def test_fresh_rows_replace_all_when_the_first_is_written(path):
    path.write_text("old")
    lines = opened(path, fresh=True)
    assert path.read_text() == "old"
    lines.write({"a": math.nan, "b": [math.inf, 1.5]})
    lines.close()
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 1.5]}


def test_a_row_is_named_by_its_line(path):
    path.write_text('\n{"a": 1}\n\n{"a": 2}\n')
    assert str(opened(path).refused(1, ": odd")) == "x.jsonl, line 4 is no row: odd; start again with --overwrite"


def line_of(path, row: dict) -> int:
    """Of the only line that holds the row, counted from 1."""
    (found,) = (n for n, line in enumerate(path.read_text().split("\n"), start=1) if line == json.dumps(row))
    return found


@pytest.mark.parametrize("kept", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "content", ["", '{"a": 1}\n{"a": 2}\n', '\n{"a": 1}\n\n{"a": 2}\n\n\n', '{"a": 1}\n{"a": 2}\n{"a']
)
def test_a_written_row_is_named_by_its_line(path, content, kept):
    path.write_text(content)
    lines = opened(path)
    if kept is not None:
        lines.keep(kept)
    for value in (3, 4):
        lines.write({"a": value})
    rows = lines.rows
    messages = [str(lines.refused(place)) for place in range(len(rows))]
    assert messages == [f"x.jsonl, line {line_of(path, row)} is no row; start again with --overwrite" for row in rows]
