"""python -m diffpo.generate: the files it writes, and those it leaves alone."""

import json

import pytest

from diffpo import generate_command
from diffpo.completion_file import CompletionFile
from diffpo.generate_command import main

PROMPTS = ["7 3 11 -> 32", "5 5 5 -> 15", "2 9 4 -> 14", "3 8 2 -> 22"]
SHORT = ["--gen-length", "12"]


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def stops(code: int, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code


def test_prompts_are_not_overwritten_by_their_completions(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPTS[0]}) + "\n")
    stops(2, ["--input", str(prompts), "--output", str(prompts), "--overwrite", *SHORT])
    assert "input and output are the same file" in capsys.readouterr().err
    assert rows_of(prompts.read_text()) == [{"prompt": PROMPTS[0]}]


@pytest.mark.parametrize("flag", ["--output", "--trace"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 300, "File name too long"), ("\u00e4" * 130, "File name too long"), (f"{'x' * 300}/out", "does not exist"),
     ("loop", "Too many levels of symbolic links"), ("two", "Too many levels of symbolic links"), ("loop/out", "does not exist")],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--input", "prompts.txt"]])
def test_a_file_that_cannot_be_is_one_line(monkeypatch, tmp_path, capsys, flag, name, reason, more):
    monkeypatch.setattr(generate_command, "load", None)  # found before the model is read
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    for link, target in (("loop", "loop"), ("two", "three"), ("three", "two")):
        (tmp_path / link).symlink_to(target)
    stops(2, [*([] if "--input" in more else [PROMPTS[0]]), flag, name, *more, *SHORT])
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{flag[2:]}" in message
    assert reason in message


def test_a_link_to_a_file_that_is_not_there_yet_is_written_through(tmp_path):
    (tmp_path / "link").symlink_to("real.jsonl")
    assert main([PROMPTS[0], "--output", str(tmp_path / "link"), *SHORT]) == 0
    assert len(rows_of((tmp_path / "real.jsonl").read_text())) == 1


@pytest.mark.parametrize("name", ["x" * 255, "\u00e4" * 127])
def test_the_longest_names_are_written(tmp_path, name):
    (tmp_path / "trace").mkdir()
    files = ["--output", str(tmp_path / name), "--trace", str(tmp_path / "trace" / name)]
    assert main([PROMPTS[0], *files, *SHORT]) == 0
    assert [path.name for path in (tmp_path / "trace").iterdir()] == [name]


def test_lengths_are_checked_before_the_model_is_read(monkeypatch, capsys):
    monkeypatch.setattr(generate_command, "load", None)
    stops(2, [PROMPTS[0], "--gen-length", "12", "--block-length", "5"])
    assert "gen_length 12 must be a multiple of block_length" in capsys.readouterr().err


def test_overwrite_empties_the_file_at_the_first_row_only(prompt_file, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    stops(2, ["--input", prompt_file, "--output", str(output), "--overwrite", "--gen-length", "4096"])
    assert output.read_text() == "old\n"
    assert main(["--input", prompt_file, "--output", str(output), "--overwrite", *SHORT]) == 0
    assert len(rows_of(output.read_text())) == 4


def test_a_file_has_one_writer(tmp_path):
    first = CompletionFile(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="another process"):
        CompletionFile(tmp_path / "out.jsonl")
    first.close()
    assert not (tmp_path / "out.jsonl").exists()  # nothing was written
