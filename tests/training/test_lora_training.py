"""``--lora.rank``: what is refused before a weight is read, and a run that trains adapters."""

import importlib.util
import json
import sys

import pytest
import torch

from diffpo.models import checkpoints
from diffpo.models.checkpoints import load, open_checkpoint
from diffpo.tasks import get_task
from diffpo.training.config import TrainConfig
from diffpo.training.model_setup import compute_dtype, loaded
from diffpo.training.trainer import Trainer

pytest.importorskip("peft", reason="needs the extra diffpo[lora]")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (
            ("--lora.rank", "2", "--lora.targets", "q_proj", "upp_proj"),
            "lora.targets: 'upp_proj' matches no linear layer",
        ),
        (("--lora.rank", "1000"), "lora.rank: 1000 is more than 32"),
        (("--lora.rank", "0"), "rank"),
        (("--lora.alpha", "8"), "lora: alpha: there are no adapters: give lora.rank"),
        (("--lora.targets", "q_proj"), "lora: targets: there are no adapters: give lora.rank"),
        (("--lora.rank", "2", "--algorithm.train", "threshold"), "lora.rank: no model is trained"),
        (("--lora.rang", "2"), "--lora.rank"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_named_before_a_weight_is_read(train, tmp_path, capsys, monkeypatch, mistake, said):
    monkeypatch.setattr(checkpoints, "copy_tensors", lambda *_: pytest.fail("weights were read"))
    try:
        code = train(*mistake)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_peft_a_run_without_adapters_works(train, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it is an ImportError
    with pytest.raises(SystemExit, match="2"):
        train("--updates", "1", "--lora.rank", "2")
    assert "pip install 'diffpo[lora]'" in capsys.readouterr().err
    assert train("--updates", "1", "--no-sweep") == 0


@pytest.fixture
def trainer_of(sudoku_model):
    """trainer_of(**settings of TrainConfig) -> a Trainer on the sudoku model stored as ``stored``."""

    def build(tmp_path, stored=torch.float32, train=("model", "threshold"), **settings) -> Trainer:
        folder = tmp_path / str(stored)
        if not folder.exists():
            load(sudoku_model, dtype=stored).save(folder)
        algorithm = {"prompts_per_update": 4, "group_size": 4, "train": train}
        optimizer = {"warmup_updates": 0} | ({"lr": 1e-2} if "model" in train else {})
        config = TrainConfig(task="sudoku", updates=4, algorithm=algorithm, optimizer=optimizer, **settings)
        return Trainer(config, loaded(config, open_checkpoint(folder), torch.device("cpu")), get_task("sudoku"))

    return build


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora", [{}, {"rank": 4}], ids=["all", "lora"])
@pytest.mark.parametrize("train", [("model", "threshold"), ("model",), ("threshold",)], ids=str)
def test_what_is_trained_is_fp32_and_the_rest_as_stored(trainer_of, tmp_path, stored, lora, train):
    if lora and "model" not in train:
        pytest.skip("refused")
    trainer = trainer_of(tmp_path, stored, train, lora=lora)
    model = trainer.model
    assert model.dtype == stored
    assert model(torch.arange(7)[None]).dtype == stored
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {stored}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert trainer.step()["updated"]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_B" in name or ("q_proj" in name and not lora) for name in moved) == ("model" in train)
    assert all(p.grad is None for p in model.parameters()), "rollouts would share the memory with them"


def test_a_bf16_model_learns_small_steps(trainer_of, tmp_path):
    """The same updates at a tiny learning rate: bf16 weights would stay where they are."""
    trainer = trainer_of(tmp_path, torch.bfloat16, ("model",))
    for group in trainer.optimizer.param_groups:
        group["base_lr"] = 1e-6
    weight = trainer.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    trainer.step()
    moved = (weight - before).abs()
    assert 0 < moved.max() < 1e-5
    assert (weight.bfloat16() == before.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [("auto", "bfloat16", "bfloat16"), ("auto", "float32", "float32"), ("auto", "float16", "bfloat16"),
     ("float32", "bfloat16", "float32"), ("bfloat16", "float32", "bfloat16")],
)  # fmt: skip
def test_the_dtype_of_the_arithmetic(asked, stored, expected):
    assert compute_dtype(TrainConfig(dtype=asked), getattr(torch, stored)) == getattr(torch, expected)


def test_a_run_with_adapters_goes_through_the_command(train, tmp_path):
    assert train("--lora.rank", "2", "--updates", "2", "--update.activation-checkpointing", "--no-sweep") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lora"]["rank"] == 2


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
SHORT = ("--lora.rank", "2", "--updates", "2", "--no-sweep", "--optimizer.lr", "0.01")


@pytest.mark.parametrize(
    ("asked", "small", "expected"),
    [("auto", 10**9, "model.safetensors"), ("auto", 10, ADAPTER[1]), ("adapter", 10**9, ADAPTER[1]), ("merged", 10, "model.safetensors")],
)  # fmt: skip
def test_what_a_run_leaves_as_its_model(train, tmp_path, monkeypatch, asked, small, expected):
    monkeypatch.setattr("diffpo.training.export._SMALL", small)
    assert train(*SHORT, "--export", asked) == 0
    model = tmp_path / "run" / "model"
    assert (model / expected).exists()
    assert (model / ADAPTER[1]).exists() != (model / "model.safetensors").exists()
    loaded, checkpoint = load(model), load(next((tmp_path / "run" / "checkpoints").glob("*2")))
    for name, tensor in checkpoint.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert loaded.threshold is not None
    assert train(*SHORT, "--overwrite") == 0, "the adapter's files are the run's own"


def test_a_stopped_run_goes_on_to_the_bit_from_its_adapter(train, whole_run, tmp_path, metrics_of):
    whole = whole_run(*SHORT[:2], *SHORT[4:], "--updates", "4")
    assert train(*SHORT[:2], *SHORT[4:], "--updates", "4", "--max-minutes", "1e-9") == 0
    found = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert not any((path / "model.safetensors").exists() for path in found)
    assert train(*SHORT[:2], *SHORT[4:], "--updates", "4", "--resume") == 0
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    first, second = (load(run / "model").state_dict() for run in (whole, tmp_path / "run"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_is_not_resumed_on_other_weights(train, finished_run, tmp_path, sudoku_model, capsys):
    """The difference of the files may be allowed; the adapter is of no use there."""
    finished_run(*SHORT)
    other = load(sudoku_model)
    with torch.no_grad():
        other.norm.weight.mul_(1.5)
    other.save(tmp_path / "other")
    for more in ((), ("--allow-config-change",)):
        with pytest.raises(SystemExit, match="2"):
            train(*SHORT, "--updates", "3", "--resume", "--model", str(tmp_path / "other"), *more)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: resume: ")
        assert ("adapter for other weights" in line) == bool(more)


def test_a_run_begins_from_an_adapter(train, finished_run, tmp_path, sudoku_model):
    """Its folder is the model; what it changes is compared on a resume as well."""
    first = finished_run(*SHORT, "--export", "adapter")
    runs = ("--runs", str(tmp_path / "next"), "--model", str(first / "model"))
    assert train(*SHORT, *runs) == 0
    marker = json.loads((tmp_path / "next" / "run" / ".diffpo-run").read_text())
    assert marker["inputs"].keys() == {"model", "tokenizer", "base"}
    loaded, start = load(tmp_path / "next" / "run" / "model"), load(first / "model")
    assert not torch.equal(loaded.layers[0].mlp.up_proj.weight, start.layers[0].mlp.up_proj.weight)


def test_export_without_adapters_is_refused(train, capsys):
    with pytest.raises(SystemExit, match="2"):
        train("--export", "adapter")
    assert "export: there is no adapter: give lora.rank" in capsys.readouterr().err
