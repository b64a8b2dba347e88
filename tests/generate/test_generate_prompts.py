"""python -m diffpo.generate: the prompts it reads, the settings it takes, and that every mistake ends before the model works."""

import io
import json
import sys

import pytest

import diffpo
from diffpo import generate_command, text_input
from diffpo.generate_command import GenerateConfig, main
from diffpo.prompt_file import as_chats, numbered_prompts

PROMPTS = ["7 3 11 -> 32", "5 5 5 -> 15", "2 9 4 -> 14", "3 8 2 -> 22"]
SHORT = ["--gen-length", "12"]


def rows_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def stops(code: int, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code


# ---- prompts


def read_prompts(*arguments) -> list:
    return [prompt for _, prompt in numbered_prompts(*arguments)]


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


ROWS = [{"prompt": "7 3"}, {"prompt": "2 9"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["x.ndjson", "x.JSONL", "x.Json", "x.txt", "x", "x.jsonl", "-"])
@pytest.mark.parametrize(
    "content",
    [
        LINES,
        "\ufeff" + LINES.replace("\n", "\r\n\r\n"),
        json.dumps(ROWS, indent=1),
        LINES.rstrip(),
        LINES.replace("{", "  { "),
    ],
    ids=["lines", "BOM and CRLF", "array", "no last newline", "blanks"],
)
def test_json_rows_under_any_name(tmp_path, monkeypatch, name, content):
    """Never is the text of the JSON line a prompt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    if name != "-":
        (tmp_path / name).write_text(content, newline="")
    assert read_prompts(name) == ["7 3", "2 9"]
    with_chat = content.replace('"prompt": "7 3"', '"messages": [{"role": "user", "content": "7 3"}]')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(with_chat.encode())))
    if name != "-":
        (tmp_path / name).write_text(with_chat, newline="")
    assert read_prompts(name) == [[{"role": "user", "content": "7 3"}], "2 9"]


def test_text_that_only_resembles_json_is_text_where_asked(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text('{"a": 1} is JSON\n[1] is a list\n')
    with pytest.raises(ValueError, match=r"p.txt, line 1 is not valid JSON.*if it is text, add --input-format text"):
        read_prompts(str(path))
    assert read_prompts(str(path), "text") == ['{"a": 1} is JSON', "[1] is a list"]
    path.write_text("[1, 2] is a list\n{x} is a set\n")
    assert read_prompts(str(path)) == ["[1, 2] is a list", "{x} is a set"]


def test_conversational_rows_and_content_parts(tmp_path):
    user, begun = {"role": "user", "content": "7 3"}, {"role": "assistant", "content": "10"}
    parts = {"role": "user", "content": [{"type": "text", "text": "7 "}, {"type": "text", "text": "3"}]}
    path = tmp_path / "trl.jsonl"
    rows = [{"prompt": [user], "answer": "x"}, {"messages": [parts, begun]}, {"prompt": [parts], "tools": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(str(path)) == [[user], [user, begun], [user]]


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
        ("p.jsonl", '{"prompt": null}', "line 1: prompt must be a string"),
        ("p.jsonl", '{"prompt": []}', "line 1: messages must be a list"),
        ("p.jsonl", '{"prompt": ["7"]}', "line 1: messages must be a list"),
        ("p.jsonl", '{"prompt": "7", "tools": [{}]}', "line 1: tools are not supported"),
        (
            "p.jsonl",
            '{"prompt": "7"}\n{"prompt": "7", "prompt": "8"}',
            "line 2 is not valid JSON: key 'prompt' stands twice",
        ),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "line 1: message 1: content part of type 'image'",
        ),
        ("p.jsonl", '{"prompt": "half \\ud83d emoji"}', "line 1: not valid Unicode"),
        ("p.jsonl", '\n{"prompt": "7"}\n{"prompt": "\\udc00"}', "line 3: not valid Unicode"),
        ("p.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("p.jsonl", '{"prompt": "7"}\n' + '{"a":' * 100_000, "line 2 is not valid JSON"),
        ("p.jsonl", '{"prompt": "7", "id": ' + "1" * 5000 + "}", "line 1 is not valid JSON: a number of 5000 digits"),
        ("p.jsonl", '{"prompt": "7"}\n\n{"prompt": "7 3 <mask>"}', "line 3: it contains the mask token"),
        (
            "p.jsonl",
            '{"prompt": "7"}\n{"prompt": "7 xyzzy"}',
            "line 2: it holds a word the model's tokenizer does not know",
        ),
        ("p.jsonl", '{"prompt": "7"}\n{"prompt": "' + "7 " * 300 + '"}', "line 2: the longest prompt (300 tokens)"),
        ("p.txt", "7\n\n7 xyzzy", "line 3: it holds a word"),
        ("p.json", "7 3", "line 1 is not valid JSON"),
        ("p.json", '["7 3"]', "item 1 must be a JSON object"),
        ("p.ndjson", '{"prompt": "7"', "line 1 is not valid JSON"),
        ("p.txt", '{"prompt": "7"', "line 1 is not valid JSON"),
        ("p.txt", "{'prompt': '7'}", "line 1 is not valid JSON"),
        ("p.csv", "prompt\n7", "csv files are not read"),
        ("p.txt", "7\ncaf\u00e9".encode("latin-1"), "line 2 is not UTF-8"),
        ("p.jsonl", '{"prompt": "7"}'.encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("p.txt", b"7 3\n7\x003", "line 2 holds a NUL byte"),
        ("p.jsonl.gz", b"\x1f\x8b\x08", "gzip"),
        ("p.jsonl", '{"messages": []}', "line 1: messages must be a list"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "line 1: messages must be a list"),
        ("p.txt", b"\xff\xfe7", "not UTF-8"),
    ],
)
def test_a_mistake_in_the_input_names_the_line(name, content, named, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    stops(2, ["--input", str(path), "--output", str(tmp_path / "out.jsonl"), *SHORT])
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
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
        ('{"index": true, "prompt": "1", "tokens": [], "commit_step": []}\n', ["--resume"], "line 1 is no completion"),
        (
            '{"index": 0, "prompt": "1", "tokens": 3, "commit_step": []}\n',
            ["--resume"],
            "tokens must be a list of integers",
        ),
        ("[" * 100_000 + "\n", ["--resume"], "line 1 is not valid JSON"),
        ('{"index": 0, "prompt": "\\ud83d"}\n', ["--resume"], "line 1: not valid Unicode"),
        (
            2 * '{"index": 0, "prompt": "7 3 11 -> 32", "tokens": [], "commit_step": []}\n',
            ["--resume"],
            "holds index 0 twice",
        ),
        (
            '{"index": 0, "prompt": "7 3 11 -> 32", "tokens": ' + f"{[1] * 12}" + ', "commit_step": []}\n',
            ["--resume"],
            "does not say what its rows were made with",
        ),
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
        ({}, "EntropyBounded(gamma=0.1, order=entropy)"),
        ({"gamma": 0.5, "order": "margin"}, "EntropyBounded(gamma=0.5, order=margin)"),
        ({"rule": "confidence", "p": 0.0}, "ConfidenceThreshold(p=0)"),
        ({"rule": "confidence"}, "ConfidenceThreshold(p=0.9)"),
        ({"rule": "factor", "factor": 1}, "FactorThreshold(factor=1)"),
        ({"rule": "fixed", "steps": 4}, "FixedSchedule(steps=4)"),
        ({"rule": "fixed"}, "FixedSchedule(steps=128)"),
        ({"rule": "learned", "order": "margin"}, "PromptThreshold(order=margin)"),
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
    path.write_bytes(b'\xef\xbb\xbfgen_length = 12\r\nrule = "fixed"\r\n')
    assert main([str(path), PROMPTS[0]]) == 0
    assert rows_of(capsys.readouterr().out)[0]["nfe"] == 12
    for content, named in [
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("seed = " + "1" * 5000, "not valid TOML"),
        ("seed = 1".encode("utf-16"), "UTF-16"),
        (b"# caf\xe9", "line 1 is not UTF-8"),
    ]:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        stops(2, [str(path), PROMPTS[0]])
        message = capsys.readouterr().err
        assert named in message
        assert message.count("\n") == 1
    path.write_text("gen_lenth = 12\n")
    stops(2, [str(path), PROMPTS[0]])
    assert "unknown key 'gen_lenth'; nearest: gen_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        (["--gen-length", "12", "a b"], ["--prompt", "a b", "--gen-length", "12"]),
        (["--gen-length=12", "a b"], ["--prompt", "a b", "--gen-length=12"]),
        (["x.toml", "a", "--chat", "b", "--no-statistics", "c"], ["x.toml", "--prompt", "a", "b", "c", "--chat", "--no-statistics"]),
        (["--stop", "a", "b", "--seed", "1"], ["--stop", "a", "b", "--seed", "1"]),
        (["--stop", "a", "b", "--seed", "1", "c"], ["--prompt", "c", "--stop", "a", "b", "--seed", "1"]),
        (["--input", "-", "--seed", "-1", "a"], ["--prompt", "a", "--input", "-", "--seed", "-1"]),
        (["--prompt", "a", "b"], ["--prompt", "a", "b"]),
        (["--prompt", "a", "--seed", "1", "b"], ["--prompt", "a", "b", "--seed", "1"]),
        (["a", "--prompt", "b", "--prompt", "c", "--chat", "d"], ["--prompt", "a", "b", "c", "d", "--chat"]),
        (["--stop", "x", "--prompt=a", "b"], ["--prompt", "a", "b", "--stop", "x"]),
        (["--unknown", "a"], ["--prompt", "a", "--unknown"]),
        ([], []),
    ],
)  # fmt: skip
def test_prompts_are_the_words_that_belong_to_no_flag(arguments, same):
    assert generate_command._prompts_as_flag(arguments) == same


def test_a_dash_is_standard_output(capsys, tmp_path, monkeypatch):
    """As it is standard input; a file of that name is made by nobody on purpose."""
    monkeypatch.chdir(tmp_path)
    assert main([PROMPTS[0], *SHORT, "--output", "-"]) == 0
    assert [row["prompt"] for row in rows_of(capsys.readouterr().out)] == PROMPTS[:1]
    for flags, said in (
        (["--output", "-", "--resume"], "resume: needs the output file to continue, --output FILE"),
        (["--trace", "-"], "trace: a page is no standard output: give a file"),
    ):
        stops(2, [PROMPTS[0], *SHORT, *flags])
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_behind_the_flags_is_completed(capsys):
    assert main(["--gen-length", "12", "--rule", "fixed", PROMPTS[0]]) == 0
    (row,) = rows_of(capsys.readouterr().out)
    assert row["prompt"] == PROMPTS[0]


def test_input_without_an_end_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(text_input, "MOST_BYTES", 2**20)
    stops(2, ["--input", "/dev/zero", *SHORT])
    assert (
        capsys.readouterr().err == "error: input /dev/zero holds more than 1 MiB, or has no end: give smaller files\n"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7 3\n" * 2**19)))
    stops(2, SHORT)
    assert "input standard input holds more than 1 MiB" in capsys.readouterr().err
