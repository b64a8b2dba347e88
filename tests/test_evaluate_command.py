"""``python -m diffpo.evaluate``: the d1 protocol's prompts, the numbers of a run, resuming it, and every mistake a user can make."""

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import diffpo.evaluate
from diffpo import MaskedDiffusionLM, ModelConfig, load
from diffpo.decoding.generation import stream
from diffpo.evaluate import EvaluateConfig, main, prepare, wilson_interval
from diffpo.runs.item_log import ItemLog
from diffpo.tasks import GSM8K, Countdown, Math500
from diffpo.tasks.prompts import chat_prompts, compact_prompts
from diffpo.training.config import TrainConfig

SPECIAL = ["<|endoftext|>", "<|mdm_mask|>", "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLADA_TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GSM8K_ROWS = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(5)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte after LLaDA's special tokens, with LLaDA's chat template."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[2], eos_token=SPECIAL[0], pad_token=SPECIAL[0],
        mask_token=SPECIAL[1], extra_special_tokens={f"t{i}": token for i, token in enumerate(SPECIAL[3:])},
    )  # fmt: skip
    fast.chat_template = LLADA_TEMPLATE
    return fast


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> str:
    """The folder of an untrained model whose tokenizer reads any text and has a chat template."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=700, mask_token_id=1, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "chat"
    MaskedDiffusionLM(config, tokenizer).save(folder)
    return str(folder)


@pytest.fixture
def gsm8k(tmp_path) -> str:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GSM8K_ROWS))
    return str(path)


@pytest.fixture
def run(tmp_path):
    """run(*flags) -> exit code of a run called "run" in tmp_path."""
    return lambda *flags: main([*map(str, flags), "--name", "run", "--runs", str(tmp_path)])


@pytest.fixture
def chat_flags(chat_model, gsm8k) -> list[str]:
    return ["--model", chat_model, "--task", "gsm8k", "--data", gsm8k, "--gen-length", "16", "--block-length", "8"]


def items_in(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def summary_in(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def timeless(items: list[dict]) -> list[dict]:
    return [{name: value for name, value in item.items() if name != "seconds"} for item in items]


# Prompts


def test_a_chat_prompt_is_the_template_with_the_answer_begun(chat_model):
    tokenizer = load(chat_model).tokenizer
    task = GSM8K()
    (ids,) = chat_prompts(tokenizer, task, [task.problem_from_row(GSM8K_ROWS[0])])
    assert tokenizer.decode(ids) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{task.instruction}\n\nWhat is 0 + 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<reasoning>"
    )
    assert ids.dtype == torch.int64
    special = [tokenizer.convert_ids_to_tokens(i) for i in ids.tolist() if i < len(SPECIAL)]
    header = ["<|start_header_id|>", "<|end_header_id|>"]
    assert special == ["<|startoftext|>", *header, "<|eot_id|>", *header]


def test_a_compact_prompt_is_the_line_of_words():
    model, task = load("tiny-countdown"), Countdown()
    (ids,) = compact_prompts(model.tokenizer, task, [task.problem((7, 3, 11), 32)])
    assert model.tokenizer.decode(ids) == "7 3 11 -> 32"
    with pytest.raises(ValueError, match="gsm8k has no compact format"):
        compact_prompts(model.tokenizer, GSM8K(), [])


# The numbers


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0)],
)
def test_the_wilson_interval_against_published_values(right, count, low, high):
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=1e-4)


def test_a_run_on_a_tiny_model(run, tmp_path):
    assert run("--limit", "12", "--rule", "eb", "--gamma", "0.01", "--batch-size", "5") == 0
    items, summary = items_in(tmp_path / "run"), summary_in(tmp_path / "run")
    task = Countdown()
    problems = task.problems("test", 12, seed=0)
    assert sorted(item["index"] for item in items) == list(range(12))
    for item in items:
        problem = problems[item["index"]]
        assert item["problem"] == {"numbers": list(problem.numbers), "target": problem.target}
        assert item["correct"] is task.grade(problem, item["completion"]).correct
        assert item["reward"] == task.grade(problem, item["completion"]).reward
        assert item["gamma"] == pytest.approx(0.01)
        assert 1 <= item["nfe"] <= 12
    right, nfe = sum(item["correct"] for item in items), sum(item["nfe"] for item in items)
    tokens, seconds = sum(item["tokens"] for item in items), sum(item["seconds"] for item in items)
    assert 0 < right < 12
    assert (summary["done"], summary["problems"], summary["right"], summary["undecided"]) == (12, 12, right, 0)
    assert summary["accuracy"] == right / 12
    assert summary["accuracy_interval_95"] == list(wilson_interval(right, 12))
    assert summary["nfe"] == nfe / 12
    assert summary["tokens_per_forward"] == tokens / nfe
    assert summary["tokens_per_second"] == pytest.approx(tokens / seconds)
    assert summary["config"]["format"] == "compact"
    assert summary["rule"] == "EntropyBounded(gamma=0.01, proxy=entropy)"


def test_the_chat_run_follows_the_d1_protocol(run, chat_flags, tmp_path):
    assert run(*chat_flags, "--limit", "3") == 0
    summary = summary_in(tmp_path / "run")
    assert summary["config"]["format"] == "chat"
    assert summary["rule"] == "FixedSchedule(steps=8)"  # half of gen_length
    assert [item["nfe"] for item in items_in(tmp_path / "run")] == [8, 8, 8]
    assert summary["problems"] == 3


def test_rewards_see_the_begun_answer(run, chat_flags, tmp_path, monkeypatch):
    def answering(model, prompts, *arguments, **options):
        for index, generation in stream(model, prompts, *arguments, **options):
            text = f"\nbecause\n</reasoning>\n<answer>\n{index + 1 + (index == 4)}\n</answer>\n"
            yield index, diffpo.Generation([text], generation.trajectory)

    monkeypatch.setattr(diffpo.evaluate, "stream", answering)
    assert run(*chat_flags) == 0
    items, summary = items_in(tmp_path / "run"), summary_in(tmp_path / "run")
    assert [item["correct"] for item in items] == [True] * 4 + [False]
    assert [item["reward"] for item in items] == [4.0] * 4 + [2.0]
    assert (summary["accuracy"], summary["mean_reward"]) == (0.8, 3.6)


def test_undecided_answers_are_counted_and_not_right(run, chat_model, tmp_path, monkeypatch, capsys):
    data = tmp_path / "math.jsonl"
    data.write_text("".join(json.dumps({"problem": "q", "answer": answer}) + "\n" for answer in "12"))
    grades = {"1": diffpo.Grade(None, None), "2": diffpo.Grade(2.25, True)}
    monkeypatch.setattr(Math500, "grade", lambda self, problem, text: grades[problem.answer])
    flags = ["--model", chat_model, "--task", "math500", "--data", data, "--gen-length", "8", "--block-length", "8"]
    assert run(*flags) == 0
    summary = summary_in(tmp_path / "run")
    assert (summary["right"], summary["undecided"], summary["accuracy"]) == (1, 1, 0.5)
    assert summary["mean_reward"] == 2.25  # of the one that was decided
    assert "1 answers that could not be decided" in " ".join(capsys.readouterr().out.split())


def test_the_summary_says_where_it_comes_from_without_folders(run, chat_flags, chat_model, tmp_path):
    assert run(*chat_flags, "--limit", "1") == 0
    text = (tmp_path / "run" / "summary.json").read_text()
    provenance = json.loads(text)["provenance"]
    assert str(tmp_path) not in text
    assert str(chat_model) not in text
    assert provenance["command"].startswith("python -m diffpo.evaluate --model chat --task gsm8k --data gsm8k.jsonl")
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["model_revision"].startswith("sha256:")
    assert provenance["data_revision"].startswith("sha256:")
    assert provenance["hardware"]["cpu_cores"] == os.cpu_count()


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        ({"rule": "fixed", "steps": 4}, "FixedSchedule(steps=4)"),
        ({"rule": "eb", "gamma": 0.5, "proxy": "margin"}, "EntropyBounded(gamma=0.5, proxy=margin)"),
        ({"rule": "confidence", "p": 0.8}, "ConfidenceThreshold(p=0.8)"),
        ({"rule": "factor", "factor": 2}, "FactorThreshold(factor=2)"),
        ({"rule": "learned"}, "PromptThreshold()"),
    ],
)
def test_every_rule_can_be_named(flags, rule):
    assert repr(EvaluateConfig(**flags).commit_rule(load("tiny-countdown"), 12)) == rule


def test_the_learned_threshold_is_the_models(run, tmp_path):
    assert run("--model", "tiny-countdown-diffpo", "--rule", "learned", "--limit", "4") == 0
    assert summary_in(tmp_path / "run")["rule"] == "PromptThreshold(proxy=confidence)"
    assert all(item["gamma"] is not None for item in items_in(tmp_path / "run"))


@pytest.mark.parametrize(("bound", "written"), [("0.1", 0.1), ("inf", "inf")])
def test_the_bound_of_an_item_is_a_json_value(run, tmp_path, bound, written):
    assert run("--rule", "eb", "--gamma", bound, "--limit", "1") == 0
    (item,) = items_in(tmp_path / "run")
    assert item["gamma"] == written


# Interrupting and resuming


@pytest.fixture
def interrupted_after(monkeypatch):
    """interrupted_after(n): Ctrl-C while the network works on what follows the n-th row."""

    def patch(rows: int) -> None:
        def interrupted(*arguments, **options):
            for count, row in enumerate(stream(*arguments, **options)):
                if count == rows:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(10)  # the signal arrives here
                yield row

        monkeypatch.setattr(diffpo.evaluate, "stream", interrupted)

    return patch


def test_a_resumed_run_equals_one_that_was_not_interrupted(run, chat_flags, tmp_path, interrupted_after, monkeypatch):
    assert main([*chat_flags, "--name", "whole", "--runs", str(tmp_path)]) == 0
    with monkeypatch.context():
        interrupted_after(2)
        assert run(*chat_flags, "--batch-size", "1") == 0
    folder = tmp_path / "run"
    assert len(items_in(folder)) == 2
    assert (summary_in(folder)["done"], summary_in(folder)["problems"]) == (2, 5)
    kept = items_in(folder)
    with (folder / "items.jsonl").open("a") as file:
        file.write('{"index": 2, "comp')  # killed while it wrote
    calls = []

    def watched(model, prompts, *arguments, **options):
        calls.append(len(prompts))
        return stream(model, prompts, *arguments, **options)

    monkeypatch.setattr(diffpo.evaluate, "stream", watched)
    assert run(*chat_flags, "--resume", "--batch-size", "3") == 0
    assert calls == [3]
    assert items_in(folder)[:2] == kept
    assert timeless(items_in(folder)) == timeless(items_in(tmp_path / "whole"))
    names = ("accuracy", "nfe", "tokens", "tokens_per_forward", "mean_reward", "done")
    assert [summary_in(folder)[n] for n in names] == [summary_in(tmp_path / "whole")[n] for n in names]
    assert run(*chat_flags, "--resume") == 0  # nothing is left to do
    assert calls == [3]


def test_an_interrupt_while_a_row_is_scored_waits_for_its_line(run, chat_flags, tmp_path, monkeypatch):
    score = diffpo.evaluate.scored

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return score(*arguments)

    monkeypatch.setattr(diffpo.evaluate, "scored", interrupted)
    assert run(*chat_flags) == 0
    assert len(items_in(tmp_path / "run")) == 1


def test_every_row_is_on_disk_before_the_next_one_is_decoded(run, chat_flags, tmp_path, monkeypatch):
    on_disk = []

    def watched(*arguments, **options):
        for row in stream(*arguments, **options):
            on_disk.append(len(items_in(tmp_path / "run")))
            yield row

    monkeypatch.setattr(diffpo.evaluate, "stream", watched)
    assert run(*chat_flags) == 0
    assert on_disk == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "fault", [FloatingPointError("logits are NaN"), torch.OutOfMemoryError("a single row does not fit")]
)
def test_a_fault_stops_with_what_was_done(run, chat_flags, tmp_path, monkeypatch, capsys, fault):
    def broken(*arguments, **options):
        rows = stream(*arguments, **options)
        yield next(rows)
        raise fault

    monkeypatch.setattr(diffpo.evaluate, "stream", broken)
    assert run(*chat_flags) == 1
    assert f"1 of 5 problems: {fault}" in capsys.readouterr().err
    assert len(items_in(tmp_path / "run")) == 1
    assert summary_in(tmp_path / "run")["done"] == 1


def test_the_log_refuses_a_damaged_line(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"index": 0}\n{"inde\n{"index": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        ItemLog(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--rule", "confidence"], "rule: fixed -> confidence; steps: 8 -> None"),
        (["--gen-length", "8"], "gen_length: 16 -> 8; steps: 8 -> 4"),
        (["--limit", "3"], "limit: None -> 3"),
    ],
)
def test_resuming_with_another_configuration_is_refused(run, chat_flags, tmp_path, capsys, change, message):
    assert run(*chat_flags) == 0
    before = items_in(tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, *change, "--resume")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "allow-config-change" not in error
    assert items_in(tmp_path / "run") == before


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


def test_resuming_with_other_files_is_refused(run, chat_flags, gsm8k, capsys):
    assert run(*chat_flags) == 0
    with open(gsm8k, "a") as file:
        file.write("\n")
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, "--resume")
    assert stopped.value.code == 2
    assert "the files changed: data: sha256:" in capsys.readouterr().err


def test_a_used_folder_is_not_touched_and_overwrite_empties_it(run, chat_flags, tmp_path, capsys):
    assert run(*chat_flags, "--limit", "2") == 0
    with pytest.raises(SystemExit):
        run(*chat_flags)
    assert "--resume continues it" in capsys.readouterr().err
    assert run(*chat_flags, "--limit", "1", "--overwrite") == 0
    assert len(items_in(tmp_path / "run")) == 1


def test_overwrite_leaves_the_run_of_another_command_alone(run, chat_flags, tmp_path, capsys):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text(TrainConfig(name="run").model_dump_json())
    (tmp_path / "run/checkpoints/000001").write_text("a day of training")
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, "--overwrite")
    assert stopped.value.code == 2
    assert "no run of this command" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/000001").exists()


@pytest.mark.parametrize("content", ['{"model": "tin', "[]"])
def test_an_unreadable_configuration_is_no_run_to_continue(run, chat_flags, tmp_path, capsys, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(content)
    for flag, message in (("--resume", "no run to continue"), ("--overwrite", "no run of this command")):
        with pytest.raises(SystemExit) as stopped:
            run(*chat_flags, flag)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "run/config.json").read_text() == content


def failing(run, capsys, *flags) -> str:
    """The one line of a run that ended with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_overwrite_leaves_somebodys_folder_alone(run, chat_flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("")
    (tmp_path / "run/items.jsonl").write_text("")
    (tmp_path / "run/thesis.tex").write_text("four years")
    for flag in ("--overwrite", "--resume", "--no-resume"):
        assert "run" in failing(run, capsys, *chat_flags, flag)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "items.jsonl", "thesis.tex"]


@pytest.mark.parametrize("name", ["items.jsonl", "summary.json", "config.json", ".lock"])
@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_a_link_keeps_its_target(run, chat_flags, tmp_path, capsys, name, flag):
    assert run(*chat_flags, "--limit", "1") == 0
    capsys.readouterr()
    os.rename(tmp_path / "run" / name, tmp_path / "mine")
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    before = (tmp_path / "mine").read_bytes()
    assert name in failing(run, capsys, *chat_flags, "--limit", "1", flag)
    assert (tmp_path / "mine").read_bytes() == before


@pytest.fixture
def copied_model(chat_model, tmp_path):
    shutil.copytree(chat_model, tmp_path / "chat")
    return tmp_path / "chat"


def other_weights(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"] * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_template(folder) -> None:
    (folder / "chat_template.jinja").write_text(LLADA_TEMPLATE.replace("\n\n", "\n"))


@pytest.mark.parametrize(
    ("change", "named"), [(other_weights, "model: sha256:"), (other_template, "tokenizer: sha256:")]
)
def test_another_model_under_the_same_name_is_refused(run, chat_flags, copied_model, tmp_path, capsys, change, named):
    flags = [*chat_flags, "--model", copied_model]
    assert run(*flags) == 0
    before = items_in(tmp_path / "run")
    capsys.readouterr()
    change(copied_model)
    error = failing(run, capsys, *flags, "--resume")
    assert named in error
    assert ("prompts: sha256:" in error) is (change is other_template)
    assert items_in(tmp_path / "run") == before


def test_another_instruction_is_refused(run, chat_flags, tmp_path, capsys, monkeypatch):
    assert run(*chat_flags) == 0
    capsys.readouterr()
    monkeypatch.setattr(GSM8K, "instruction", "Answer in <answer> tags.")
    assert "prompts: sha256:" in failing(run, capsys, *chat_flags, "--resume")


def test_the_same_contents_under_other_names_go_on(run, chat_flags, copied_model, gsm8k, tmp_path):
    assert run(*chat_flags) == 0
    shutil.copy(gsm8k, tmp_path / "copy.jsonl")
    assert run(*chat_flags, "--model", copied_model, "--data", tmp_path / "copy.jsonl", "--resume") == 0


@pytest.mark.parametrize(
    "row",
    [
        {"index": 9}, {"index": -1}, {"index": True}, {"index": "0"}, {"nfe": None}, {"tokens": "3"}, {"seconds": [1]},
        {"correct": "yes"}, {"reward": "1"}, {"reward": {}},
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_counted_is_refused(run, chat_flags, tmp_path, capsys, row):
    assert run(*chat_flags, "--limit", "1") == 0
    capsys.readouterr()
    (item,) = items_in(tmp_path / "run")
    (tmp_path / "run/items.jsonl").write_text(json.dumps(item | row) + "\n")
    assert "is no evaluated problem" in failing(run, capsys, *chat_flags, "--limit", "1", "--resume")


@pytest.mark.parametrize("reward", [None, math.nan, math.inf, 1e39])
def test_a_reward_that_is_no_number_is_null(run, chat_flags, tmp_path, monkeypatch, reward):
    monkeypatch.setattr(GSM8K, "grade", lambda self, problem, text: diffpo.Grade(reward, False))
    assert run(*chat_flags, "--limit", "2") == 0
    assert [item["reward"] for item in items_in(tmp_path / "run")] == [None, None]
    assert summary_in(tmp_path / "run")["mean_reward"] is None


@pytest.mark.parametrize(
    "grade", [diffpo.Grade("1", True), diffpo.Grade(torch.ones(2), True), diffpo.Grade(1.0, "x"), 1.0, None]
)
def test_a_grade_of_a_wrong_type_ends_the_run_in_one_line(run, chat_flags, tmp_path, monkeypatch, capsys, grade):
    with monkeypatch.context() as patch:
        patch.setattr(GSM8K, "grade", lambda self, problem, text: grade)
        assert run(*chat_flags, "--limit", "2") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "task gsm8k" in error
    assert run(*chat_flags, "--limit", "2", "--resume") == 0


def test_a_full_disk_while_rows_are_written(run, chat_flags, tmp_path, monkeypatch, capsys):
    write, full = ItemLog.write, OSError(errno.ENOSPC, "No space left on device")

    def limited(self, item):
        if len(self.items) == 2:
            raise full
        write(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(ItemLog, "write", limited)
        assert run(*chat_flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "after 2 of 5 problems" in error
    assert "No space left" in error
    assert len(items_in(tmp_path / "run")) == 2
    assert run(*chat_flags, "--resume") == 0
    assert summary_in(tmp_path / "run")["done"] == 5


@pytest.mark.parametrize("name", [".diffpo-run", "config.json", "summary.json"])
def test_a_full_disk_at_the_start_and_at_the_end(run, chat_flags, tmp_path, monkeypatch, capsys, name):
    rename = os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert run(*chat_flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error
    begun = name == "summary.json"
    assert run(*chat_flags, *(["--resume"] if begun else [])) == 0
    assert summary_in(tmp_path / "run")["done"] == 5


def test_what_is_written_is_valid_json_whatever_the_numbers(run, tmp_path):
    assert run("--rule", "eb", "--gamma", "inf", "--limit", "1") == 0
    for path in (tmp_path / "run").rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=pytest.fail)


# Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "gsm"], "unknown task 'gsm': did you mean 'gsm8k'"),
        (["--data", "no/such.jsonl"], "data: there is no file no/such.jsonl"),
        (["--data", "x" * 5000], "data: there is no file xxx"),
        (["--model", "tiny-countdwn"], "did you mean tiny-countdown"),
        (["--format", "chat"], "no chat template"),
        (["--task", "sudoku"], "does not know words of task sudoku: _"),
        (["--rule", "learned"], "no learned threshold"),
        (["--gen-length", "300"], "with gen_length 300 more than the model's context of 256"),
        (["--gen-length", "12", "--block-length", "5"], "gen_length 12 must be a multiple of block_length"),
        (["--block-length", "4", "--steps", "7"], "steps 7 must be a multiple of the number of blocks 3"),
        (["--limit", "100000"], "limit: the test split of countdown holds"),
        (["--limit", "99999999999999999999"], "limit: an integer of at most 64 bits"),
        (["--batch-size", "99999999999999"], "batch_size"),
        (["--gamma", "nan", "--rule", "eb"], "gamma"),
        (["--model", "m" * 300], "neither a folder nor a shipped model"),
        (["--data", "d" * 300 + ".jsonl"], "File name too long"),
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
        ("gamma = 0.5", "gamma: is a setting of rule eb, the rule is fixed"),
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


# Protocols and instructions


@pytest.mark.parametrize(("protocol", "reward", "correct"), [("strict", 2.5, True), ("d1", 0.0, False)])
def test_the_protocol_judges_and_is_recorded(run, chat_flags, tmp_path, monkeypatch, protocol, reward, correct):
    """The reasoning holds a box, which d1 takes for the answer, and the answer has none of the tags' lines."""

    def answered(*arguments, **options):
        for position, row in stream(*arguments, **options):
            yield position, dataclasses.replace(row, text=[r"\boxed{7} <answer>\boxed{1}</answer>"])

    monkeypatch.setattr(diffpo.evaluate, "stream", answered)
    assert run(*chat_flags, "--limit", "1", "--protocol", protocol) == 0
    (item,), summary = items_in(tmp_path / "run"), summary_in(tmp_path / "run")
    assert (item["reward"], item["correct"]) == (pytest.approx(reward), correct)
    assert summary["config"]["protocol"] == protocol
    with pytest.raises(SystemExit):
        run(*chat_flags, "--limit", "1", "--protocol", "d1" if protocol == "strict" else "strict", "--resume")


def test_an_instruction_of_ones_own_stands_in_front_of_the_question(run, chat_model, chat_flags, tmp_path, capsys):
    path = tmp_path / "paper.txt"
    path.write_bytes(b"\xef\xbb\xbfThink, then \\boxed{}.\n")
    config = EvaluateConfig(
        model=chat_model, task="gsm8k", data=chat_flags[5], instruction=str(path), gen_length=16, block_length=8
    )
    evaluation = prepare(config, GSM8K())
    text = evaluation.model.tokenizer.decode(evaluation.prompts[0])
    assert "<|end_header_id|>\n\nThink, then \\boxed{}.\n\nWhat is 0 + 1?" in text
    assert run(*chat_flags, "--instruction", path) == 0
    summary = summary_in(tmp_path / "run")
    assert summary["config"]["instruction"] == "paper.txt"
    digest = summary["provenance"]["instruction_revision"]
    path.write_text("Think twice.")
    with pytest.raises(SystemExit):
        run(*chat_flags, "--instruction", path, "--resume")
    assert f"instruction: {digest} -> sha256:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file"), (b" \n", "is empty"), (b"\xff\xfe", "is not UTF-8")]
)
def test_instructions_that_cannot_be_used(run, chat_flags, tmp_path, capsys, content, message):
    path = tmp_path / "paper.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run(*chat_flags, "--instruction", path)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_compact_texts_have_neither(run, tmp_path, capsys):
    path = tmp_path / "paper.txt"
    path.write_text("Think.")
    for flags in (["--protocol", "d1"], ["--instruction", path]):
        with pytest.raises(SystemExit) as stopped:
            run(*flags)
        assert stopped.value.code == 2
        assert f"{flags[0][2:]}: " in capsys.readouterr().err


def test_dry_run_prints_the_configuration_and_loads_nothing(capsys):
    assert main(["--task", "gsm8k", "--model", "no-such-model", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "gsm8k"
