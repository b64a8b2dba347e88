"""python -m diffpo.generate: what comes out, that nothing finished is lost, and that every mistake ends before the model works."""

import dataclasses
import importlib
import io
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
from diffpo.generate_command import GenerateConfig, main
from diffpo.prompt_file import as_chats, read_prompts

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


# ---- prompts


def test_prompts_from_text_and_jsonl(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffone \r\n\n  two\n".encode())
    assert read_prompts(str(text)) == ["one ", "  two"]
    lines = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "h\u2028i"}]
    lines.write_text(
        json.dumps({"prompt": "a\nb", "id": 3}) + "\n\n" + json.dumps({"messages": chat}, ensure_ascii=False)
    )
    assert read_prompts(str(lines)) == ["a\nb", chat]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "x"}')))
    assert read_prompts("-", "jsonl") == ["x"]


def test_chats():
    user = {"role": "user", "content": "hi"}
    system = {"role": "system", "content": "be brief"}
    assert as_chats(["hi", [user]], chat=True, system="be brief") == [[system, user], [system, user]]
    assert as_chats([[{"role": "system", "content": "own"}, user]], False, "be brief")[0][0]["content"] == "own"
    with pytest.raises(ValueError, match="mixes"):
        as_chats(["hi", [user]], chat=False, system=None)
    with pytest.raises(ValueError, match="--chat"):
        as_chats(["hi"], chat=False, system="be brief")


def test_chat_uses_the_template(tmp_path, capsys):
    model = diffpo.load("tiny-countdown")
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}->{% endif %}"
    )
    model.save(tmp_path / "chatty")
    arguments = ["7 3 11", "--chat", "--system", "1 2", "--model", str(tmp_path / "chatty"), "--gamma", "0.1", *SHORT]
    assert main(arguments) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert row["prompt"] == [{"role": "system", "content": "1 2"}, {"role": "user", "content": "7 3 11"}]
    same = diffpo.generate(model, ["1 2 7 3 11 ->"], 12, rule=diffpo.EntropyBounded(0.1))
    assert row["tokens"] == same.tokens[0].tolist()


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gen-length", "0"], "gen_length"),
        (["--gen-lenth", "4"], "gen-lenth"),
        (["--gen-length", "40"], "multiple of block_length"),
        (["--gen-length", "4096"], "context"),
        (["--rule", "bogus"], "bogus"),
        (["--rule", "fixed", "--gamma", "1"], "gamma: is a setting of rule eb"),
        (["--rule", "factor"], "factor: must be given"),
        (["--gamma", "nan"], "gamma"),
        (["--temperature", "-1"], "temperature"),
        (["--resume"], "resume: needs the output"),
        (["--resume", "--overwrite"], "exclude"),
        (["--chat"], "chat template"),
        (["--system", "x"], "--chat"),
        (["--device", "warp"], "device 'warp'"),
        (["--model", "tiny-cuntdown"], "tiny-countdown"),
        (["--model", "tiny-countdown", "--rule", "learned"], "learned threshold"),
        (["--output", "no/such/out.jsonl"], "output: the folder no/such does not exist"),
        (["--trace", "no/such/trace.html"], "trace: the folder no/such does not exist"),
        (["--input", "no-such.txt"], "prompt and input exclude"),
        (["--output", "x.html", "--trace", "./x.html"], "output and trace are the same file"),
    ],
)  # fmt: skip
def test_a_mistake_ends_with_exit_code_2(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate_command, "completion_record", None)  # no row may be finished
    stops(2, [PROMPTS[0], *arguments])
    message = capsys.readouterr().err
    assert named in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.txt", "xyzzy", "does not know"),
        ("p.txt", "7 3 <mask>", "mask token"),
        ("p.jsonl", '{"prompt": "7"}\n{"prompt": 7', "line 2 is not valid JSON"),
        ("p.jsonl", '\n{"text": "7"}', 'line 2 must be a JSON object with either "prompt" or "messages"'),
        ("p.jsonl", '"7"', "line 1 must be a JSON object"),
        ("p.jsonl", '{"prompt": 7}', "line 1: prompt must be a string"),
        ("p.jsonl", '{"messages": []}', "line 1: messages must be a list"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "line 1: messages must be a list"),
        ("p.txt", b"\xff\xfe7", "not UTF-8"),
    ],
)
def test_a_mistake_in_the_input_names_the_line(name, content, named, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    stops(2, ["--input", str(path), "--output", str(tmp_path / "out.jsonl"), *SHORT])
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "flag", "named"),
    [
        ('{"index": 0}\n', [], "--resume continues it, --overwrite replaces it"),
        ("something else\n", ["--resume"], "line 1 is not valid JSON"),
        ("something else", ["--resume"], "ends in a line that is no completion"),
        ("something else\nand more", ["--resume"], "line 1 is not valid JSON"),
        (
            '{"index": "0", "prompt": "7 3 11 -> 32", "tokens": [], "commit_step": []}\n',
            ["--resume"],
            "line 1 is no completion",
        ),
        (
            '{"index": 0, "prompt": "7 3 11 -> 32", "tokens": [1, 2], "commit_step": [1, 1]}\n',
            ["--resume"],
            "2 tokens, gen_length is 12",
        ),
        ('{"index": 0}\n', ["--resume"], "line 1 is no completion"),
        ('{"index": 0, "prompt": "1 2 3 -> 6", "tokens": [], "commit_step": []}\n', ["--resume"], "prompt"),
        ('{"index": 9, "prompt": "7 3 11 -> 32", "tokens": [], "commit_step": []}\n', ["--resume"], "index 9"),
    ],
)
def test_an_existing_output_is_safe(content, flag, named, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    stops(2, [PROMPTS[0], "--output", str(output), *flag, *SHORT])
    assert named in capsys.readouterr().err
    assert output.read_text() == content


def test_an_existing_trace_is_safe(tmp_path, capsys):
    trace = tmp_path / "trace.html"
    trace.write_text("mine")
    stops(2, [PROMPTS[0], "--trace", str(trace), *SHORT])
    assert "--overwrite" in capsys.readouterr().err
    assert trace.read_text() == "mine"


def test_a_model_without_tokenizer(tmp_path, capsys):
    model = diffpo.load("tiny-countdown")
    model.tokenizer = None
    model.save(tmp_path / "bare")
    stops(2, [PROMPTS[0], "--model", str(tmp_path / "bare"), *SHORT])
    assert "has no tokenizer" in capsys.readouterr().err


def test_no_prompt_at_all(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    stops(2, SHORT)
    assert "no prompt: give one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({}, "EntropyBounded(gamma=0.1, proxy=entropy)"),
        ({"gamma": 0.5, "proxy": "margin"}, "EntropyBounded(gamma=0.5, proxy=margin)"),
        ({"rule": "confidence", "p": 0.0}, "ConfidenceThreshold(p=0)"),
        ({"rule": "confidence"}, "ConfidenceThreshold(p=0.9)"),
        ({"rule": "factor", "factor": 1}, "FactorThreshold(factor=1)"),
        ({"rule": "fixed", "steps": 4}, "FixedSchedule(steps=4)"),
        ({"rule": "fixed"}, "FixedSchedule(steps=128)"),
        ({"rule": "learned", "proxy": "margin"}, "PromptThreshold(proxy=margin)"),
    ],
)
def test_the_rule_that_the_settings_name(flags, rule, random_model):
    assert repr(GenerateConfig(**flags).commit_rule(random_model(), 128)) == rule


def test_auto_takes_the_learned_threshold_unless_gamma_is_given():
    model = diffpo.load("tiny-countdown-diffpo")
    assert isinstance(GenerateConfig().commit_rule(model, 128), diffpo.PromptThreshold)
    assert isinstance(GenerateConfig(gamma=0.2).commit_rule(model, 128), diffpo.EntropyBounded)


def test_a_toml_file_and_prompts_in_front_of_the_flags(tmp_path, capsys):
    path = tmp_path / "x.toml"
    path.write_text('gen_length = 12\nrule = "fixed"\nsteps = 3\n')
    assert main([str(path), *PROMPTS[:2], "--steps", "4"]) == 0
    assert [(row["prompt"], row["nfe"]) for row in rows_of(capsys.readouterr().out)] == [(p, 4) for p in PROMPTS[:2]]
    path.write_text("gen_lenth = 12\n")
    stops(2, [str(path), PROMPTS[0]])
    assert "unknown key 'gen_lenth'; nearest: gen_length" in capsys.readouterr().err
