"""Two processes of ``diffpo.train``, started as torchrun starts them, and a fault in one: all end alike, nothing hangs, a resume ends in the same bits."""

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
from forked_processes import Ended, ended_processes

import diffpo.train
from diffpo.objectives.diffpo import Diffpo
from diffpo.runs.run_folder import RunFolder
from diffpo.tasks.sudoku import Sudoku
from diffpo.training import checkpointing
from diffpo.training.sharded_checkpoints import ShardedSaver
from diffpo.training.trainer import Trainer

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]
REPLICATED, SHARDED, ADAPTERS = (), ("--distributed.shard",), ("--lora.rank", "2")
each_way = pytest.mark.parametrize("way", [REPLICATED, SHARDED], ids=["replicated", "sharded"])


@pytest.fixture
def processes(tmp_path):
    """processes(act) -> `Ended` of two processes that each return what act(rank) does."""
    return lambda act: ended_processes(tmp_path, act, 2)


@pytest.fixture
def train_in_two(tmp_path, train, whole_run):
    """train_in_two(*more flags, fault=f) -> `Ended`: of `train` in two processes; f(rank) is called in each before it starts."""
    whole_run()  # in this process, so that what it imports need not be imported in each of those that are forked

    def run(*more: str, fault=lambda rank: None, size: int = 2) -> Ended:
        return ended_processes(tmp_path, lambda rank: fault(rank) or train(*more), size)

    return run


@pytest.fixture(scope="session")
def uninterrupted(train_into, whole_run, tmp_path_factory):
    """uninterrupted(*flags) -> the folder of a run of two processes that nothing stops: to compare with, not to change."""

    @functools.cache
    def run(*more: str) -> Path:
        whole_run()
        runs = tmp_path_factory.mktemp("whole_in_two")
        assert ended_processes(runs, lambda rank: train_into(runs, *more), 2).codes == [0, 0]
        return runs / "run"

    return run


def in_update(number: int, act, rank: int = 1):
    """A fault that does ``act`` in one process, in the middle of an update: the rollouts are there, no gradient is."""

    def arm(own: int) -> None:
        optimise = Trainer._optimise

        def faulty(self, batch):
            if self.update == number - 1:
                act()
            return optimise(self, batch)

        if own == rank:
            Trainer._optimise = faulty

    return arm


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("way", [REPLICATED, SHARDED, ADAPTERS], ids=["replicated", "sharded", "adapters"])
def test_a_killed_process_ends_all_and_a_resume_ends_in_the_same_bits(
    train_in_two, uninterrupted, assert_same_weights, metrics_of, tmp_path, way
):
    if way == ADAPTERS:
        pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    ended = train_in_two(*way, fault=in_update(3, kill))
    assert ended.codes == [1, -signal.SIGKILL]
    assert "stopped after update 2: another process has ended" in ended.said
    assert "Traceback" not in ended.said
    ended = train_in_two(*way, "--resume")
    assert ended.codes == [0, 0]
    assert "resuming after update 2" in ended.said or (way == SHARDED and "resuming after update 1" in ended.said)
    whole = uninterrupted(*way)
    assert_same_weights(tmp_path / "run/model", whole / "model")
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


@each_way
def test_a_signal_to_one_process_saves_in_all(train_in_two, uninterrupted, assert_same_weights, tmp_path, way):
    def terminate():
        signal.raise_signal(signal.SIGTERM)

    ended = train_in_two(*way, "--save-every", "100", fault=in_update(2, terminate))
    assert ended.codes == [0, 0]
    assert "interrupted after update 2; continue with --resume" in ended.said
    assert ended[1][1:] == ("", ""), "the second process prints"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["000002"]
    assert train_in_two(*way, "--resume").codes == [0, 0]
    assert_same_weights(tmp_path / "run/model", uninterrupted(*way) / "model")


@each_way
def test_nan_in_one_process_is_skipped_by_all(train_in_two, metrics_of, tmp_path, way):
    def poison(rank):
        loss, calls = Diffpo.loss, []

        def poisoned(self, *arguments):
            calls.append(1)
            result = loss(self, *arguments)
            return result._replace(value=result.value * math.nan) if len(calls) == 1 else result

        if rank == 1:
            Diffpo.loss = poisoned

    ended = train_in_two(*way, "--algorithm.inner-updates", "1", "--updates", "3", fault=poison)
    assert ended.codes == [0, 0]
    assert [line["skipped_updates"] for line in metrics_of(tmp_path / "run")] == [1, 1, 1]
    diffpo.load(tmp_path / "run/model")


def test_nan_three_times_in_a_row_stops_all(train_in_two, tmp_path):
    def poison(rank):
        if rank == 1:
            loss = Diffpo.loss
            Diffpo.loss = lambda *given: (lost := loss(*given))._replace(value=lost.value * math.nan)

    ended = train_in_two("--updates", "8", fault=poison)
    assert ended.codes == [1, 1]
    assert "3 updates in a row were not finite" in ended.said
    assert ended[1][1:] == ("", "")


def full_in_update_3(rank):
    """The checkpoint of update 3 fails where its tensors are written, in one process, as on a full disk."""
    write, shards, begin = checkpointing.save_file, safetensors.torch.save, ShardedSaver._begin
    full = set()

    def limited(tensors, path):
        if "000003" in str(path):
            raise OSError(28, "No space left on device")
        write(tensors, path)

    def limited_shards(*arguments, **options):
        if full:
            raise OSError(28, "No space left on device")
        return shards(*arguments, **options)

    def begun(self, folder, tensors, config, state):
        full.clear()
        full.update({rank} if (state["update"], rank) == (3, 1) else ())
        return begin(self, folder, tensors, config, state)

    checkpointing.save_file, safetensors.torch.save, ShardedSaver._begin = limited, limited_shards, begun


@each_way
def test_a_full_disk_costs_one_checkpoint(train_in_two, tmp_path, way):
    ended = train_in_two(*way, fault=full_in_update_3)
    assert ended.codes == [0, 0]
    assert ended.said.count("checkpoint not saved, training goes on") == 1
    assert "No space left on device" in ended.said
    left = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert left == ["000002", "000004"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [truncate, Path.unlink], ids=["truncated", "missing"])
def test_a_damaged_shard_gives_way_to_the_checkpoint_before(
    train_in_two, uninterrupted, assert_same_weights, tmp_path, damage
):
    shutil.copytree(uninterrupted(*SHARDED), tmp_path / "run")
    damage(next((tmp_path / "run/checkpoints/000004").glob("shard-00002-*")))
    ended = train_in_two(*SHARDED, "--resume")
    assert ended.codes == [0, 0]
    assert "resuming after update 3" in ended.said
    assert_same_weights(tmp_path / "run/model", uninterrupted(*SHARDED) / "model")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["two to one", "one to two"])
def test_another_number_of_processes_goes_on(train_in_two, metrics_of, tmp_path, before, after):
    """Not to the bit: sums are rounded otherwise. What one process has saved is spread over two, and shards are put together."""
    assert set(train_in_two(*SHARDED, "--updates", "2", size=before).codes) == {0}
    ended = train_in_two(*SHARDED, "--updates", "3", "--resume", "--allow-config-change", size=after)
    assert set(ended.codes) == {0}, ended
    assert "resuming after update 2" in ended.said
    assert [line["update"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]
    diffpo.load(tmp_path / "run/model")


def test_a_second_run_in_the_folder_is_refused_by_all(train_in_two, tmp_path):
    assert train_in_two("--updates", "1").codes == [0, 0]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    held = RunFolder(tmp_path / "run", "train", {}, {}, overwrite=True)
    ended = train_in_two("--updates", "1", "--overwrite")
    assert ended.codes == [2, 2]
    assert "is in use by another run" in ended[0][2]
    assert ended[0][2].count("\n") == 1
    assert ended[1][1:] == ("", "")
    held.release()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_what_a_task_does_wrong_in_one_process_ends_all(train_in_two, tmp_path):
    def wrong(rank):
        if rank == 1:
            Sudoku.grade = lambda self, problem, text: "right"

    ended = train_in_two("--guard.every", "0", fault=wrong)
    assert ended.codes == [1, 1]
    assert ended.said.splitlines()[-1].startswith("stopped after update 0: process 1: task sudoku: grade must return")
    assert ended[1][1:] == ("", "")


@each_way
def test_an_error_of_the_program_in_one_process_ends_all(train_in_two, tmp_path, way):
    ended = train_in_two(*way, fault=in_update(2, lambda: 1 / 0))
    assert ended.codes == [1, 1]
    told = "another process has ended" if way else "process 1: ZeroDivisionError: division by zero"
    assert f"stopped after update 1: {told}" in ended.said
    assert "in faulty" in ended[1][2], "where it happened"
    assert "Traceback" not in ended.said


def test_a_mistake_is_told_once_and_ends_all(train_in_two, tmp_path):
    for mistake, told in (
        (("--model", "no-such-model"), "neither a folder nor a shipped model"),
        (("--updtes", "3"), "unknown flag --updtes"),
        (("--algorithm.prompts-per-update", "many"), "prompts-per-update"),
    ):
        ended = train_in_two(*mistake)
        assert ended.codes == [2, 2]
        assert told in ended.said
        assert ended.said.count("\n") == 1
        assert ended[1][1:] == ("", "")
    assert not (tmp_path / "run").exists()


def test_what_is_missing_on_one_machine_is_told_by_the_first(processes, flags, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("updates = 1\n")

    def start(rank):
        return diffpo.train.main([str(config if rank == 0 else tmp_path / "d.toml"), *flags])

    ended = processes(start)
    assert ended.codes == [2, 2]
    assert "process 1: error: config file" in ended.said


def test_a_dry_run_and_help_print_once(train_in_two):
    ended = train_in_two("--dry-run")
    assert ended.codes == [0, 0]
    assert json.loads(ended[0][1])["updates"] == 4
    assert ended[1][1:] == ("", "")
    ended = train_in_two("--help")
    assert ended.codes == [0, 0]
    assert "--distributed.shard" in ended[0][1]
    assert ended[1][1:] == ("", "")


def test_a_restart_goes_on_with_what_the_same_start_began(train_in_two, monkeypatch, tmp_path):
    """torchrun repeats the same command line, which may say --overwrite."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert train_in_two("--overwrite", fault=in_update(3, kill)).codes[0] == 1
    ended = train_in_two("--overwrite")
    assert ended.codes == [0, 0]
    assert "resuming after update 2" in ended.said
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    ended = train_in_two()
    assert ended.codes == [2, 2]
    assert "is already used" in ended.said


def test_what_comes_to_different_points_ends(processes):
    """A mistake in the program: no process waits for the other's answer to another question."""
    from diffpo.training.distributed import joined

    def meet(rank):
        with joined() as world, contextlib.suppress(IndexError):
            world.gather(b"") if rank else world.any(True)
        return 0

    ended = processes(meet)
    assert ended.codes == [1, 1]
    assert "not at the same point: process 0 at any, process 1 at gather" in ended[0][2]


# The command with a short report. Of the first start the second process is killed in update 3.
COMMAND = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import diffpo.train
from diffpo.decoding.rules import EntropyBounded
from diffpo.training.trainer import Trainer
diffpo.train.parallel_rules = lambda task: [EntropyBounded(0.5)]
diffpo.train.draw_curves = lambda *figure: None
optimise = Trainer._optimise

def faulty(self, batch):
    if self.update == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return optimise(self, batch)

Trainer._optimise = faulty
sys.exit(diffpo.train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again(flags, uninterrupted, tmp_path, assert_same_weights, metrics_of):
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", *torchrun, str(script), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "stopped after update 2: another process has ended" in done.stderr
    assert "resuming after update 2" in done.stdout
    whole = uninterrupted()
    assert_same_weights(tmp_path / "run/model", whole / "model")
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
