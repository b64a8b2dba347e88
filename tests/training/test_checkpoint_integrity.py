"""A checkpoint is what was saved, to the bit, and finite; anything else gives way to the one before, or is refused in one line."""

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffpo
from diffpo.training.checkpointing import MANIFEST, NotFiniteError, checkpoints, newest, restore, save_state
from diffpo.training.trainer import Trainer


@pytest.fixture(scope="module")
def saved_once(sudoku_model, tmp_path_factory) -> Path:
    """Checkpoints of updates 1 and 2."""
    from diffpo.models.checkpoints import load
    from diffpo.tasks import get_task
    from diffpo.training.config import TrainConfig

    small = {"prompts_per_update": 4, "group_size": 4}
    trainer = Trainer(TrainConfig(task="sudoku", algorithm=small), load(sudoku_model), get_task("sudoku"))
    folder = tmp_path_factory.mktemp("saved")
    for _ in range(2):
        trainer.step()
        save_state(folder, trainer.model, trainer.optimizer, trainer.state())
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    shutil.copytree(saved_once, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def flip_a_bit(path: Path, seed: int) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << (seed % 8)
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", MANIFEST])
def test_a_flipped_bit_is_noticed(make_trainer, saved, name, seed):
    flip_a_bit(saved / "000002" / name, seed)
    fresh = make_trainer()
    with pytest.warns(UserWarning, match="000002 is not readable"):
        state = restore(newest(saved, fresh.model), fresh.model, fresh.optimizer)
    assert state["update"] == 1
    assert torch.equal(fresh.model.lm_head.weight, diffpo.load(saved / "000001").lm_head.weight)


def rewritten(name: str, change):
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(change(values)))

    return damage


def emptied_optimizer(folder: Path) -> None:
    save_file({}, folder / "optimizer.safetensors")


def doubled_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, folder / "model.safetensors")


def linked(folder: Path) -> None:
    shutil.move(folder / "state.json", folder.parent / "aside")
    (folder / "state.json").symlink_to(folder.parent / "aside")


def renamed(folder: Path) -> None:
    shutil.copytree(folder.parent / "000001", folder, dirs_exist_ok=True)


DAMAGES = {
    "empty optimizer": emptied_optimizer,
    "other weights": doubled_weight,
    "state of another update": rewritten("state.json", lambda state: state | {"update": 7}),
    "state with a string": rewritten("state.json", lambda state: state | {"skipped": "3"}),
    "state without a key": rewritten("state.json", lambda state: {"update": state["update"]}),
    "state that is a list": rewritten("state.json", lambda state: [state]),
    "empty state": lambda folder: (folder / "state.json").write_text(""),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "empty manifest": rewritten(MANIFEST, lambda files: {}),
    "manifest that is a list": rewritten(MANIFEST, sorted),
    "manifest that leaves out the state": rewritten(MANIFEST, lambda files: {k: files[k] for k in files if "state" not in k}),
    "manifest that leads outside": rewritten(MANIFEST, lambda files: files | {"../000001/state.json": "0" * 64}),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a link": linked,
    "another update's files": renamed,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_damage_gives_way_to_the_checkpoint_before(make_trainer, saved, damage):
    damage(saved / "000002")
    fresh = make_trainer()
    with pytest.warns(UserWarning, match="000002 is not readable"):
        assert restore(newest(saved, fresh.model), fresh.model, fresh.optimizer)["update"] == 1


def test_a_command_without_an_undamaged_checkpoint_says_so_in_one_line(train, finished_run, tmp_path, capsys):
    finished_run()
    config = (tmp_path / "run/config.json").read_text()
    for path in checkpoints(tmp_path / "run/checkpoints"):
        flip_a_bit(path / "optimizer.safetensors", 5)
    with pytest.warns(UserWarning, match="not readable"), pytest.raises(SystemExit) as stopped:
        train("--resume")
    assert stopped.value.code == 2
    assert "none of the checkpoints in" in capsys.readouterr().err
    assert (tmp_path / "run/config.json").read_text() == config


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("999999", "1000000", "000007", "12", "0000x1"):
        (tmp_path / name).mkdir()
    (tmp_path / "2000000").symlink_to(tmp_path / "000007")
    assert [path.name for path in checkpoints(tmp_path)] == ["1000000", "999999", "000007"]


# Only finite ones


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "threshold", "optimizer"])
def test_what_is_not_finite_is_not_saved(make_trainer, tmp_path, where, value):
    trainer = make_trainer()
    trainer.step()
    save_state(tmp_path, trainer.model, trainer.optimizer, trainer.state())
    trainer.step()
    parameter = (
        trainer.model.threshold.linear.bias if where == "threshold" else trainer.model.layers[0].mlp.up_proj.weight
    )
    target = trainer.optimizer.state[parameter]["exp_avg"] if where == "optimizer" else parameter.data
    target.view(-1)[0] = value
    with pytest.raises(NotFiniteError):
        save_state(tmp_path, trainer.model, trainer.optimizer, trainer.state())
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "000001/model.safetensors").values())


@pytest.mark.parametrize("update", [1, 3])
def test_a_run_whose_weights_stop_being_finite_keeps_the_last_that_were(train, monkeypatch, tmp_path, capsys, update):
    step = Trainer.step

    def overflowing(self):
        metrics = step(self)
        if self.update == update:
            self.model.norm.weight.data[3] = math.inf
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", overflowing)
        assert train() == 1
    output = capsys.readouterr().err
    found = checkpoints(tmp_path / "run/checkpoints")
    if update == 1:
        assert found == []
        assert "there is no checkpoint" in output
    else:
        assert found[0].name == "000002"
        assert "the last good weights are in" in output
        assert all(t.isfinite().all() for t in load_file(found[0] / "model.safetensors").values())
    assert not (tmp_path / "run/model").exists()
    assert train("--resume") == 0


def test_a_rate_that_overflows_the_weights_leaves_finite_ones(train, tmp_path):
    assert train("--optimizer.lr", "1e30", "--optimizer.warmup-updates", "0", "--algorithm.inner-updates", "1") == 1
    for path in checkpoints(tmp_path / "run/checkpoints"):
        for name in ("model", "optimizer"):
            assert all(tensor.isfinite().all() for tensor in load_file(path / f"{name}.safetensors").values())


# Only its own


def test_what_others_put_beside_the_checkpoints_stays(make_trainer, tmp_path):
    trainer = make_trainer()
    theirs = [tmp_path / name for name in ("20240101/notes.txt", "20240102/model.safetensors", "000001/plot.pdf")]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
    theirs[0].write_text("mine"), theirs[1].write_text("mine")
    save_state(tmp_path, trainer.model, trainer.optimizer, {"update": 2})
    theirs[2].parent.rmdir()
    save_state(tmp_path, trainer.model, trainer.optimizer, {"update": 1})
    theirs[2].write_text("mine")
    for update in (3, 4, 5):
        save_state(tmp_path, trainer.model, trainer.optimizer, {"update": update})
    assert all(path.read_text() == "mine" for path in theirs)
    assert [path.name for path in (tmp_path / "000001").iterdir()] == ["plot.pdf"]
    assert {path.name for path in tmp_path.iterdir()} == {"20240101", "20240102", "000001", "000004", "000005"}


def test_a_checkpoint_is_not_replaced_where_others_put_a_file(make_trainer, tmp_path):
    trainer = make_trainer()
    save_state(tmp_path, trainer.model, trainer.optimizer, {"update": 1})
    (tmp_path / "000001/plot.pdf").write_text("mine")
    with pytest.raises(OSError, match="000001 holds what no run wrote"):
        save_state(tmp_path, trainer.model, trainer.optimizer, {"update": 1})
    assert (tmp_path / "000001/plot.pdf").read_text() == "mine"
