"""python -m diffpo.generate: whatever ends it, nothing finished is lost."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import diffpo
from diffpo import generate_command
from diffpo.decoding import generation
from diffpo.generate_command import main

PROMPTS = ["7 3 11 -> 32", "5 5 5 -> 15", "2 9 4 -> 14", "3 8 2 -> 22"]
SHORT = ["--gen-length", "12"]


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("act", [interrupt, terminate])
def test_an_interrupted_run_keeps_its_rows_and_continues(
    prompt_file, tmp_path, stopping_stream, monkeypatch, capsys, act
):
    output, trace, whole = tmp_path / "out.jsonl", tmp_path / "trace.html", tmp_path / "whole.jsonl"
    arguments = ["--input", prompt_file, "--batch-size", "1", *SHORT]
    stopping_stream(2, act)
    handler = signal.getsignal(signal.SIGTERM)
    assert main([*arguments, "--output", str(output), "--trace", str(trace)]) == 0
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "interrupted after 2 of 4 prompts" in capsys.readouterr().err
    assert len(rows_of(output.read_text())) == 2
    assert PROMPTS[1] in trace.read_text().replace("\\u003e", ">")
    assert PROMPTS[2] not in trace.read_text().replace("\\u003e", ">")
    monkeypatch.undo()
    assert main([*arguments, "--output", str(output), "--resume", "--trace", str(trace)]) == 0
    assert PROMPTS[3] in trace.read_text().replace("\\u003e", ">")
    assert main([*arguments, "--output", str(whole)]) == 0
    resumed, straight = rows_of(output.read_text()), rows_of(whole.read_text())
    assert [row["index"] for row in resumed] == [0, 1, 2, 3]
    assert [row["tokens"] for row in resumed] == [row["tokens"] for row in straight]


@pytest.mark.parametrize("when", ["as a row is written", "as a text is made"])
def test_an_interrupt_writes_the_rows_that_ended_in_the_same_step(prompt_file, tmp_path, monkeypatch, capsys, when):
    """All four end in the last step. The first of them is on its way when the signal comes."""
    output = tmp_path / "out.jsonl"
    holder, name = (
        (generate_command, "completion_record") if when == "as a row is written" else (generation, "decode_text")
    )
    place = getattr(holder, name)
    calls = []

    def interrupted(*arguments):
        if not calls:
            calls.append(1)
            terminate()
        return place(*arguments)

    monkeypatch.setattr(holder, name, interrupted)
    assert main(["--input", prompt_file, "--output", str(output), "--rule", "fixed", *SHORT]) == 0
    assert "interrupted after 4 of 4 prompts" in capsys.readouterr().err
    assert [row["index"] for row in rows_of(output.read_text())] == [0, 1, 2, 3]


def test_a_fault_keeps_the_rows_before_it(prompt_file, tmp_path, stopping_stream, capsys):
    def fault():
        raise FloatingPointError("the model's logits are NaN")

    stopping_stream(3, fault)
    output = tmp_path / "out.jsonl"
    assert main(["--input", prompt_file, "--output", str(output), "--batch-size", "1", *SHORT]) == 1
    assert [row["index"] for row in rows_of(output.read_text())] == [0, 1, 2]
    assert "logits are NaN" in capsys.readouterr().err


def test_rows_are_on_disk_before_the_next_one_is_decoded(prompt_file, tmp_path, monkeypatch):
    output, seen = tmp_path / "out.jsonl", []
    real = diffpo.decoding.generation.stream

    def stream(*args, **options):
        for row in real(*args, **options):
            seen.append(len(output.read_text().splitlines()))
            yield row

    monkeypatch.setattr(generate_command, "stream", stream)
    main(["--input", prompt_file, "--output", str(output), "--batch-size", "1", *SHORT])
    assert seen == [0, 1, 2, 3]


def test_out_of_memory_says_what_the_decoder_says(prompt_file, tmp_path, stopping_stream, capsys):
    def fault():
        raise torch.OutOfMemoryError("a single row does not fit in memory: lower gen_length")

    stopping_stream(1, fault)
    assert main(["--input", prompt_file, "--output", str(tmp_path / "out.jsonl"), "--batch-size", "1", *SHORT]) == 1
    message = capsys.readouterr().err
    assert (
        "stopped after 1 of 4 prompts: a single row does not fit in memory: lower gen_length; they are in"
        in message.replace("\n", "")
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(prompt_file, tmp_path, capsys, monkeypatch):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "diffpo.generate", "--input", prompt_file, *SHORT]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "stopped after 0 of 4 prompts: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert main(["--input", prompt_file, "--output", "/dev/full", *SHORT]) == 1
    assert "No space left on device; they are in /dev/full" in capsys.readouterr().err.replace("\n", " ")


def test_rows_on_standard_output_cannot_be_continued(prompt_file, stopping_stream, capsys):
    stopping_stream(2, interrupt)
    assert main(["--input", prompt_file, "--batch-size", "1", *SHORT]) == 130
    captured = capsys.readouterr()
    assert len(rows_of(captured.out)) == 2
    assert captured.err.splitlines()[-1] == "interrupted after 2 of 4 prompts"


def test_an_interrupt_while_the_model_is_read_is_one_line(prompt_file, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate_command, "load", lambda *_: interrupt())
    assert main(["--input", prompt_file, "--output", str(tmp_path / "out.jsonl"), *SHORT]) == 130
    assert capsys.readouterr().err == "stopped before the start: interrupted\n"
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")])
@pytest.mark.parametrize("where", ["the model", "a row"])
def test_a_lack_of_memory_is_one_line(prompt_file, monkeypatch, stopping_stream, capsys, error, where):
    def fault(*_):
        raise error

    if where == "the model":
        monkeypatch.setattr(generate_command, "load", fault)
    else:
        stopping_stream(1, fault)
    assert main(["--input", prompt_file, "--batch-size", "1", *SHORT]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped before the start: " if where == "the model" else "stopped after 1 of 4 prompts: ")
    assert "memory" in last
