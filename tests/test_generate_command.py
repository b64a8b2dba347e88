"""python -m diffpo.generate: what comes out, and that nothing finished is lost. Prompts and mistakes: test_generate_prompts.py."""

import dataclasses
import importlib
import json
import os
import pty
import signal
import subprocess
import sys

import pytest
import torch

import diffpo
from diffpo import generate_command
from diffpo.completion_file import CompletionFile
from diffpo.generate_command import main

PROMPTS = ["7 3 11 -> 32", "5 5 5 -> 15", "2 9 4 -> 14", "3 8 2 -> 22"]
SHORT = ["--gen-length", "12"]


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)


@pytest.fixture
def stopping_stream(monkeypatch):
    """stopping_stream(rows, act): decoding stops after that many rows with act()."""

    def install(rows, act):
        real = diffpo.decoding.generation.stream

        def stream(*args, **options):
            for n, row in enumerate(real(*args, **options)):
                if n == rows:
                    act()
                yield row

        monkeypatch.setattr(generate_command, "stream", stream)

    return install


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def in_order(rows: list[dict]) -> list[dict]:
    """Rows come as they finish."""
    return sorted(rows, key=lambda row: row["index"])


def stops(code: int, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code


# ---- diffpo.generate stays the function


def test_importing_the_module_leaves_the_function(monkeypatch):
    function = diffpo.decoding.generation.generate
    for _ in range(2):
        monkeypatch.delitem(sys.modules, "diffpo.generate", raising=False)
        imported = importlib.import_module("diffpo.generate")
        assert imported is function
        assert diffpo.generate is function
    with pytest.raises(ImportError):
        from diffpo.generate import no_such_name  # noqa: F401
    from diffpo import generate

    assert generate is function


def test_a_fresh_process_sees_the_function():
    code = "import diffpo.generate, types; assert isinstance(diffpo.generate, types.FunctionType), diffpo.generate"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    assert "4/4 prompts" in shown


def test_a_closed_reader_is_no_traceback(prompt_file):
    command = [sys.executable, "-m", "diffpo.generate", "--input", prompt_file, "--batch-size", "1", *SHORT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    message = process.stderr.read().decode()
    assert process.wait() == 1
    assert "Traceback" not in message
    assert "BrokenPipe" not in message


# ---- what comes out


def test_rows_are_those_of_the_function(prompt_file, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = ["--input", prompt_file, "--rule", "eb", "--gamma", "0.5", "--proxy", "confidence", *SHORT]
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


# ---- nothing is lost


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
    assert main([*arguments, "--output", str(output), "--trace", str(trace)]) == 130
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
    stopping_stream(4, interrupt)
    assert main([*arguments, "--output", str(output)]) == 130
    monkeypatch.undo()
    assert main([*arguments, "--output", str(output), "--resume"]) == 0
    names = ("index", "tokens", "commit_step", "nfe")
    resumed, straight = (
        [[row[name] for name in names] for row in in_order(rows_of(path.read_text()))] for path in (output, whole)
    )
    assert resumed == straight
    assert len({tuple(tokens) for _, tokens, *_ in resumed}) == 8, "eight prompts, eight draws"


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


def test_out_of_memory_says_what_the_decoder_says(prompt_file, tmp_path, stopping_stream, capsys):
    def fault():
        raise torch.OutOfMemoryError("a single row does not fit in memory: lower gen_length")

    stopping_stream(1, fault)
    assert main(["--input", prompt_file, "--output", str(tmp_path / "out.jsonl"), "--batch-size", "1", *SHORT]) == 1
    message = capsys.readouterr().err
    assert "stopped: a single row does not fit in memory: lower gen_length; they are in" in message.replace("\n", "")


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


# ---- one file, one way of making its rows


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--rule", "fixed"], "rule: PromptThreshold(proxy="),
        (["--gamma", "0.3"], "-> EntropyBounded(gamma=0.3, proxy=entropy)"),
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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(prompt_file, tmp_path, capsys, monkeypatch):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "diffpo.generate", "--input", prompt_file, *SHORT]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "stopped: cannot write: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert main(["--input", prompt_file, "--output", "/dev/full", *SHORT]) == 1
    assert "No space left on device; they are in /dev/full" in capsys.readouterr().err.replace("\n", " ")
