"""What each of two processes does in test_sharded.py: ``python sharded_processes.py FOLDER``, the rendezvous in FOLDER."""

import copy
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
from conftest import build_random_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from two_processes import both

import diffpo
from diffpo.config import ModelSize
from diffpo.models import saving
from diffpo.models.adapters import without_wrapper
from diffpo.models.checkpoints import read_weights, save_checkpoint
from diffpo.objectives import OBJECTIVES, Batch
from diffpo.pretrain import build_model
from diffpo.tasks import get_task
from diffpo.training import checkpointing
from diffpo.training.checkpointing import newest, restore
from diffpo.training.config import TrainConfig
from diffpo.training.trainer import Trainer
from diffpo.training.update import accumulate_gradient

PROMPTS = [torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9, 10, 11])]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def sharded(model, mesh, **options):
    for block in model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def decoded(model):
    rule = diffpo.PromptThreshold(sample=True)
    return diffpo.generate(model, PROMPTS, 6, 3, rule, temperature=0.8, seed=3).trajectory


def optimizer_of(model):
    """Made before any forward, as one does: after one the parameters of the root are whole."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def updated(model, optimizer, trajectory, tokens_at_once, name="diffpo"):
    """One step; the gradients before it, by name."""
    advantage = torch.tensor([1.0, -0.5])
    trained = ("model", "threshold") if name == "diffpo" else ("model",)
    objective = OBJECTIVES[name](OBJECTIVES[name].Config(kl_coefficient=0, train=trained, group_size=2))
    batch = Batch(trajectory, advantage, advantage)
    latents = objective.latents(batch, 0)
    signal = objective.signal(batch, None, None)
    accumulate_gradient(model, objective, batch, latents, signal, None, None, tokens_at_once)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return {n: whole(gradient) for n, gradient in gradients.items()}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(got, expected):
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], **CLOSE)


def weights(model):
    return {name: whole(tensor).clone() for name, tensor in model.state_dict().items()}


def assert_alike(model, plain, trajectory):
    """Decoded and scored alike, in either order of passes with and without a gradient."""
    got, expected = decoded(model), decoded(plain)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.gamma, expected.gamma)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for boundaries in ([0], [0, 2]):
                got = diffpo.trajectory_logprobs(model, trajectory, boundaries)
                torch.testing.assert_close(got, diffpo.trajectory_logprobs(plain, trajectory, boundaries), **CLOSE)
    torch.testing.assert_close(model.logits(PROMPTS[0][None]), plain.logits(PROMPTS[0][None]), **CLOSE)


def refused(*words):
    return pytest.raises(Exception, match=".*".join(words))


def check_full(mesh, folder, rank, options, changes):
    plain = build_random_model(1, threshold_gammas=(0.5, 2.0), **changes)
    model = sharded(copy.deepcopy(plain), mesh, **options)
    optimizer, plain_optimizer = optimizer_of(model), optimizer_of(plain)
    trajectory = decoded(plain)
    assert_alike(model, plain, trajectory)
    for name, tokens in (("diffpo", None), ("diffpo", 11), ("espo", 11)):
        decoded(model)  # after it, the root's weights are whole
        optimizer.zero_grad(), plain_optimizer.zero_grad()
        gradients = updated(model, optimizer, trajectory, tokens, name)
        assert_same(gradients, updated(plain, plain_optimizer, trajectory, tokens, name))
        assert_same(weights(model), weights(plain))
        assert_alike(model, plain, trajectory)
    with torch.no_grad():  # bit for bit: the same weights in both
        for name, tensor in model.state_dict().items():
            plain.state_dict()[name].copy_(whole(tensor))
    decoded(model)
    check_saved(model, plain, folder, rank)
    before = weights(model)
    updated(model, optimizer, trajectory, None)
    read_weights(model, folder / "sharded")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    with refused("add_threshold", "fully_shard"):
        model.add_threshold((0.1,))


def check_saved(model, plain, folder, rank):
    save_checkpoint(model, folder / "sharded")
    if rank == 0:
        plain.save(folder / "plain")
        for path in (folder / "plain").iterdir():
            assert (folder / "sharded" / path.name).read_bytes() == path.read_bytes(), path.name
    distributed.barrier()
    loaded = diffpo.load(folder / "sharded", "cpu").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in weights(plain).items())


def check_one_writer(mesh, folder, rank):
    """One process writes; its failure is everyone's."""
    model = sharded(build_random_model(1), mesh)
    written, original = [], saving.save_file

    def save_file(*arguments, **options):
        written.append(1)
        original(*arguments, **options)

    saving.save_file = save_file
    save_checkpoint(model, folder / "once")
    assert len(written) == (rank == 0)
    saving.save_file = lambda *a, **k: (_ for _ in ()).throw(OSError("the disk is full"))
    with refused("the disk is full" if rank == 0 else "process that writes"):
        save_checkpoint(model, folder / "never")
    saving.save_file = original
    assert not (folder / "never" / "config.json").exists()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with refused("not finite" if rank == 0 else "process that writes"):
        save_checkpoint(model, folder / "never")


def check_adapters(mesh, folder, rank, options):
    def build(base):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"], modules_to_save=["threshold"])
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        return wrapped

    plain = build(build_random_model(1, threshold_gammas=(0.5, 2.0)))
    model = copy.deepcopy(plain)
    sharded(model.get_base_model(), mesh, **options)
    optimizer, plain_optimizer = optimizer_of(model), optimizer_of(plain)
    trajectory = decoded(plain)
    assert_alike(model, plain, trajectory)
    for tokens in (None, 11):
        optimizer.zero_grad(), plain_optimizer.zero_grad()
        gradients = updated(model, optimizer, trajectory, tokens)
        assert all("lora_" in name or "modules_to_save" in name for name in gradients)
        assert len(gradients) > 8
        assert_same(gradients, updated(plain, plain_optimizer, trajectory, tokens))
        assert_alike(model, plain, trajectory)
    before = weights(model)
    save_checkpoint(model, folder / "adapted")
    assert_same(weights(model), before)
    loaded = diffpo.load(folder / "adapted", "cpu")
    assert_same(loaded.state_dict(), copy.deepcopy(plain).merge_and_unload().state_dict())
    assert isinstance(model.get_base_model(), FSDPModule)

    late = sharded(build_random_model(1), mesh)
    late = peft.get_peft_model(late, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with refused("not sharded", "lora_", "then call fully_shard"):
        updated(late, optimizer_of(late), trajectory, None)


def check_training(mesh, folder, rank, options, adapters):
    """A trainer with a KL does what one on the plain model does; its checkpoint is written once and goes on to the bit."""
    plain = trainer_of(adapters)
    model = trainer_of(adapters, lambda model: sharded(model, mesh, **options))
    got, expected = model.step(), plain.step()
    for name in ("reward", "loss", "kl", "gradient_norm"):
        assert got[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert got["denoiser_calls"] == expected["denoiser_calls"]
    assert got["kl"] > 0
    assert_same(weights(model.model), weights(plain.model))
    with counted(checkpointing, "write_checkpoint") as written:
        save(model, folder)
    assert len(written) == (rank == 0)
    assert [path.name for path in folder.iterdir()] == ["000001"]
    again = trainer_of(adapters, lambda model: sharded(model, mesh, **options))
    again.restore(restore(newest(folder, again.model), again.model, again.optimizer))
    apart = trainer_of(adapters)
    apart.restore(restore(newest(folder, apart.model), apart.model, apart.optimizer))
    numbers = ("reward", "loss", "kl", "gradient_norm", "denoiser_calls")
    got, resumed, elsewhere = model.step(), again.step(), apart.step()
    assert [got[name] for name in numbers] == [resumed[name] for name in numbers]
    assert elsewhere["loss"] == pytest.approx(got["loss"], rel=1e-3, abs=1e-5)
    expected = weights(model.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again.model).items())

    def full(*arguments):
        raise OSError("the disk is full")

    write, checkpointing.write_checkpoint = checkpointing.write_checkpoint, full
    with refused("the disk is full" if rank == 0 else "process that writes"):
        save(model, folder)
    checkpointing.write_checkpoint = write
    if rank == 0:
        model.model.norm.weight.data.to_local()[0] = torch.nan  # in one shard, and every process must know
    with pytest.raises(checkpointing.NotFiniteError, match="norm"):
        save(model, folder)
    distributed.barrier()
    assert [path.name for path in folder.iterdir()] == ["000001"]


def save(trainer, folder):
    checkpointing.save_state(folder, trainer.model, trainer.optimizer, trainer.state())


def trainer_of(adapters, shard=lambda model: model):
    task = get_task("sudoku")
    algorithm = {"name": "diffpo", "prompts_per_update": 2, "group_size": 4, "kl_coefficient": 0.5}
    config = TrainConfig(task="sudoku", updates=8, algorithm=algorithm, optimizer={"lr": 1e-2, "warmup_updates": 0})
    torch.manual_seed(0)
    model = build_model(
        task, ModelSize(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    )
    model.add_threshold(config.rollout.bins, config.rollout.threshold_order)
    model.eval()
    if adapters:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"])).eval()
        model.threshold.requires_grad_(True)
    shard(without_wrapper(model))
    return Trainer(config, model, task)


@contextmanager
def counted(module, name):
    """The calls of a function of a module."""
    calls, function = [], getattr(module, name)

    def count(*arguments):
        calls.append(arguments)
        return function(*arguments)

    setattr(module, name, count)
    yield calls
    setattr(module, name, function)


def check(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    check_full(mesh, folder / "apart", rank, {"reshard_after_forward": True}, {"logit_shift": True})
    check_full(mesh, folder / "tied", rank, {}, {"tie_word_embeddings": True})
    check_one_writer(mesh, folder / "in line", rank)
    copies = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copy", "shard"))
    check_one_writer(copies, folder / "copies", rank)  # each process holds everything, and still one writes
    check_adapters(
        mesh, folder, rank, {"reshard_after_forward": True}
    )  # so decoding finds shards in the head's adapter
    check_training(mesh, folder / "training", rank, {"reshard_after_forward": True}, adapters=False)
    check_training(mesh, folder / "training-lora", rank, {}, adapters=True)


if __name__ == "__main__":
    both(check)
