"""Training with adapters of peft: what is trained, what the KL is taken to, and a run that goes on from its checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

import diffpo
from diffpo.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from diffpo.models.adapters import replacement
from diffpo.models.checkpoints import load
from diffpo.models.threshold_file import THRESHOLD
from diffpo.tasks import get_task
from diffpo.training import checkpointing
from diffpo.training.checkpointing import MANIFEST, OPTIMIZER, STATE, TRAINED, newest, restore, save_state
from diffpo.training.config import TrainConfig
from diffpo.training.trainer import Trainer

peft = pytest.importorskip("peft", reason="needs the extra diffpo[lora]")

SETTINGS = {
    "lora": {"target_modules": ["q_proj", "up_proj", "lm_head"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained threshold": {"target_modules": ["q_proj"], "modules_to_save": ["threshold"]},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
}


@pytest.fixture
def make_adapted(sudoku_model):
    """make_adapted(settings of LoraConfig or None) -> Trainer on the sudoku model with such adapters, or on the plain model."""

    def build(settings, train=("model", "threshold"), rank=2) -> Trainer:
        algorithm = {"name": "diffpo", "prompts_per_update": 4, "group_size": 4, "inner_updates": 3, "train": train}
        optimizer: dict[str, float] = {"warmup_updates": 0}
        if "model" in train:
            algorithm["kl_coefficient"], optimizer["lr"] = 0.5, 1e-2
        config = TrainConfig(task="sudoku", updates=8, algorithm=algorithm, optimizer=optimizer)
        model = load(sudoku_model)
        if "threshold" in train:
            model.add_threshold(config.rollout.bins, config.rollout.threshold_order)
        if settings is not None:
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(r=rank, **settings)).eval()
        return Trainer(config, model, get_task("sudoku"))

    return build


def save(trainer: Trainer, folder) -> None:
    save_state(folder, trainer.model, trainer.optimizer, trainer.state())


def resumed(trainer: Trainer, folder) -> Trainer:
    trainer.restore(restore(newest(folder, trainer.model), trainer.model, trainer.optimizer))
    return trainer


def state(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_only_the_adapters_and_the_threshold_are_trained(make_adapted, settings):
    trainer = make_adapted(settings)
    before = state(trainer.model)
    trainer.step()
    changed = {name for name, tensor in state(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert any("lora_A" in name for name in changed)
    assert any("threshold" in name for name in changed)
    assert all("lora_" in name or "modules_to_save" in name or name.startswith("threshold.linear") for name in changed)


@pytest.mark.parametrize("settings", [None, *SETTINGS.values()], ids=["none", *SETTINGS.keys()])
def test_the_reference_is_the_model_as_it_came(make_adapted, sudoku_model, settings):
    """Its scores never change, and are the starting model's; the model is what it was, to the bit, when they are taken."""
    trainer, start = make_adapted(settings), load(sudoku_model)
    start.add_threshold(trainer.config.rollout.bins, trainer.config.rollout.threshold_order)
    tokens = torch.arange(7)[None]
    for _ in range(2):
        trainer.step()
        before, trained = state(trainer.model), trainer.model.logits(tokens)
        with trainer.reference.in_place():
            assert torch.equal(trainer.model.logits(tokens), start.logits(tokens))
        assert torch.equal(trainer.model.logits(tokens), trained)
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
        assert not torch.allclose(trained, start.logits(tokens), atol=1e-4)
    with pytest.raises(RuntimeError, match="on the way"), trainer.reference.in_place():
        raise RuntimeError("on the way")
    assert torch.equal(trainer.model.logits(tokens), trained)


def test_adapters_are_not_copied_and_other_trained_weights_are(make_adapted):
    """With bias="all" the biases are trained, and switching the adapters off leaves them on."""
    assert make_adapted(SETTINGS["lora"]).reference._apart == []
    trainer = make_adapted(SETTINGS["lora"])
    norm = trainer.model.norm.weight.requires_grad_(True)  # as bias="all" does with what a model has of them
    trainer = Trainer(trainer.config, trainer.model, trainer.task)
    before = norm.detach().clone()
    trainer.step()
    assert not torch.equal(norm, before)
    with trainer.reference.in_place():
        assert torch.equal(norm, before)


def test_frozen_adapters_stay_frozen(make_adapted):
    trainer = make_adapted(SETTINGS["lora"], train=("threshold",))
    assert trainer.reference is None
    before = state(trainer.model)
    trainer.step()
    changed = {name for name, tensor in state(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert changed == {"threshold.linear.weight", "threshold.linear.bias"}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_resumed_run_goes_on_to_the_bit(make_adapted, settings, tmp_path):
    trainer = make_adapted(settings)
    trainer.step()
    save(trainer, tmp_path)
    again = resumed(make_adapted(settings), tmp_path)
    numbers = [{k: v for k, v in one.step().items() if not k.startswith("seconds/")} for one in (trainer, again)]
    assert numbers[0] == numbers[1]
    got, expected = state(again.model), state(trainer.model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_checkpoint_with_adapters_is_the_model_with_them_merged(make_adapted, settings, tmp_path):
    """Plain LoRA is kept without its base, others in whole weights and, as it was, what was trained."""
    trainer = make_adapted(settings)
    trainer.step()
    save(trainer, tmp_path)
    tokens = torch.arange(7)[None]
    loaded = diffpo.load(tmp_path / "000001")
    torch.testing.assert_close(loaded.logits(tokens), trainer.model.logits(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded.threshold.linear.weight, replacement(trainer.model.threshold).linear.weight)
    files = {path.name for path in (tmp_path / "000001").iterdir()}
    if settings is SETTINGS["lora"]:
        assert files == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, THRESHOLD, OPTIMIZER, STATE, MANIFEST}
    else:
        assert {"model.safetensors", "config.json", TRAINED} < files
        names = load_file(tmp_path / "000001" / TRAINED).keys()
        assert names == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def test_a_checkpoint_of_the_earlier_form_goes_on_to_the_bit(make_adapted, tmp_path, monkeypatch):
    """Until now plain LoRA too was kept in whole weights beside what was trained."""
    trainer = make_adapted(SETTINGS["lora"])
    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "is_an_adapter", lambda model: False)
        save(trainer, tmp_path)
    assert (tmp_path / "000001" / TRAINED).exists()
    again = resumed(make_adapted(SETTINGS["lora"]), tmp_path)
    assert again.step()["loss"] == trainer.step()["loss"]
    got, expected = state(again.model), state(trainer.model)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("saved", "now"),
    [("lora", None), (None, "lora"), ("lora", "trained head")],
    ids=["now none", "none before", "others"],
)
def test_another_models_adapters_are_refused_and_nothing_is_changed(make_adapted, tmp_path, saved, now):
    trainer = make_adapted(SETTINGS.get(saved))
    trainer.step()
    save(trainer, tmp_path)
    other = make_adapted(SETTINGS.get(now))
    before = state(other.model)
    with pytest.raises(ValueError, match=r"resume: .*000001 is of a model with other adapters"):
        resumed(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())
    assert not other.optimizer.state


def test_adapters_of_another_rank_are_refused(make_adapted, tmp_path):
    trainer = make_adapted(SETTINGS["lora"])
    trainer.step()
    save(trainer, tmp_path)
    with pytest.raises(ValueError, match="other adapters"):
        resumed(make_adapted(SETTINGS["lora"], rank=4), tmp_path)


def test_a_model_without_anything_to_train_is_refused(make_adapted):
    trainer = make_adapted(None)
    trainer.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"algorithm\.train: the model has no parameter"):
        Trainer(trainer.config, trainer.model, trainer.task)
