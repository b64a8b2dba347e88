"""Configuration: which source wins, what a setting is called, and what is checked together."""

import json

import pytest

from diffpo.config import PretrainConfig, nearest, parse
from diffpo.evaluate import EvaluateConfig
from diffpo.objectives import OBJECTIVES
from diffpo.train import main as train
from diffpo.train import run_folder
from diffpo.training.config import TrainConfig, parse_train


def train_config(*arguments: str) -> TrainConfig:
    return parse_train(list(arguments))


def test_later_sources_win(toml):
    path = toml('seed = 3\n[algorithm]\nname = "d1"\nclip = 0.4\ninner_updates = 5\n')
    config = train_config(path, "--algorithm.inner-updates", "6", "--optimizer.lr", "1e-3")
    assert config.seed == 3
    assert config.algorithm.group_size == 6  # d1's own
    assert config.algorithm.clip == 0.4  # the file's
    assert config.algorithm.inner_updates == 6  # the flag's
    assert config.optimizer.lr == 1e-3
    assert config.rollout == TrainConfig().rollout.model_copy(update={"speed_exponent": 0.0})  # d1's own


def test_the_algorithm_of_a_flag_brings_its_defaults_below_the_file(toml):
    path = toml("[algorithm]\nclip = 0.4\n")
    for flag in (["--algorithm.name", "d1"], ["--algorithm.name=d1"]):
        algorithm = train_config(path, *flag).algorithm
        assert (algorithm.name, algorithm.train, algorithm.clip) == ("d1", ("model",), 0.4)


@pytest.mark.parametrize(
    "settings", ['heldout = 5\n[rollout]\nproxy = "margin"\n', '[rollout]\nrule = "eb"\nproxy = "margin"\n']
)
def test_order_by_its_old_name(toml, capsys, settings):
    """In a file, a flag, and the JSON of an earlier run; also where a flag makes the file's settings fit together."""
    assert train_config(toml(settings), "--algorithm.train", "model").rollout.order == "margin"
    assert train_config("--rollout.proxy", "margin").rollout.order == "margin"
    assert train_config("--rollout.proxy=margin") == TrainConfig(rollout={"proxy": "margin"})
    assert (
        train_config(toml(settings), "--algorithm.train", "model", "--rollout.order", "entropy").rollout.order
        == "entropy"
    )
    assert EvaluateConfig(proxy="margin") == parse(EvaluateConfig, ["--proxy", "margin"])
    assert "proxy" not in TrainConfig().rollout.model_dump()
    with pytest.raises(SystemExit):
        train_config(toml('[rollout]\nproxy = "margin"\norder = "margin"\n'))
    assert "proxy is now called order" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_config("--rollout.proxy", "entropie")
    assert "rollout.order" in capsys.readouterr().err


def test_without_arguments_the_defaults_hold():
    assert train_config() == TrainConfig()
    assert parse(PretrainConfig, []) == PretrainConfig()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((), "diffpo-countdown"),
        (("--task", "medley"), "diffpo-medley"),
        (("--algorithm.name", "espo", "--task", "sudoku"), "espo-sudoku"),
        (("--task", "medley", "--name", "mine"), "mine"),
    ],
)
def test_a_run_is_named_after_algorithm_and_task_unless_it_has_a_name(capsys, arguments, name):
    assert train_config(*arguments).run_name == name
    assert train(["--dry-run", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == name


def test_an_unnamed_run_has_the_folder_of_its_task_and_goes_on_there(tmp_path):
    arguments = ("--task", "medley", "--runs", str(tmp_path))
    for resume in ((), ("--resume",), ("--resume", "--name", "diffpo-medley")):
        folder = run_folder(train_config(*arguments, *resume), {})
        folder.begin()
        folder.release()
        assert folder.resumes == bool(resume)
        assert json.loads((tmp_path / "diffpo-medley/config.json").read_text())["name"] == "diffpo-medley"


def test_the_name_in_a_file_is_kept_and_its_task_named(toml):
    assert train_config(toml('name = "mine"\n'), "--task", "medley").run_name == "mine"
    assert train_config(toml('task = "medley"\n'), "--algorithm.name", "d1").run_name == "d1-medley"


def test_a_configuration_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().seed = 3


def test_nearest_lists_the_closest_first():
    assert nearest("grup_size", ["clip", "group_size", "m"])[0] == "group_size"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfseed = 3\n",
        b"\xef\xbb\xbf# a comment\r\nseed = 3\r\n",
    ],
    ids=["BOM", "BOM and CRLF"],
)
def test_a_byte_order_mark_is_read_over(tmp_path, content):
    (tmp_path / "x.toml").write_bytes(content)
    assert train_config(str(tmp_path / "x.toml")).seed == 3


def test_bounds_that_may_be_infinite(toml):
    config = train_config(
        toml(
            'max_minutes = inf\n[algorithm]\ntrain = ["model"]\nclip = inf\nweight_cap = inf\n[rollout]\ngamma = inf\n'
        )
    )
    assert config.algorithm.weight_cap == config.algorithm.clip == config.rollout.gamma == float("inf")
    written = json.loads(config.model_dump_json(), parse_constant=pytest.fail)
    assert TrainConfig(**written) == config


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_rollouts_of_an_algorithm_are_its_own_from_python_too(name):
    config = TrainConfig(algorithm={"name": name})
    assert config == TrainConfig(algorithm=OBJECTIVES[name].Config()) == train_config("--algorithm.name", name)
    assert {key: getattr(config.rollout, key) for key in OBJECTIVES[name].rollout} == OBJECTIVES[name].rollout
    assert TrainConfig(algorithm={"name": name}, rollout={"temperature": 0.5}).rollout.temperature == 0.5


def test_what_is_trained_has_no_order(toml):
    """Or a run could not go on because its two words were written the other way round."""
    assert train_config(toml('[algorithm]\ntrain = ["threshold", "model"]')).algorithm.train == ("model", "threshold")


def test_settings_are_checked_together_after_the_flags(toml, capsys):
    """Each of file and flags alone would be wrong."""
    assert parse(EvaluateConfig, [toml('rule = "factor"\n'), "--factor", "2"]).factor == 2
    assert parse(EvaluateConfig, [toml("gamma = 0.5\n"), "--rule", "eb"]).gamma == 0.5
    assert (
        parse(
            EvaluateConfig, [toml("cache_refresh = 4\ngamma = inf\nlimit = 3\n"), "--cache", "prefix", "--rule=eb"]
        ).limit
        == 3
    )
    with pytest.raises(SystemExit):
        parse(EvaluateConfig, [toml('rule = "eb"\ngamma = 0.5\n'), "--rule", "confidence"])
    assert "gamma: is a setting of rule eb" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(EvaluateConfig, [toml('rule = "factor"\nlimt = 3\n'), "--factor", "2"])
    assert "unknown key 'limt'; nearest: limit" in capsys.readouterr().err


def test_help_still_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_config("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "updates between checkpoints" in text
    assert "what is trained: the model, the threshold policy, or both" in text
