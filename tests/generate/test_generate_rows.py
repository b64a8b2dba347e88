"""python -m diffpo.generate: what comes out."""

import dataclasses
import json
import os
import pty
import subprocess
import sys

import pytest
import torch

import diffpo
from diffpo import generate_command
from diffpo.generate_command import main

PROMPTS = ["7 3 11 -> 32", "5 5 5 -> 15", "2 9 4 -> 14", "3 8 2 -> 22"]
SHORT = ["--gen-length", "12"]


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def in_order(rows: list[dict]) -> list[dict]:
    """Rows come as they finish."""
    return sorted(rows, key=lambda row: row["index"])


def test_rows_are_those_of_the_function(prompt_file, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ["--input", prompt_file, "--rule", "eb", "--gamma", "0.5", "--order", "confidence", *SHORT]
    assert main([*arguments, "--output", str(output), "--batch-size", "3", "--statistics"]) == 0
    model = diffpo.load("tiny-countdown-diffpo")
    expected = diffpo.generate(model, PROMPTS, 12, rule=diffpo.EntropyBounded(0.5, "confidence"))
    rows = in_order(rows_of(output.read_text()))
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["text"] for row in rows] == expected.text
    assert [row["tokens"] for row in rows] == expected.tokens.tolist()
    assert [row["commit_step"] for row in rows] == expected.trajectory.commit_step.tolist()
    assert [row["nfe"] for row in rows] == expected.nfe.tolist()
    assert [row["gamma"] for row in rows] == [0.5] * 4
    torch.testing.assert_close(
        torch.tensor([row["logprob"] for row in rows]), expected.trajectory.logprob, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        torch.tensor([row["entropy"] for row in rows]), expected.trajectory.entropy, atol=1e-4, rtol=0
    )
    for row in rows:
        assert row["tokens_per_forward"] == pytest.approx(row["length"] / row["nfe"], abs=1e-4)
        assert row["tokens_per_second"] == pytest.approx(row["length"] / row["seconds"], rel=0.01)
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "4/4 prompts" in streams.err


def test_standard_output_holds_the_rows_alone(capsys):
    assert main([*PROMPTS[:2], *SHORT]) == 0
    rows = in_order(rows_of(capsys.readouterr().out))
    assert [row["prompt"] for row in rows] == PROMPTS[:2]
    assert "entropy" not in rows[0]


def test_a_single_prompt_on_a_terminal_is_readable(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main([PROMPTS[0], *SHORT]) == 0
    shown = capsys.readouterr().out
    text = diffpo.generate(diffpo.load("tiny-countdown-diffpo"), PROMPTS[:1], 12, rule=diffpo.PromptThreshold()).text[0]
    assert text in shown
    assert "tokens per forward" in shown
    assert "{" not in shown


def test_seconds_are_those_of_the_row_in_the_batch(monkeypatch, tmp_path):
    completion = diffpo.generate(diffpo.load("tiny-countdown"), PROMPTS[:1], 12)
    seconds = {1: 10.0, 0: 12.0, 2: 15.0, 3: 8.0}
    rows = [(row, dataclasses.replace(completion, seconds=value)) for row, value in seconds.items()]
    monkeypatch.setattr(generate_command, "stream", lambda *_, **__: rows)
    output = tmp_path / "out.jsonl"
    assert main([*PROMPTS, "--output", str(output), "--batch-size", "2", *SHORT]) == 0
    written = rows_of(output.read_text())
    assert {row["index"]: row["seconds"] for row in written} == seconds
    assert {row["index"]: row["tokens_per_second"] for row in written} == {
        row: pytest.approx(int(completion.trajectory.length) / value, abs=0.01) for row, value in seconds.items()
    }


def test_numbers_no_json_has(tmp_path):
    output = tmp_path / "out.jsonl"
    assert main([PROMPTS[0], "--gamma", "inf", "--output", str(output), *SHORT]) == 0
    assert main([PROMPTS[0], "--rule", "fixed", "--output", str(output), "--overwrite", *SHORT]) == 0
    (row,) = rows_of(output.read_text())
    assert row["gamma"] is None
    assert row["nfe"] == 12


def test_a_special_token_stops_a_completion(prompt_file, tmp_path, capsys):
    model = diffpo.load("tiny-countdown-diffpo")
    model.tokenizer.add_tokens([","], special_tokens=True)
    model.save(tmp_path / "comma")
    arguments = ["--input", prompt_file, "--model", str(tmp_path / "comma"), *SHORT]
    assert main(arguments) == 0
    whole = in_order(rows_of(capsys.readouterr().out))
    assert not any("," in row["text"] for row in whole), "a special token is not shown"
    assert main([*arguments, "--stop", ","]) == 0
    stopped = in_order(rows_of(capsys.readouterr().out))
    words = [model.tokenizer.convert_ids_to_tokens(row["tokens"]) for row in whole]
    assert all("," in row for row in words)
    assert [row["text"].split() for row in stopped] == [row[: row.index(",")] for row in words]


def test_the_command_in_its_own_process(prompt_file, tmp_path):
    """Rows alone on standard output although a live display runs on the terminal beside it; no warning of a double import."""
    terminal, stderr = pty.openpty()
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "diffpo.generate", "--input", "-", *SHORT]
    with open(prompt_file, "rb") as stdin:
        done = subprocess.run(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=os.environ | {"TERM": "xterm"}
        )
    os.close(stderr)
    shown = os.read(terminal, 65536).decode()
    assert done.returncode == 0, shown
    assert [row["prompt"] for row in in_order(rows_of(done.stdout.decode()))] == PROMPTS
    assert "4/4" in shown


def test_a_closed_reader_is_no_traceback(prompt_file):
    command = [sys.executable, "-m", "diffpo.generate", "--input", prompt_file, "--batch-size", "1", *SHORT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    message = process.stderr.read().decode()
    assert process.wait() == 1
    assert "Traceback" not in message
    assert "BrokenPipe" not in message
