"""Who may write to a run's folder. A refusal has exit code 2, names the field, and changes nothing."""

import fcntl
import json
import os

import pytest
import torch


@pytest.fixture
def refused(train, capsys):
    """refused(*flags) -> the message of a run that ended with exit code 2."""

    def check(*more: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            train(*more)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return captured.out + captured.err

    return check


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_used_folder_is_refused_and_untouched(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("four years of work")
    before = contents(tmp_path / "run")
    message = refused()
    assert "already used" in message
    assert "--resume" in message
    assert contents(tmp_path / "run") == before


def test_an_empty_folder_is_fine_and_overwrite_starts_afresh(train, metrics_of, tmp_path):
    (tmp_path / "run").mkdir()
    assert train("--updates", "2") == 0
    assert train("--updates", "1", "--overwrite", "--seed", "1") == 0
    assert len(metrics_of(tmp_path / "run")) == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["000001"]
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_a_folder_in_use_is_refused(finished_run, refused, tmp_path, how):
    finished_run("--updates", "1")
    before = contents(tmp_path / "run/checkpoints")
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another run" in refused("--updates", "1", how)
    assert contents(tmp_path / "run/checkpoints") == before


def test_a_folder_below_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "output folder" in refused("--runs", str(tmp_path / "file"))


def test_a_file_in_place_of_the_folder_is_refused(refused, tmp_path):
    (tmp_path / "run").write_text("")
    assert "output folder" in refused()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "not writable" in refused("--runs", str(tmp_path / "locked"))


def test_resume_without_a_run_is_refused_and_creates_nothing(refused, tmp_path):
    assert "resume" in refused("--resume")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--seed", "7"), "seed: 0 -> 7"),
        (("--algorithm.clip", "0.33"), "algorithm.clip: "),
        (("--rollout.threshold-gammas", "0.0", "1.0"), "rollout.threshold_gammas"),
        (("--updates", "9"), "updates: 4 -> 9"),
    ],
)
def test_resume_with_a_changed_configuration_names_the_field(finished_run, refused, tmp_path, change, named):
    finished_run()
    message = refused("--resume", *change)
    assert named in message
    assert "--allow-config-change" in message
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_a_change_can_be_allowed_and_some_fields_are_free(train, metrics_of, tmp_path):
    assert train("--updates", "2") == 0
    assert train("--updates", "2", "--resume", "--save-every", "2", "--max-minutes", "5") == 0
    assert train("--updates", "3", "--resume", "--allow-config-change") == 0
    assert [line["update"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (("--task", "sudku"), "'sudoku'"),
        (("--algorithm.name", "difpo"), "diffpo"),
        (("--model", "tiny-countdwn"), "'tiny-countdwn'"),
        (("--algorithm.clop", "0.3"), "--algorithm.clip"),
        (("--algorithm.train", "modle"), "model"),
        (("--algorithm.clip", "-1"), "clip"),
        (("--rollout.gamma", "nan"), "gamma"),
        (("--updates", "many"), "updates"),
        (("--heldout", "100000000"), "heldout"),
        (("--task", "countdown"), "task"),  # the model's vocabulary is sudoku's
        (("--resume", "--overwrite"), "overwrite"),
        pytest.param(
            ("--device", "cuda"), "device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
        (("--name", "."), "name"),  # --overwrite would delete every run
    ],
)
def test_a_mistake_is_named_and_creates_nothing(refused, tmp_path, mistake, named):
    assert named in refused(*mistake)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_resolved_configuration_and_creates_nothing(train, tmp_path, capsys):
    assert train("--dry-run", "--algorithm.name", "d1", "--algorithm.clip", "0.3") == 0
    algorithm = json.loads(capsys.readouterr().out)["algorithm"]
    assert (algorithm["name"], algorithm["clip"], algorithm["inner_updates"]) == ("d1", 0.3, 12)
    assert list(tmp_path.iterdir()) == []
