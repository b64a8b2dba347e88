"""Chat templates are programs from strangers: what they render, and that none of them ends, stops or fills this process."""

import time

import pytest
from tokenizers import Tokenizer, models

import diffpo
from diffpo.models.chat_template import ChatTemplateError, render_chats

USER = [{"role": "user", "content": "7 3 11"}]


@pytest.fixture
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))


def test_a_last_message_of_the_assistant_is_continued(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    begun = {"role": "assistant", "content": "so <"}
    closed = "user: 7 3 11.assistant: "
    texts = render_chats(tokenizer, [USER, [*USER, begun], [*USER, begun, *USER], [*USER, begun | {"content": ""}]])
    assert texts == [closed, closed + "so <", "user: 7 3 11.assistant: so <.user: 7 3 11.assistant: ", closed]
    with pytest.raises(ChatTemplateError, match=r"chat 1: .*a message before the assistant's"):
        render_chats(tokenizer, [USER, [begun]])


HOSTILE = {
    "raises": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role\nis not supported') }}{% endif %}x",
        "System role is",
    ),
    "does not parse": ("{% for m in messages %}{{ m['content'] }", "TemplateSyntaxError: unexpected '}'"),
    "unknown filter": ("{{ messages | frobnicate }}", "No filter named 'frobnicate'"),
    "undefined": ("{{ tools[0].name }}", "fails: "),
    "wrong type": ("{{ none + 'a' }}", "TypeError"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "changes the messages": ("{{ messages.append(1) }}", "SecurityError"),
    "one long loop": ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "takes too long",
    ),
    "a power": ("{{ (9 ** (9 ** 9)) % 10 }}", "takes too long"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a huge string": ("{{ 'x' * 10**11 }}", "too much memory"),
    "a huge field": ("{{ '%0999999999d' % 1 }}", "too much memory"),
    "a string that grows": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "too much memory",
    ),
    "a long text": ("{% for i in range(99999) %}" + "x" * 50 + "{% endfor %}", "renders 4,999,950 characters"),
    "nothing": ("{# nothing #} \n", "renders nothing"),
    "other files": ("{% include '/etc/passwd' %}", "fails: "),
}


@pytest.mark.parametrize(("template", "named"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_one_line(tokenizer, template, named):
    tokenizer.chat_template = template
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match="chat 0: the tokenizer's chat template") as caught:
        render_chats(tokenizer, [[{"role": "system", "content": "s"}, *USER]])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30, "a second of work, on a machine that may be busy"


def test_the_chat_that_fails_is_named(tokenizer):
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}x"
    with pytest.raises(ChatTemplateError, match=r"chat 2: .*roles must alternate"):
        render_chats(tokenizer, [USER, USER, USER * 2, USER])
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render_chats(tokenizer, [USER] * 500) == ["7 3 11"] * 500


@pytest.mark.parametrize("kind", ["raises", "does not parse", "nested loops", "a huge string", "sandbox"])
def test_the_command_ends_before_it_writes(tmp_path, capsys, kind):
    main = pytest.importorskip("diffpo.generate_command", exc_type=ImportError).main
    model = diffpo.load("tiny-countdown")
    model.tokenizer.chat_template = HOSTILE[kind][0]
    model.save(tmp_path / "hostile")
    with pytest.raises(SystemExit) as stopped:
        main(["7 3 11", "--chat", "--system", "1", "--model", str(tmp_path / "hostile"), "--gen-length", "12",
              "--output", str(tmp_path / "out.jsonl")])  # fmt: skip
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: prompt 1: the tokenizer's chat template")
    assert message.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()
