"""The estimate of memory is what an update and a rollout take; what cannot fit is refused with what to change."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_update_memory import batch_of, peak_bytes

import diffpo
from diffpo import MaskedDiffusionLM, ModelConfig
from diffpo.memory_limit import _limits_of_control_groups, memory_limit
from diffpo.models.lora import add_lora
from diffpo.objectives import OBJECTIVES
from diffpo.tasks.task import Lengths
from diffpo.training import plan
from diffpo.training.config import TrainConfig
from diffpo.training.memory_estimate import Estimate, estimate_memory
from diffpo.training.model_setup import adapted_layers, keep_in_fp32
from diffpo.training.plan import check_memory
from diffpo.training.update import accumulate_gradient

LENGTH, PROMPT = 48, 4
SHAPES = {
    "wide": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "deep": {"hidden_size": 96, "intermediate_size": 512, "num_hidden_layers": 7, "num_attention_heads": 8, "num_key_value_heads": 2},
}  # fmt: skip


def empty_model(dtype=torch.float32, **changes) -> MaskedDiffusionLM:
    fields = {"vocab_size": 1500, "max_position_embeddings": 128, "mask_token_id": 2} | SHAPES["wide"] | changes
    with torch.device("meta"):
        return MaskedDiffusionLM(ModelConfig(**fields)).to(dtype)


def config_of(lora=None, checkpointing=False, tokens_at_once=None, **others) -> TrainConfig:
    algorithm = {"name": "d1", "prompts_per_update": 8, "group_size": 4, "kl_coefficient": 0}
    update = {"activation_checkpointing": checkpointing, "tokens_at_once": tokens_at_once}
    return TrainConfig(algorithm=algorithm, lora={"rank": lora}, update=update, heldout=1, **others)


def filled(model: MaskedDiffusionLM, config: TrainConfig) -> MaskedDiffusionLM:
    """The same model with memory, as a run trains it."""
    torch.manual_seed(0)
    full = MaskedDiffusionLM(model.config).to(model.dtype)
    if config.lora.rank:
        add_lora(full, adapted_layers(config, model), config.lora.rank, config.lora.rank, 0)
    keep_in_fp32(full, [p for p in full.parameters() if p.requires_grad])
    full.recompute_activations(config.update.activation_checkpointing)
    return full


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, 8], ids=["all", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tokens_at_once", [None, 4 * (LENGTH + PROMPT)], ids=["at once", "in parts"])
def test_an_update_takes_what_was_estimated(monkeypatch, shape, dtype, lora, checkpointing, tokens_at_once):
    """Within 15%, of all tensors that it makes, at the peak."""
    if lora:
        pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    monkeypatch.setattr("test_update_memory.LENGTH", LENGTH)
    config, empty = config_of(lora, checkpointing, tokens_at_once), empty_model(dtype, **SHAPES[shape])
    estimate, model = estimate_memory(config, empty, PROMPT, Lengths(LENGTH, LENGTH)), filled(empty, config)
    objective, batch = OBJECTIVES["d1"](config.algorithm), batch_of(32, 1500)
    batch.trajectory.actions.clear()
    latents = objective.latents(batch, 0)
    peak = peak_bytes(
        lambda: accumulate_gradient(model, objective, batch, latents, batch.advantage, None, None, tokens_at_once)
    )
    copies = estimate.weights - sum(p.nbytes for p in model.parameters())
    assert estimate.update + copies == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("lora", [None, 8], ids=["all", "lora"])
@pytest.mark.parametrize(("block", "dtype"), [(4, torch.float32), (LENGTH, torch.bfloat16)], ids=str)
def test_rollouts_take_what_was_estimated(lora, block, dtype):
    if lora:
        pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    config, empty = config_of(lora), empty_model(dtype)
    estimate, model = estimate_memory(config, empty, PROMPT, Lengths(LENGTH, block)), filled(empty, config)
    prompts = [torch.arange(3, 3 + PROMPT) + i for i in range(8) for _ in range(4)]
    rule = diffpo.FixedSchedule(2 * LENGTH // block)
    peak = peak_bytes(lambda: diffpo.generate(model, prompts, LENGTH, block, rule, 1.0, 0))
    assert estimate.rollouts == pytest.approx(peak, rel=0.15)


def test_a_whole_step_takes_what_was_estimated(tmp_path):
    """The resident memory of a process of its own, from before the model is loaded to the highest point: 60 M parameters in bf16, LoRA."""
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    program = Path(__file__).parent / "resident_memory.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["estimate"] == pytest.approx(found["measured"], rel=0.15), found


def llada_8b(dtype=torch.bfloat16) -> MaskedDiffusionLM:
    return empty_model(dtype, vocab_size=126_464, hidden_size=4096, intermediate_size=12_288, num_hidden_layers=32,
                       num_attention_heads=32, max_position_embeddings=4096, model_type="llada")  # fmt: skip


def estimated(world_size=1, sharding="replicated", device="cuda", **settings) -> Estimate:
    algorithm = {"name": "d1", "prompts_per_update": 8, "group_size": 8, "kl_coefficient": 0.01}
    config = TrainConfig(algorithm=algorithm, **settings)
    return estimate_memory(config, llada_8b(), 256, Lengths(256, 32), device, world_size, sharding)


def test_llada_8b():
    """16.0 GB in bf16, 2.62 M parameters of adapters for each of the rank, 16 bytes for each that is trained."""
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    update = {"tokens_at_once": 4096, "activation_checkpointing": True}
    lora = estimated(lora={"rank": 128}, update=update)
    own = 2_621_440 * 128
    assert lora.optimizer == 8 * own
    assert lora.gradients == 4 * own
    assert lora.weights == pytest.approx(16.03e9 + 4 * own, rel=0.01)
    assert lora.reference == 0
    assert 24e9 < lora.peak < 32e9
    whole = estimated(update=update)
    assert whole.weights + whole.gradients + whole.optimizer == pytest.approx(16 * 8.015e9, rel=0.01)
    assert whole.reference == pytest.approx(4 * 8.015e9, rel=0.01)


def test_what_makes_it_smaller():
    update = {"tokens_at_once": 4096}
    plain = estimated(update=update)
    assert estimated(update=update | {"activation_checkpointing": True}).activations < 0.15 * plain.activations
    assert estimated(update={"tokens_at_once": 1024}).activations == pytest.approx(plain.activations / 4)
    eighth = estimated(8, "full", update=update)
    for name in ("gradients", "optimizer", "reference"):
        assert getattr(eighth, name) == pytest.approx(getattr(plain, name) / 8, rel=1e-6)
    assert eighth.weights < plain.weights / 3
    assert estimated(8).activations < plain.activations * 40, "a share of the prompts"
    assert estimated(8, update=update).optimizer == plain.optimizer


ROWS = {  # of docs/large-models.md: the settings of each row, and how many processes share the weights
    "LoRA, rank 8": ({"lora": 8}, 1),
    "LoRA, rank 64": ({"lora": 64}, 1),
    "LoRA, rank 128": ({"lora": 128}, 1),
    "LoRA, rank 64, parts of 16,384 tokens": ({"lora": 64, "tokens": 16_384}, 1),
    "LoRA, rank 64, without checkpointing": ({"lora": 64, "checkpointing": False}, 1),
    "all weights, one process": ({}, 1),
    "all weights, sharded over 2": ({}, 2),
    "all weights, sharded over 4": ({}, 4),
    "all weights, sharded over 8": ({}, 8),
    "all weights, sharded over 8, without a KL": ({"kl": 0}, 8),
}


def in_the_documentation(lora=None, tokens=4096, checkpointing=True, kl=0.01, processes=1) -> Estimate:
    config = TrainConfig(
        algorithm={"train": ("model",), "prompts_per_update": 8, "group_size": 8, "kl_coefficient": kl},
        lora={"rank": lora}, update={"tokens_at_once": tokens, "activation_checkpointing": checkpointing},
    )  # fmt: skip
    return estimate_memory(config, llada_8b(), 256, Lengths(256, 32), "cuda", processes, "full")


def test_the_tables_of_the_documentation_are_what_is_computed():
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    text = (Path(__file__).parents[2] / "docs" / "large-models.md").read_text()
    table = text.partition("<!-- what-fits -->")[2].partition("<!-- /what-fits -->")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert {name: peak for name, peak, _ in cells} == {
        name: f"{in_the_documentation(**settings, processes=count).peak / 1e9:.1f}"
        for name, (settings, count) in ROWS.items()
    }
    for name, peak, card in cells:
        assert card == "none" or float(peak) < int(card.split()[0]) * 1.073741824, name
    assert in_the_documentation(lora=64).table() in text


def test_the_table_names_every_part():
    table = estimated(update={"tokens_at_once": 4096}).table()
    for name in ("weights", "gradients", "optimizer", "reference", "activations", "logits", "rollouts", "peak"):
        assert name in table
    assert len(table.splitlines()) <= 12


def small(peak: int) -> Estimate:
    values = dict.fromkeys((field.name for field in fields(Estimate)), 0)
    return Estimate(**values | {"weights": peak, "parts": False})


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, ["--lora.rank 64", "--algorithm.kl-coefficient 0", "--update.activation-checkpointing"]),
        ({"lora": {"rank": 64}}, ["--update.tokens-at-once", "--update.activation-checkpointing"]),
        ({"lora": {"rank": 64}, "update": {"activation_checkpointing": True}}, ["--update.tokens-at-once"]),
        ({"lora": {"rank": 64}, "dtype": "float32", "update": {"tokens_at_once": 512}}, ["--dtype bfloat16"]),
    ],
    ids=str,
)
def test_what_cannot_fit_is_refused_with_advice(monkeypatch, settings, advice):
    config = TrainConfig(algorithm={"name": "d1", "prompts_per_update": 8, "group_size": 8}, **settings)
    estimate = estimated(**settings)
    monkeypatch.setattr(plan, "memory_limit", lambda device: 10**10)
    with pytest.raises(ValueError, match=r"^memory: the run needs about .* GB and the machine has 10 GB") as refused:
        check_memory(config, estimate, torch.device("cpu"), torch.bfloat16)
    assert all(flag in str(refused.value) for flag in [*advice, "--allow-large"])
    assert ("--lora.rank" in str(refused.value)) == ("lora" not in settings)
    check_memory(config.model_copy(update={"allow_large": True}), estimate, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(plan, "memory_limit", lambda device: 10**13)
    check_memory(config, estimate, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(plan, "memory_limit", lambda device: None)
    check_memory(config, estimate, torch.device("cpu"), torch.bfloat16)


def test_the_command_refuses_before_it_loads(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffpo.models.checkpoints.copy_tensors", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(plan, "memory_limit", lambda device: 10**6)
    with pytest.raises(SystemExit, match="2"):
        train()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory: the run needs about")
    assert list(tmp_path.iterdir()) == []
    assert train("--dry-run") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["updates"] == 4
    assert "peak" in shown.err
    assert "too large for this machine" in shown.err


def test_a_dry_run_refuses_a_target_that_is_none(train, capsys):
    with pytest.raises(SystemExit) as stopped:
        train("--dry-run", "--lora.rank", "2", "--lora.targets", "upp_proj")
    assert stopped.value.code == 2
    assert "lora.targets: 'upp_proj' matches no linear layer" in capsys.readouterr().err


def test_a_dry_run_without_the_model_says_that_there_is_no_estimate(train, capsys):
    assert train("--dry-run", "--model", "nobody/no-model") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == "nobody/no-model"
    assert shown.err.startswith("no estimate of memory: model 'nobody/no-model'")


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": "4096", "a/b/memory.max": "8192"}, [4096, 8192]),
        ("0::/gone\n", {"memory.max": "77"}, [77]),  # a container sees its own group as the root
        ("4:memory:/x\n0::/\n", {"memory/memory.limit_in_bytes": "9", "memory/x/memory.limit_in_bytes": "5"}, [5, 9]),
        ("1:cpu:/x\n", {"memory/memory.limit_in_bytes": "9"}, []),
        ("", {}, []),
    ],
)
def test_limits_of_control_groups(tmp_path, own, files, expected):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert sorted(_limits_of_control_groups(tmp_path / "root", tmp_path / "own")) == expected
    assert list(_limits_of_control_groups(tmp_path, tmp_path / "none")) == []


def test_this_machine_has_a_limit():
    assert memory_limit(torch.device("cpu")) > 2**28
    assert memory_limit(torch.device("meta")) is None
