"""Pretraining: the loss is the negative ELBO, it falls, and a seed decides everything."""

import errno
import io
import json
import math
import os
import signal
import sys

import pytest
import torch

import diffpo.pretrain
from diffpo.config import ModelSize, PretrainConfig
from diffpo.pretrain import build_model, elbo_loss, encode_examples, lr_factor, pretrain
from diffpo.runs.digests import weights_digest
from diffpo.runs.json_lines import JsonLines
from diffpo.tasks import get_task

SIZE = ModelSize(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def small(**changes) -> PretrainConfig:
    return PretrainConfig(
        **{"task": "sudoku", "steps": 60, "batch_size": 32, "warmup_steps": 10, "model": SIZE} | changes
    )


@pytest.mark.parametrize("name", ["countdown", "sudoku", "medley"])
def test_examples_fill_the_completion_exactly(name):
    task = get_task(name)
    model = build_model(task, SIZE)
    prompts, completions = encode_examples(model, task, 10, seed=0)
    assert completions.shape == (10, task.gen_length)
    assert len(prompts) == 10
    assert (completions != model.mask_id).all()
    assert ((completions[:, -1] == model.config.eos_token_id) == task.ends_with_eos).all()


@pytest.mark.parametrize("start", [None, "tiny-medley"])
def test_prompts_are_padded_on_the_left(start):
    task = get_task("medley")
    model = diffpo.load(start) if start else build_model(task, SIZE)
    prompts, completions = encode_examples(model, task, 40, seed=0)
    for row, (prompt, completion) in zip(
        zip(prompts, completions, strict=True), task.examples(40, seed=0), strict=True
    ):
        words = [model.tokenizer(text)["input_ids"] for text in (prompt, completion)]
        assert row[0].tolist() == [model.config.pad_token_id] * (prompts.shape[1] - len(words[0])) + words[0]
        assert row[1].tolist() == words[1] + [model.config.eos_token_id] * (task.gen_length - len(words[1]))


def test_an_example_that_does_not_fit_is_no_example():
    task = get_task("countdown")
    model = build_model(task, SIZE)
    task.gen_length = 9
    with pytest.raises(
        ValueError, match="gen_length: task countdown has 9 tokens for a completion, one of its examples takes"
    ):
        encode_examples(model, task, 10, seed=0)


def test_the_loss_of_a_uniform_model_is_the_entropy_of_its_vocabulary():
    """E over t of sum over masked (1/t) log(V-1) / L = log(V-1): the mask token itself is never predicted."""
    task = get_task("sudoku")
    model = build_model(task, SIZE)
    model.lm_head.weight.data.zero_()
    prompts, completions = encode_examples(model, task, 512, seed=0)
    with torch.no_grad():
        losses = [elbo_loss(model, prompts, completions, 0, step).item() for step in range(8)]
    expected = math.log(model.config.vocab_size - 1)
    assert sum(losses) / 8 == pytest.approx(expected, rel=0.1)


def test_padding_before_a_prompt_changes_no_loss():
    task = get_task("sudoku")
    torch.manual_seed(0)
    model = build_model(task, SIZE)
    prompts, completions = encode_examples(model, task, 16, seed=0)
    padded = torch.cat([torch.full((16, 3), model.config.pad_token_id), prompts], dim=1)
    with torch.no_grad():
        exact, got = (elbo_loss(model, given, completions, 0).item() for given in (prompts, padded))
    assert got == pytest.approx(exact, rel=1e-5)


def test_a_few_steps_reduce_the_loss():
    task = get_task("sudoku")
    torch.manual_seed(0)
    untrained = build_model(task, SIZE)
    model = build_model(task, SIZE)
    model.load_state_dict(untrained.state_dict())
    pretrain(model, task, small())
    prompts, completions = encode_examples(model, task, 256, seed=99)
    with torch.no_grad():
        before, after = (elbo_loss(m, prompts, completions, 7).item() for m in (untrained, model))
    assert after < before - 0.3


def test_a_seed_decides_every_weight():
    task, states = get_task("sudoku"), []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        model = build_model(task, SIZE)
        pretrain(model, task, small(steps=5, seed=seed))
        states.append(model.state_dict())
    first, second, third = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


def losses_of(monkeypatch, **changes) -> tuple[list[float], dict]:
    """The loss of every step, nats a token, and the weights at the end."""
    task, losses, loss = get_task("sudoku"), [], elbo_loss
    torch.manual_seed(0)
    model = build_model(task, SIZE)
    with monkeypatch.context() as patch:

        def noted(*arguments):
            value = loss(*arguments)
            losses.append(value.item())
            return value

        patch.setattr(diffpo.pretrain, "elbo_loss", noted)
        pretrain(model, task, small(**changes))
    return losses, model.state_dict()


def test_bf16_follows_fp32(monkeypatch):
    """To within 1% of the loss at every step, over 40 steps in which it falls by a quarter; the weights stay fp32."""
    exact, _ = losses_of(monkeypatch, steps=40)
    low, weights = losses_of(monkeypatch, steps=40, bf16=True)
    assert sum(exact[-5:]) < 0.8 * sum(exact[:5])
    assert low != exact
    assert low == pytest.approx(exact, rel=0.01)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_compiled_bf16_follows_fp32(monkeypatch):
    exact, _ = losses_of(monkeypatch, steps=8)
    compiled, weights = losses_of(monkeypatch, steps=8, bf16=True, compile=True)
    assert compiled == pytest.approx(exact, rel=0.01)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_the_command_takes_bf16_and_saves_fp32(tmp_path, monkeypatch):
    assert pretrained(tmp_path, monkeypatch, "--bf16") == 0
    weights = diffpo.load(tmp_path / "m").state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_the_rate_warms_up_and_falls():
    rates = [lr_factor(step, small(steps=100, final_lr_fraction=0.1)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1 - 0.9 * 9 / 100)
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 100)
    assert [lr_factor(step, small()) for step in (9, 10, 59)] == [1.0] * 3


def test_the_command_goes_on_from_a_model(tmp_path, monkeypatch):
    """Two steps at the start of the warm-up hardly move the weights, whose sizes are the starting model's."""
    torch.manual_seed(0)
    start = build_model(get_task("sudoku"), SIZE)
    start.save(tmp_path / "start")
    flags = ["--task", "sudoku", "--steps", "2", "--batch-size", "4", "--heldout", "4", "--lr", "1e-3", "--seed", "1"]
    monkeypatch.setattr("sys.argv", ["p", *flags, "--start", str(tmp_path / "start"), "--output", str(tmp_path / "m")])
    diffpo.pretrain.main()
    continued = diffpo.load(tmp_path / "m").state_dict()
    assert all(torch.allclose(value, continued[name], atol=1e-4) for name, value in start.state_dict().items())
    assert any(not torch.equal(value, continued[name]) for name, value in start.state_dict().items())


@pytest.mark.parametrize(
    "mistake",
    [
        ("--start", "tiny-sudoku", "--task", "countdown"),
        ("--start", "tiny-nothing"),
        ("--device", "cuda"),
        ("--task", "gsm8k"),
        ("--start", "tiny-countdown", "--model.hidden-size", "64"),
        ("--start", "tiny-countdown", "--model.num-hidden-layers", "3"),
    ],
)
def test_mistakes_end_before_anything_is_written(mistake, tmp_path, monkeypatch):
    if "cuda" in mistake and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr("sys.argv", ["pretrain", *mistake, "--output", str(tmp_path / "m")])
    with pytest.raises(SystemExit) as stopped:
        diffpo.pretrain.main()
    assert stopped.value.code == 2
    assert not (tmp_path / "m").exists()


def test_the_command_writes_a_model_that_loads(tmp_path, monkeypatch):
    flags = ["--task", "sudoku", "--steps", "2", "--batch-size", "4", "--heldout", "4", "--output", str(tmp_path / "m")]
    size = ["--model.hidden-size", "32", "--model.intermediate-size", "48", "--model.num-hidden-layers", "1"]
    monkeypatch.setattr("sys.argv", ["pretrain", *flags, *size])
    diffpo.pretrain.main()
    model = diffpo.load(tmp_path / "m")
    assert model.config.hidden_size == 32
    assert diffpo.generate(model, ["_ " * 15 + "1"], gen_length=16).tokens.shape == (1, 16)


def metrics_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pretrained(tmp_path, monkeypatch, *more: str) -> int:
    flags = ["--task", "sudoku", "--steps", "2", "--batch-size", "4", "--heldout", "4", "--output", str(tmp_path / "m")]
    size = ["--model.hidden-size", "32", "--model.intermediate-size", "48", "--model.num-hidden-layers", "1"]
    monkeypatch.setattr("sys.argv", ["pretrain", *flags, *size, *more])
    try:
        return diffpo.pretrain.main()
    except SystemExit as stopped:
        return stopped.code


def test_the_metrics_are_a_line_every_fifty_steps_and_after_the_last(tmp_path, monkeypatch):
    flags = ("--steps", "120", "--warmup-steps", "60", "--lr", "1e-3", "--final-lr-fraction", "0.5")
    assert pretrained(tmp_path, monkeypatch, *flags) == 0
    lines = metrics_of(tmp_path / "m")
    assert [line["step"] for line in lines] == [50, 100, 120]
    rates = [1e-3 * min(step / 60, 1) * (1 - 0.5 * (step - 1) / 120) for step in (50, 100, 120)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    assert all(0 < line["loss"] < 10 for line in lines)
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_the_summary_says_how_the_model_was_made(tmp_path, monkeypatch):
    assert pretrained(tmp_path, monkeypatch, "--seed", "7") == 0
    folder = tmp_path / "m"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["config"]["seed"] == 7
    assert summary["config"]["model"]["hidden_size"] == 32
    assert (summary["steps"], summary["last"]) == (2, metrics_of(folder)[-1])
    assert [point["rule"].partition("(")[0] for point in summary["evaluations"]] == [
        "FixedSchedule",
        *["EntropyBounded"] * 5,
    ]
    assert all(point["done"] == 4 for point in summary["evaluations"])
    assert summary["provenance"]["command"].startswith("python -m diffpo.pretrain --task sudoku --steps 2")
    assert summary["provenance"]["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(summary)
    again = tmp_path / "again"
    assert pretrained(tmp_path, monkeypatch, "--start", str(folder), "--output", str(again)) == 0
    provenance = json.loads((again / "summary.json").read_text())["provenance"]
    assert provenance["model_revision"] == weights_digest(folder)
    assert diffpo.load(again).config == diffpo.load(folder).config


def test_an_interrupted_run_keeps_its_model_its_metrics_and_where_they_come_from(tmp_path, monkeypatch, capsys):
    loss, steps = elbo_loss, []

    def interrupted(*arguments):
        steps.append(None)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return loss(*arguments)

    monkeypatch.setattr(diffpo.pretrain, "elbo_loss", interrupted)
    assert pretrained(tmp_path, monkeypatch, "--steps", "60") == 0
    assert "interrupted after step 3 of 60; the model of that step is in" in capsys.readouterr().err
    assert diffpo.load(tmp_path / "m").config.hidden_size == 32
    assert [line["step"] for line in metrics_of(tmp_path / "m")] == [3]
    summary = json.loads((tmp_path / "m/summary.json").read_text())
    assert (summary["steps"], summary["evaluations"]) == (3, [])
    assert summary["provenance"]["versions"]["torch"] == torch.__version__


def test_a_line_that_does_not_fit_on_the_disk_loses_no_step(tmp_path, monkeypatch, capsys):
    def full(self, row):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLines, "write", full)
    assert pretrained(tmp_path, monkeypatch, "--steps", "60") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "stopped after step 50 of 60: No space left on device; the model of that step is in" in error
    assert diffpo.load(tmp_path / "m").config.hidden_size == 32


def test_weights_that_are_not_finite_are_not_written(tmp_path, monkeypatch, capsys):
    loss = elbo_loss

    def overflowing(model, *arguments):
        model.norm.weight.data[0] = math.inf  # after the last step, too
        return loss(model, *arguments).nan_to_num() * 0

    monkeypatch.setattr(diffpo.pretrain, "elbo_loss", overflowing)
    assert pretrained(tmp_path, monkeypatch) == 1
    assert "not finite" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["metrics.jsonl"]


def test_a_reader_that_leaves_stops_it_with_the_model_of_that_step(tmp_path, monkeypatch, capsys):
    class Leaving(io.StringIO):
        def write(self, text):
            if "step 100:" in text:
                raise BrokenPipeError
            return super().write(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Leaving())
        assert pretrained(tmp_path, monkeypatch, "--steps", "200") == 1
    assert capsys.readouterr().err == ""
    assert diffpo.load(tmp_path / "m").config.hidden_size == 32


def test_a_full_disk_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert pretrained(tmp_path, patch) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["metrics.jsonl"]
    first = metrics_of(tmp_path / "m")
    assert pretrained(tmp_path, monkeypatch) == 0, "the same command again, once there is room"
    assert len(metrics_of(tmp_path / "m")) == len(first)


@pytest.mark.parametrize(
    "mistake",
    [
        ("--heldout", "2000000000"),
        ("--lr", "inf"),
        ("--seed", "-1"),
        ("--output", "o" * 300),
        ("--batch-size", "9" * 12),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, monkeypatch, capsys, mistake):
    assert pretrained(tmp_path, monkeypatch, *mistake) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "m").exists()
