"""Configuration: which source wins, and that every mistake ends with exit code 2 and names its field."""

import pytest

from diffpo.config import PretrainConfig, nearest, parse
from diffpo.training.config import TrainConfig, parse_train


@pytest.fixture
def toml(tmp_path):
    """toml(text) -> path of a config file."""

    def write(text: str) -> str:
        path = tmp_path / "x.toml"
        path.write_text(text)
        return str(path)

    return write


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


def test_without_arguments_the_defaults_hold():
    assert train_config() == TrainConfig()
    assert parse(PretrainConfig, []) == PretrainConfig()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("updats = 3", "'updats'; nearest: updates"),
        ("[algorithm]\nclop = 1", "'algorithm.clop'; nearest: clip"),
        ("[optimiser]\nlr = 1", "'optimiser'; nearest: optimizer"),
        ('updates = "many"', "updates"),
        ("updates = 0", "updates"),
        ("[algorithm]\nclip = nan", "algorithm.clip"),
        ('[algorithm]\ntrain = ["modle"]', "algorithm.train.0"),
        ('[algorithm]\nname = "d1"\nm = 2', "'algorithm.m'"),
        ('[algorithm]\nname = "d1"\ntrain = ["threshold"]', "algorithm.train.0"),
        ("[algorithm]\ntrain = []", "algorithm.train"),
        ("[rollout]\ngamma = 1.0", "rollout.gamma: the threshold is learned"),
        ('[rollout]\nrule = "fixed"', "rollout.rule: a threshold is trained on rollouts that use it"),
        ('[algorithm]\nname = "espo"\n[rollout]\nthreshold_gammas = [1.0]', "rollout.threshold_gammas: no threshold"),
        ('[algorithm]\nname = "d1"\n[rollout]\np = 0.5', "p: is a setting of rule confidence"),
        ('[algorithm]\nname = "dffpo"', "algorithm.name: unknown algorithm 'dffpo'; nearest: diffpo"),
        ("[algorithm]\nname = 3", "algorithm.name"),
        ('rollout = 3\n[algorithm]\nname = "d1"', "rollout: must be a table, got 3"),
        ("[algorithm]\ngroup_size = 1", "algorithm.group_size"),
        ("[rollout]\nthreshold_gammas = [0.0, -1.0]", "rollout.threshold_gammas.1"),
        ("algorithm = 3", "algorithm"),
        ("updates = = 3", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_names_its_field(toml, capsys, text, named):
    with pytest.raises(SystemExit) as stopped:
        train_config(toml(text))
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_several_mistakes_are_all_reported(toml, capsys):
    with pytest.raises(SystemExit):
        train_config(toml("updates = -1\nheldout = -1\n"))
    message = capsys.readouterr().err
    assert "updates" in message
    assert "heldout" in message


def test_a_missing_file_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_config("no/such.toml")
    assert stopped.value.code == 2
    assert "no/such.toml: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--algorithm.clop", "1"], ["--updates", "x"], ["--updates", "-1"], ["--seed"]])
def test_a_mistake_in_a_flag_has_exit_code_2(flags):
    with pytest.raises(SystemExit) as stopped:
        train_config(*flags)
    assert stopped.value.code == 2


def test_a_configuration_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().seed = 3


def test_nearest_lists_the_closest_first():
    assert nearest("grup_size", ["clip", "group_size", "m"])[0] == "group_size"
