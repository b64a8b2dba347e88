"""Every mistake in a configuration ends with exit code 2 and one line that names its field, before anything is loaded."""

import io
import sys

import pytest

from diffpo.config import PretrainConfig, parse
from diffpo.training.config import parse_train


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
        (
            '[algorithm]\nmode = "sampler"',
            'error: unknown key \'algorithm.mode\': it is now algorithm.train, ["model", "threshold"] for "joint"',
        ),
        ('[algorithm]\nname = "d1"\nmode = "model"', "unknown key 'algorithm.mode': it is now algorithm.train"),
        ("[rollout]\ngamma = 1.0", "rollout.gamma: the threshold is learned"),
        ('[rollout]\nrule = "fixed"', "rollout.rule: a threshold is trained on rollouts that use it"),
        ('[algorithm]\nname = "espo"\n[rollout]\nthreshold_gammas = [1.0]', "rollout.threshold_gammas: no threshold"),
        (
            '[algorithm]\nname = "d1"\n[optimizer]\nthreshold_lr = 0.1',
            "optimizer.threshold_lr: no threshold is trained",
        ),
        (
            '[algorithm]\nname = "d1"\n[rollout]\nthreshold_exploration = 0.1',
            "rollout.threshold_exploration: no threshold is trained",
        ),
        (
            '[algorithm]\ntrain = ["model"]\n[rollout]\nthreshold_exploration = 0.1',
            "rollout.threshold_exploration: no threshold",
        ),
        (
            '[algorithm]\ntrain = ["model"]\n[rollout]\nthreshold_reads = "both"',
            "rollout.threshold_reads: no threshold",
        ),
        (
            '[algorithm]\ntrain = ["model"]\nthreshold_advantage = "mean"',
            "threshold_advantage: no threshold is trained",
        ),
        ("[rollout]\nthreshold_exploration = 1.1", "rollout.threshold_exploration"),
        ("[rollout]\nthreshold_exploration = nan", "rollout.threshold_exploration"),
        (
            '[algorithm]\nimportance_weights = "none"\n[rollout]\nthreshold_exploration = 0.1',
            "rollout.threshold_exploration: what is drawn uniformly must be weighed by its probability: set algorithm.importance_weights to token",
        ),
        (
            "[algorithm]\nweight_cap = 1.05\n[rollout]\nthreshold_exploration = 0.1",
            "rollout.threshold_exploration: at 0.1 a threshold's weight is up to 1.08, and algorithm.weight_cap 1.05 would cut it",
        ),
        (
            "[rollout]\nthreshold_exploration = 0.6\nthreshold_gammas = [0.1, 0.2, 0.3, 1.0, 2.0, 3.0, 4.0]",
            "weight is up to 2.06, and algorithm.weight_cap 2 would cut it",
        ),
        ("[guard]\nevery = -1", "guard.every"),
        ("[guard]\nproblems = 0", "guard.problems"),
        ("[guard]\ntolerance = 1.0", "guard.tolerance"),
        ('[algorithm]\ntrain = ["threshold"]\n[optimizer]\nlr = 0.1', "optimizer.lr: no model is trained"),
        ('[algorithm]\ntrain = ["threshold"]\nm = 3', "m: is of the model, which is not trained: add model to"),
        ('[algorithm]\ntrain = ["threshold"]\nkl_coefficient = 0.5', "kl_coefficient: is of the model"),
        ('[algorithm]\ntrain = ["model", "model"]', "train: each part stands there once"),
        (
            '[algorithm]\nname = "tracerl"\nfresh_latents = true',
            "fresh_latents: nothing about this algorithm's latents",
        ),
        ("[algorithm]\nm = 1\nfresh_latents = true", "fresh_latents: nothing about the latents is random"),
        ('[algorithm]\ntrain = ["threshold"]\nfresh_latents = true', "fresh_latents: nothing about the latents"),
        (
            '[algorithm]\nimportance_weights = "none"\nweight_cap = 3.0',
            "weight_cap: there are no weights to cap: set importance_weights to token, quarter or sequence",
        ),
        (
            '[algorithm]\ntrain = ["threshold"]\nimportance_weights = "quarter"',
            "importance_weights: quarter pools tokens of the model, which is not trained",
        ),
        ('[algorithm]\nimportance_weights = "group"', "algorithm.importance_weights: Input should be 'none', 'token'"),
        (
            "[algorithm]\nimportance_correction = false",
            "unknown key 'algorithm.importance_correction': it is now algorithm.importance_weights, \"token\" for true",
        ),
        (
            '[algorithm]\nname = "d1"\nimportance_weights = "token"',
            "unknown key 'algorithm.importance_weights'",
        ),
        ('[algorithm]\nname = "d1"\n[rollout]\np = 0.5', "p: is a setting of rule confidence"),
        ('[algorithm]\nname = "dffpo"', "algorithm.name: unknown algorithm 'dffpo'; nearest: diffpo"),
        ("[algorithm]\nname = 3", "algorithm.name"),
        ('rollout = 3\n[algorithm]\nname = "d1"', "rollout: must be a table, got 3"),
        ("[algorithm]\ngroup_size = 1", "algorithm.group_size"),
        ("[rollout]\nthreshold_gammas = [0.0, -1.0]", "rollout.threshold_gammas.1"),
        ("algorithm = 3", "algorithm"),
        ("update = 3", "error: update: must be a table, got 3\n"),
        (
            "[rollout]\nthreshold_gammas = [1.0, 2.0, 1.0]",
            "rollout.threshold_gammas: each bin stands there once, got [1.0, 2.0, 1.0]",
        ),
        (
            '[rollout]\nthreshold_gammas = ["a"]',
            "error: rollout.threshold_gammas.0: Input should be a valid number, unable to parse string as a number, got 'a'\n",
        ),
        ("[rollout]\nthreshold_gammas = []", "rollout.threshold_gammas: Tuple should have at least 1 item"),
        (
            '[algorithm]\ntrain = ["model"]\n[rollout]\nsteps = 3',
            "error: rollout: steps: is a setting of rule fixed, the rule is auto: set rule to fixed, or leave steps out\n",
        ),
        (
            '[algorithm]\ntrain = ["model"]\n[rollout]\nrule = "factor"',
            "error: rollout: factor: must be given for rule factor, for instance 1\n",
        ),
        ("updates = = 3", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_names_its_field(toml, capsys, text, named):
    with pytest.raises(SystemExit) as stopped:
        parse_train([toml(text)])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["importance-correction", "no-importance-correction", "importance_correction"])
def test_the_switch_that_importance_weights_replaced_is_named(capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        parse_train([f"--algorithm.{flag}"])
    assert stopped.value.code == 2
    assert f"unknown flag --algorithm.{flag}: it is now algorithm.importance_weights" in capsys.readouterr().err


def test_several_mistakes_are_all_reported(toml, capsys):
    with pytest.raises(SystemExit):
        parse_train([toml("updates = -1\nheldout = -1\n")])
    message = capsys.readouterr().err
    assert "updates" in message
    assert "heldout" in message


def test_a_missing_file_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(["no/such.toml"])
    assert stopped.value.code == 2
    assert "no/such.toml: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--algorithm.clop", "1"], ["--updates", "x"], ["--updates", "-1"], ["--seed"]])
def test_a_mistake_in_a_flag_has_exit_code_2(flags):
    with pytest.raises(SystemExit) as stopped:
        parse_train(list(flags))
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"seed = 99999999999999999999", "seed: an integer of at most 64 bits"),
        (b"seed = 9223372036854775808", "seed"),
        (b"[algorithm]\nm = -99999999999999999999", "algorithm.m"),
        (b"seed = 0x" + b"f" * 6000, "seed"),
        (b"seed = " + b"9" * 6000, "not valid TOML"),
        (b"updates = true", "updates: true and false are no values"),
        (b"name = 3", "name"),
        (b"updates = 2026-01-01", "updates"),
        (b"updates = [[[]]]", "updates"),
        (b"algorithm = [{}]", "algorithm: must be a table"),
        (b"seed = 1\nseed = 2", "not valid TOML"),
        (b"seed = 1\n[algorithm]\nm = 1\n[algorithm]\nm = 2", "not valid TOML"),
        (b"seed = " + b"[" * 100_000, "not valid TOML"),
        (b"seed = " + b"{a=" * 5_000, "not valid TOML"),
        (b"\xff\xfes\x00e\x00", "UTF-16"),
        (b"\x00", "NUL byte"),
        (b"#" * 2_000_000, "longer than"),
        (b"a." * 50_000 + b"a = 1", "a key of more than 32 parts"),
        (b"['a' . " + b'"b". ' * 50_000 + b"c]", "a key of more than 32 parts"),
        (b"\n".join(b"k%d = 1" % i for i in range(2000)), "and 1995 more"),
        (b"[rollout]\nthreshold_gammas = [1.0, true]", "rollout.threshold_gammas: true and false are no values"),
        (b'runs = "a\\u0000b"', "runs"),
        (b'name = "' + b"n" * 300 + b'"', "name: String should have at most 255"),
        (b"[optimizer]\nlr = inf", "optimizer.lr: "),
        (b"[optimizer]\nlr = nan", "optimizer.lr"),
        (b"[optimizer]\nlr = 0", "optimizer.lr"),
        (b"[optimizer]\nlr = 1e300", "optimizer.lr"),
        (b"[optimizer]\nweight_decay = inf", "optimizer.weight_decay"),
        (b"[optimizer]\nthreshold_lr = -1e-3", "optimizer.threshold_lr"),
        (b"[rollout]\ntemperature = 1e-30", "rollout.temperature"),
        (b"[rollout]\ntemperature = inf", "rollout.temperature"),
        (b"[rollout]\nspeed_exponent = 1e999", "rollout.speed_exponent"),
        (b"[rollout]\nthreshold_gammas = []", "rollout.threshold_gammas"),
        (b"[rollout]\nthreshold_gammas = [nan]", "rollout.threshold_gammas"),
        (b"[algorithm]\nkl_coefficient = inf", "algorithm.kl_coefficient"),
        (b"[algorithm]\nprompts_per_update = 1000000000000", "algorithm.prompts_per_update"),
        (b"[algorithm]\ngroup_size = 100000000", "algorithm.group_size"),
        (b"heldout = 4294967296", "heldout"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, capsys, content, named):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        parse_train([str(tmp_path / "x.toml")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert len(error) < 500


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--seed", "99999999999999999999"], "seed"),
        (["--seed", "9" * 5000], "--seed"),
        (["--updates", "0"], "updates"),
        (["--updates", "1e3"], "--updates"),
        (["--optimizer.lr", "inf"], "optimizer.lr"),
        (["--optimizer.lr=nan"], "optimizer.lr"),
        (["--rollout.temperature", "1e-30"], "rollout.temperature"),
        (["--max-minutes", "soon"], "--max-minutes"),
        (["--name", "n" * 300], "name"),
        (["--name", "../other"], "name"),
        (["--algorithm.clop", "1"], "--algorithm.clip"),
        (["--algorithm.name"], "--algorithm.name"),
        (["--algorithm.train", "modle"], "--algorithm.train"),
        (["--algorithm.mode", "joint"], "--algorithm.mode: it is now algorithm.train"),
        (["--algorithm.mode=sampler"], '["threshold"] for "sampler"'),
        (["--algorithm.group-size", "-3", "--updates", "-1"], "algorithm.group_size"),
        (["--no-swep"], "unknown flag --no-swep; nearest: --sweep"),
        (["--algorithm.name", "d1", "--algorithm.m", "1"], "unknown flag --algorithm.m; nearest: --algorithm.name"),
        (["--algorithm.name", "d1", "--algorithm.m", "1"], "; see python -m diffpo.train --algorithm.name d1 --help\n"),
        (
            ["--algorithm.name", "espo", "--algorithm.train", "threshold"],
            "invalid choice 'threshold' for argument '--algorithm.train'. Expected one of ('model'); see",
        ),
        (["--device", "tpu"], "Expected one of ('cpu', 'cuda', 'auto'); see python -m diffpo.train --help\n"),
        (
            ["--updates", "2", "configs/x.toml"],
            "the config file comes first: give configs/x.toml in front of the flags",
        ),
        (["--updates", "2", "3"], "error: Unrecognized options: 3; see"),
        (
            ["--algorithm.train", "model", "--algorithm.train=threshold"],
            "--algorithm.train is given twice: put all its values behind one",
        ),
        (
            ["--rollout.threshold-gammas", "1", "--rollout.threshold_gammas", "2"],
            "--rollout.threshold-gammas is given twice",
        ),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        parse_train(list(flags))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
    assert not any(drawn in error for drawn in ("╭", "─", "----"))


def test_a_mistake_in_a_flag_is_the_same_line_in_any_encoding(capsys, monkeypatch):
    """tyro draws another box where the output is not UTF-8."""
    said = []
    for encoding in ("utf-8", "ascii"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        for flags in (["--device", "tpu"], ["--seed"], ["--updates", "2", "3"]):
            with pytest.raises(SystemExit):
                parse_train(list(flags))
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert said[0].startswith(
        "error: invalid choice 'tpu' for argument '--device'. Expected one of ('cpu', 'cuda', 'auto'); see"
    )


def test_a_model_too_large_to_pretrain_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(PretrainConfig, ["--model.hidden-size", "16384", "--model.num-hidden-layers", "200"])
    assert "more than 2^31" in capsys.readouterr().err
