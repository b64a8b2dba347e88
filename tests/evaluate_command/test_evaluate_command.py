"""``python -m diffpo.evaluate``: the d1 protocol's prompts, the numbers of a run, its rule, protocols and instructions."""

import dataclasses
import json
import os

import pytest
import torch
from chat_models import SPECIAL
from evaluate_runs import GSM8K_ROWS, items_in, summary_in

import diffpo
import diffpo.evaluation
from diffpo import load
from diffpo.decoding.generation import stream
from diffpo.evaluate import EvaluateConfig, main, prepare
from diffpo.evaluation import wilson_interval
from diffpo.tasks import GSM8K, Countdown, Math500, Medley
from diffpo.tasks.medley.kinds import KINDS
from diffpo.tasks.prompts import prompt_ids

# Prompts


def test_a_chat_prompt_is_the_template_with_the_answer_begun(chat_model):
    tokenizer = load(chat_model).tokenizer
    task = GSM8K()
    (ids,) = prompt_ids(tokenizer, task, [task.problem_from_row(GSM8K_ROWS[0])])
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
    (ids,) = prompt_ids(model.tokenizer, task, [task.problem((7, 3, 11), 32)])
    assert model.tokenizer.decode(ids) == "7 3 11 -> 32"
    with pytest.raises(ValueError, match="gsm8k has no compact format"):
        GSM8K(format="compact")


# The numbers


def test_a_task_of_several_kinds_is_reported_by_kind(run, tmp_path, capsys):
    """It has no published data, and is asked in its own words."""
    assert run("--model", "tiny-medley", "--task", "medley", "--limit", "24", "--rule", "eb", "--gamma", "32") == 0
    items, summary = items_in(tmp_path / "run"), summary_in(tmp_path / "run")
    assert summary["config"]["format"] == "compact"
    kinds, problems = summary["kinds"], Medley().problems("test", 24, seed=0)
    assert sorted(kinds) == sorted(KINDS)
    for kind, of in kinds.items():
        mine = [item for item in items if problems[item["index"]].kind == kind]
        assert of["done"] == len(mine) == 4
        assert of["accuracy"] == sum(item["correct"] for item in mine) / 4
    assert kinds["copy"]["accuracy"] > kinds["distinct"]["accuracy"] == 0, "all at once"
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"reverse {kinds['reverse']['accuracy']:.1%} of 4, 1.00 NFE" in words


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
    assert summary["rule"] == "EntropyBounded(gamma=0.01, order=entropy)"


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

    monkeypatch.setattr(diffpo.evaluation, "stream", answering)
    assert run(*chat_flags) == 0
    items, summary = items_in(tmp_path / "run"), summary_in(tmp_path / "run")
    assert [item["correct"] for item in items] == [True] * 4 + [False]
    assert [item["reward"] for item in items] == [4.0] * 4 + [2.0]
    assert (summary["accuracy"], summary["mean_reward"]) == (0.8, 3.6)


def test_undecided_answers_are_counted_and_not_right(run, chat_model, tmp_path, monkeypatch, capsys):
    data = tmp_path / "math.jsonl"
    data.write_text("".join(json.dumps({"problem": "q", "answer": answer}) + "\n" for answer in "12"))
    grades = {"1": diffpo.Grade(None, None), "2": diffpo.Grade(2.25, True)}
    monkeypatch.setattr(Math500, "grade_many", lambda self, problems, texts: [grades[p.answer] for p in problems])
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
        ({"rule": "eb", "gamma": 0.5, "order": "margin"}, "EntropyBounded(gamma=0.5, order=margin)"),
        ({"rule": "confidence", "p": 0.8}, "ConfidenceThreshold(p=0.8)"),
        ({"rule": "factor", "factor": 2}, "FactorThreshold(factor=2)"),
        ({"rule": "learned"}, "PromptThreshold()"),
    ],
)
def test_every_rule_can_be_named(flags, rule):
    assert repr(EvaluateConfig(**flags).commit_rule(load("tiny-countdown"), 12)) == rule


def test_the_learned_threshold_is_the_models(run, tmp_path):
    assert run("--model", "tiny-countdown-diffpo", "--rule", "learned", "--limit", "4") == 0
    assert summary_in(tmp_path / "run")["rule"] == "PromptThreshold(order=confidence)"
    assert all(item["gamma"] is not None for item in items_in(tmp_path / "run"))


@pytest.mark.parametrize(
    ("model", "flags", "rule", "words"),
    [
        ("tiny-countdown-diffpo", [], "PromptThreshold(order=confidence)", "the threshold that the model has learned"),
        ("tiny-countdown", [], "FixedSchedule(steps=6)", "a fixed schedule, as in published protocols"),
        ("tiny-countdown-diffpo", ["--rule", "fixed"], "FixedSchedule(steps=6)", "a fixed schedule"),
        ("tiny-countdown-diffpo", ["--steps", "4"], "FixedSchedule(steps=4)", "a fixed schedule"),
        ("tiny-countdown-diffpo", ["--gamma", "0.5"], "EntropyBounded(gamma=0.5, order=entropy)", "as asked for"),
        ("tiny-countdown", ["--order", "margin"], "EntropyBounded(gamma=0.1, order=margin)", "as asked for"),
    ],
)
def test_a_learned_threshold_is_used_where_there_is_one(run, tmp_path, capsys, model, flags, rule, words):
    assert run("--model", model, "--limit", "3", *flags) == 0
    assert summary_in(tmp_path / "run")["rule"] == rule
    assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(("bound", "written"), [("0.1", 0.1), ("inf", "inf")])
def test_the_bound_of_an_item_is_a_json_value(run, tmp_path, bound, written):
    assert run("--rule", "eb", "--gamma", bound, "--limit", "1") == 0
    (item,) = items_in(tmp_path / "run")
    assert item["gamma"] == written


# Protocols and instructions


@pytest.mark.parametrize(("protocol", "reward", "correct"), [("strict", 2.5, True), ("d1", 0.0, False)])
def test_the_protocol_judges_and_is_recorded(run, chat_flags, tmp_path, monkeypatch, protocol, reward, correct):
    """The reasoning holds a box, which d1 takes for the answer, and the answer has none of the tags' lines."""

    def answered(*arguments, **options):
        for position, row in stream(*arguments, **options):
            yield position, dataclasses.replace(row, text=[r"\boxed{7} <answer>\boxed{1}</answer>"])

    monkeypatch.setattr(diffpo.evaluation, "stream", answered)
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
    evaluation = prepare(config, GSM8K(data=config.data))
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
