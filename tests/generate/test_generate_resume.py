"""python -m diffpo.generate --resume: one file, one way of making its rows."""

import json
import os
import signal

import pytest
import torch

import diffpo
from diffpo.generate_command import main

PROMPTS = ["7 3 11 -> 32", "5 5 5 -> 15", "2 9 4 -> 14", "3 8 2 -> 22"]
SHORT = ["--gen-length", "12"]


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def in_order(rows: list[dict]) -> list[dict]:
    """Rows come as they finish."""
    return sorted(rows, key=lambda row: row["index"])


def stops(code: int, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code


def test_resume_drops_half_a_line(prompt_file, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ["--input", prompt_file, "--output", str(output), *SHORT]
    assert main(arguments) == 0
    whole = output.read_text()
    output.write_text(whole[: whole.rindex("\n", 0, -1) + 30])
    assert main([*arguments, "--resume"]) == 0
    rows = rows_of(output.read_text())
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in rows_of(whole)]
    assert main([*arguments, "--resume"]) == 0  # nothing left to do
    assert rows_of(output.read_text()) == rows


@pytest.mark.parametrize("rule", ["fixed", "eb"])
def test_a_resumed_run_draws_what_the_whole_one_does(tmp_path, stopping_stream, monkeypatch, rule):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = [*PROMPTS[:1] * 8, "--temperature", "3", "--rule", rule, "--batch-size", "3", *SHORT]
    assert main([*arguments, "--output", str(whole)]) == 0
    stopping_stream(4, lambda: signal.raise_signal(signal.SIGINT))
    assert main([*arguments, "--output", str(output)]) == 0
    monkeypatch.undo()
    assert main([*arguments, "--output", str(output), "--resume"]) == 0
    names = ("index", "tokens", "commit_step", "nfe")
    resumed, straight = (
        [[row[name] for name in names] for row in in_order(rows_of(path.read_text()))] for path in (output, whole)
    )
    assert resumed == straight
    assert len({tuple(tokens) for _, tokens, *_ in resumed}) == 8, "eight prompts, eight draws"


def test_the_first_row_of_each_process_says_where_it_and_those_behind_it_come_from(
    prompt_file, tmp_path, stopping_stream, monkeypatch
):
    output = tmp_path / "out.jsonl"
    arguments = ["--input", prompt_file, "--output", str(output), *SHORT]
    stopping_stream(2, lambda: signal.raise_signal(signal.SIGINT))
    assert main(arguments) == 0
    before = len(rows_of(output.read_text()))
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
    rows = rows_of(output.read_text())
    assert before < len(rows) == len(PROMPTS)
    said = {place: row["provenance"] for place, row in enumerate(rows) if "provenance" in row}
    assert list(said) == [0, before]
    assert said[0]["command"] == f"python -m diffpo.generate --input prompts.txt --output out.jsonl {' '.join(SHORT)}"
    assert said[before]["command"] == f"{said[0]['command']} --resume"
    assert said[0]["versions"]["torch"] == torch.__version__
    assert said[0]["hardware"]["cpu_cores"] == os.cpu_count()


def test_draws_of_a_second_resumption_do_not_repeat_those_of_the_first(tmp_path):
    """Although the first one was stopped before it had finished the prompt that it began with."""
    output = tmp_path / "out.jsonl"
    arguments = [*PROMPTS[:1] * 8, "--temperature", "3", "--rule", "fixed", "--output", str(output), *SHORT]

    def keep(*indices):
        rows = [row for row in rows_of(output.read_text()) if row["index"] in indices]
        output.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert main(arguments) == 0
    keep(1, 2)
    assert main([*arguments, "--resume"]) == 0
    keep(1, 2, 4, 5)
    assert main([*arguments, "--resume"]) == 0
    assert len({tuple(row["tokens"]) for row in rows_of(output.read_text())}) == 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--rule", "fixed"], "rule: PromptThreshold(order="),
        (["--gamma", "0.3"], "-> EntropyBounded(gamma=0.3, order=entropy)"),
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--temperature", "0.5"], "temperature: 0.0 -> 0.5"),
        (["--block-length", "6"], "block_length: 12 -> 6"),
        (["--cfg-scale", "1"], "cfg_scale: 0.0 -> 1.0"),
        (["--stop", ","], "stop: [] -> [',']"),
        (["--cache", "dual"], "cache: none -> dual"),
        (["--dtype", "bfloat16"], "dtype: float32 -> bfloat16"),
        (["--model", "tiny-countdown", "--rule", "eb"], "model: sha256:"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_rows_made_otherwise_are_not_mixed(prompt_file, tmp_path, capsys, change, named, complete):
    output = tmp_path / "out.jsonl"
    arguments = ["--input", prompt_file, "--output", str(output), *SHORT]
    assert main(arguments) == 0
    if not complete:
        output.write_text(output.read_text().split("\n")[0] + "\n")
    before = output.read_bytes()
    stops(2, [*arguments, *change, "--resume"])
    message = capsys.readouterr().err
    assert f"resume: {output} was made with other settings: " in message
    assert named in message
    assert output.read_bytes() == before
    assert main([*arguments, "--resume", "--batch-size", "1"]) == 0  # which does not change a row


def test_rows_of_an_earlier_version_go_on(prompt_file, tmp_path):
    """Their settings say proxy, which is now order."""
    output = tmp_path / "out.jsonl"
    arguments = ["--input", prompt_file, "--output", str(output), *SHORT]
    assert main(arguments) == 0
    whole = rows_of(output.read_text())
    output.write_text(output.read_text().split("\n")[0].replace("order=", "proxy=") + "\n")
    assert main([*arguments, "--resume"]) == 0
    assert {row["index"]: row["tokens"] for row in rows_of(output.read_text())} == {
        row["index"]: row["tokens"] for row in whole
    }


def test_other_weights_under_the_same_name_are_another_model(prompt_file, tmp_path, capsys):
    output, folder = tmp_path / "out.jsonl", tmp_path / "model"
    model = diffpo.load("tiny-countdown-diffpo")
    model.save(folder)
    arguments = ["--input", prompt_file, "--output", str(output), "--model", str(folder), *SHORT]
    assert main(arguments) == 0
    output.write_text(output.read_text().split("\n")[0] + "\n")
    with torch.no_grad():
        model.norm.weight[0] += 1e-3
    model.save(folder)
    stops(2, [*arguments, "--resume"])
    assert "model: sha256:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
@pytest.mark.parametrize("complete", [False, True])
def test_another_tokenizer_under_the_same_name_is_refused(prompt_file, tmp_path, capsys, file, complete):
    output, folder = tmp_path / "out.jsonl", tmp_path / "model"
    diffpo.load("tiny-countdown-diffpo").save(folder)
    arguments = ["--input", prompt_file, "--output", str(output), "--model", str(folder), *SHORT]
    assert main(arguments) == 0
    if not complete:
        output.write_text(output.read_text().split("\n")[0] + "\n")
    before, path = output.read_bytes(), folder / file
    old = path.read_text() if path.exists() else None
    path.write_text((old or ("{}" if file.endswith("json") else "{{ messages[0].content }}")) + "\n")
    stops(2, [*arguments, "--resume"])
    message = capsys.readouterr().err
    assert "made with other settings: tokenizer: sha256:" in message
    assert "model: " not in message
    assert output.read_bytes() == before
    path.unlink() if old is None else path.write_text(old)
    assert main([*arguments, "--resume"]) == 0


def test_a_file_that_an_editor_has_saved_is_continued(prompt_file, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = ["--input", prompt_file, "--output", str(output), *SHORT]
    assert main(arguments) == 0
    first, *_ = rows = rows_of(output.read_text())
    output.write_bytes(b"\xef\xbb\xbf" + json.dumps(first).encode() + b"\r\n\r\n" + b'{"index": 1, "pro')
    assert main([*arguments, "--resume"]) == 0
    continued = [json.loads(line) for line in output.read_text(encoding="utf-8-sig").splitlines() if line]
    assert [row["tokens"] for row in continued] == [row["tokens"] for row in rows]
