"""A machine that has torch and what comes with it, but not what only the commands need: everything else is hidden from the processes here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PRESENT = "torch triton transformers numpy rich matplotlib safetensors pytest cmake ninja pybind11"
ABSENT = "pydantic tyro math-verify"
# These are commands, or read their configurations.
NEED_MORE = {
    "diffpo.config",
    "diffpo.decoding_config",
    "diffpo.evaluate",
    "diffpo.generate_command",
    "diffpo.lm_eval_adapter",
    "diffpo.objectives",
    *(f"diffpo.objectives.{name}" for name in ("d1", "diffpo", "espo", "objective", "tracerl")),
    "diffpo.pretrain",
    "diffpo.report",
    "diffpo.reports.page",
    "diffpo.reports.results",
    "diffpo.train",
    *(
        f"diffpo.training.{name}"
        for name in ("config", "export", "guard", "lora_config", "memory_estimate", "model_setup", "outcome", "plan")
    ),
    "diffpo.training.samples",
    "diffpo.training.trainer",
    "diffpo.training.update",
}

IMPORT_EACH = """
import importlib, sys, numpy, torch
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(error)
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil, diffpo, diffpo_kernels
for package in (diffpo, diffpo_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", "_native")):
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                print(f"{module.name}: {error}")
"""

USE_A_MODEL = """
import sys, torch, diffpo
model = diffpo.load("tiny-countdown-diffpo")
out = diffpo.generate(model, ["3 5 2 -> 10"] * 2, 12, rule=diffpo.PromptThreshold(), temperature=1.0)
assert len(out.text) == 2
scores = diffpo.trajectory_logprobs(model, out.trajectory, range(12))
torch.testing.assert_close(scores, out.trajectory.logprob, rtol=1e-3, atol=1e-3)
scores.sum().backward()
model.save(sys.argv[1])
again = diffpo.load(sys.argv[1])
assert again.config == model.config and torch.equal(again.lm_head.weight, model.lm_head.weight)
assert diffpo.generate(again, ["3 5 2 -> 10"], 12).text
assert diffpo.grade("gsm8k", {"question": "?", "answer": "#### 7"}, "<answer>7</answer>").correct
"""

# Each as ``python -m`` runs it: [exit code, standard output, standard error] by name.
RUN_COMMANDS = """
import contextlib, io, json, runpy, sys
said, commands = {}, sys.argv[1:]
for command in commands:
    sys.argv = [command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            runpy.run_module(f"diffpo.{command}", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as stopped:
            code = stopped.code
    said[command] = [code, output.getvalue(), errors.getvalue()]
print(json.dumps(said))
"""


def python(*arguments: str, only: str = PRESENT, hidden: str = ABSENT) -> subprocess.CompletedProcess:
    paths = [str(REPOSITORY / "tests/bare_machine"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "ONLY": only, "HIDDEN": hidden}
    environment |= {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HF_HUB_OFFLINE": "1",
    }  # plugins of other distributions, that is
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True
    )


def test_what_is_hidden_is_not_found():
    modules = ("pydantic", "tyro", "hypothesis", "scipy", "tensorboard", "xdist")
    done = python("-c", IMPORT_EACH, *modules)
    assert done.stdout.splitlines() == [f"No module named '{module}'" for module in modules], done.stderr


def test_every_module_that_is_no_command_imports():
    done = python("-c", IMPORT_EVERYTHING)
    assert done.returncode == 0, done.stderr
    failures = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert failures.keys() <= NEED_MORE
    assert set(failures.values()) <= {"this part of diffpo needs pydantic and tyro: pip install pydantic tyro"}


def test_load_generate_score_and_save(tmp_path):
    done = python("-c", USE_A_MODEL, str(tmp_path / "saved"))
    assert done.returncode == 0, done.stderr
    saved, shipped = tmp_path / "saved/config.json", REPOSITORY / "diffpo/checkpoints/tiny-countdown-diffpo/config.json"
    since = {"threshold_reads": "completion"}  # a field that the shipped file is older than
    assert json.loads(saved.read_text()) == json.loads(shipped.read_text()) | since


def test_the_tests_are_collected():
    folders = [f"tests/{name}" for name in ("gpu", "kernels", "decoding", "likelihood", "models")]
    done = python("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *folders)
    assert done.returncode == 0, done.stdout[-3000:]
    *tests, last = done.stdout.splitlines()
    assert "tests collected" in last
    assert "error" not in last
    assert all(any(test.startswith(f"{folder}/") for test in tests) for folder in folders)


def test_property_tests_are_skipped_and_the_others_of_their_files_run():
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "-k", "reference", "tests/kernels/test_row_statistics.py"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "needs hypothesis" in done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("absent", "named"),
    [("pydantic tyro", "pydantic and tyro: pip install pydantic tyro"), ("tyro", "tyro: pip install tyro")],
)
def test_a_command_says_in_one_line_what_it_needs(absent, named):
    commands = ("train", "evaluate", "generate", "pretrain", "lm_eval_adapter")
    done = python("-c", RUN_COMMANDS, *commands, only="", hidden=absent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        command: [2, "", f"error: python -m diffpo.{command} needs {named}\n"] for command in commands
    }


def test_evaluating_mathematics_needs_math_verify(tmp_path):
    command = ("-m", "diffpo.evaluate", "--task", "math500", "--runs", str(tmp_path / "runs"))
    done = python(*command, only="", hidden="math-verify")
    assert done.returncode == 2
    assert done.stderr == "error: python -m diffpo.evaluate needs math-verify: pip install math-verify\n"
    assert not (tmp_path / "runs").exists()


def test_the_report_of_the_kernels():
    done = python("-m", "diffpo_kernels")
    assert done.returncode == 0, done.stderr
    assert "row_statistics" in done.stdout
