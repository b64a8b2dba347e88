"""Every mistake a user of ``python -m diffpo.evaluate`` can make, found before anything is written."""

import pytest

from diffpo import load
from diffpo.evaluate import main


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "gsm"], "unknown task 'gsm': did you mean 'gsm8k'"),
        (["--data", "no/such.jsonl"], "data: there is no file no/such.jsonl"),
        (["--model", "tiny-countdwn"], "did you mean tiny-countdown"),
        (["--format", "chat"], "no chat template"),
        (["--task", "medley", "--data", "x.jsonl"], "data: task medley has no such setting: leave it out"),
        (["--task", "medley", "--protocol", "d1"], "protocol: task medley has no such setting: leave it out"),
        (["--task", "medley", "--instruction", "x.txt"], "instruction: task medley is not asked as a chat"),
        (
            ["--task", "sudoku"],
            "task: the model's tokenizer does not know words of task sudoku: _; give a model that was pretrained on it",
        ),
        (["--rule", "learned"], "no learned threshold"),
        (["--gen-length", "300"], "with gen_length 300 more than the model's context of 256"),
        (["--gen-length", "12", "--block-length", "5"], "gen_length 12 must be a multiple of block_length"),
        (["--block-length", "4", "--steps", "7"], "steps 7 must be a multiple of the number of blocks 3"),
        (["--limit", "100000"], "limit: the test split of countdown holds"),
        (["--limit", "99999999999999999999"], "limit: an integer of at most 64 bits"),
        (["--batch-size", "99999999999999"], "batch_size"),
        (["--gamma", "nan", "--rule", "eb"], "gamma"),
        (["--model", "m" * 300], "neither a folder nor a shipped model"),
        (["--data", "d" * 300 + ".jsonl"], "data: there is no file ddd"),
    ],
)
def test_a_mistake_is_found_before_the_folder_is_made(run, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('fromat = "chat"', "unknown key 'fromat'; nearest: format"),
        ('format = "chatty"', "format: Input should be 'auto', 'chat' or 'compact'"),
        ("gamma = -1", "gamma"),
        ("limit = 0", "limit"),
        ('rule = "entropy"', "rule"),
        ('rule = "fixed"\ngamma = 0.5', "gamma: is a setting of rule eb, the rule is fixed"),
        ("p = 0.5", "p: is a setting of rule confidence, the rule is auto: set rule to confidence, or leave p out"),
        ("steps = 4\ngamma = 0.5", "gamma: is a setting of rule eb, the rule is fixed"),
        ('rule = "factor"', "factor: must be given"),
    ],
)
def test_a_mistake_in_a_file_names_its_field(tmp_path, capsys, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main([str(path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_chat_mistakes(run, chat_flags, capsys, tmp_path):
    for flags, message in (
        (["--format", "compact"], "gsm8k has no compact format: use --format chat"),
        (["--gen-length", "512"], "5 prompts are too long, first: problem 0 has"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*chat_flags, *flags)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"prompt": "q"}\n')
    with pytest.raises(SystemExit):
        run(*chat_flags, "--data", wrong)
    assert "needs the columns question, answer, found prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            "{{ raise_exception('no user messages') }}",
            "problem 0: the tokenizer's chat template fails: TemplateError: no user messages",
        ),
        ("{% for m in messages %}{{ m['content'] }", "TemplateSyntaxError"),
        ("{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes too long"),
    ],
)
def test_a_chat_template_that_fails(run, chat_flags, tmp_path, capsys, template, named):
    model = load(chat_flags[1])
    model.tokenizer.chat_template = template
    model.save(tmp_path / "hostile")
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, "--model", tmp_path / "hostile")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert named in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_mask_token_in_a_question(run, chat_flags, gsm8k, tmp_path, capsys):
    with open(gsm8k, "a") as file:
        file.write('{"question": "What is <|mdm_mask|>?", "answer": "#### 1"}\n')
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags)
    assert stopped.value.code == 2
    assert "problem 5 (row 6) contains the mask token" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
