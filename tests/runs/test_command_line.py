"""``diffpo <command>``, and ``python -m diffpo``, which is the same."""

import os
import re
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import diffpo

REPOSITORY = Path(__file__).parents[2]
SCRIPT = ["-c", "import sys; from diffpo.__main__ import main; sys.exit(main())"]  # as the console script does


def run(*arguments: str, start=("-m", "diffpo")) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True)


def test_the_console_script_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["diffpo"].split(":")
    assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize("start", [("-m", "diffpo"), SCRIPT], ids=["module", "script"])
def test_help_is_a_line_a_command_and_takes_no_time(start):
    run("--help", start=start)  # with warm caches
    started = time.perf_counter()
    done = run("--help", start=start)
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    for name in ("train", "evaluate", "generate", "pretrain", "report", "kernels"):
        assert sum(line.strip().startswith(name) for line in lines) == 1
    assert seconds < 5, "torch alone takes seconds to import"
    loaded = run("--help", start=("-X", "importtime", *start)).stderr
    assert "torch" not in loaded
    assert "pydantic" not in loaded


def test_the_version():
    assert run("--version").stdout == f"diffpo {diffpo.__version__}\n"


@pytest.mark.parametrize(
    ("command", "near"), [("trian", "train"), ("kernel", "kernels"), ("eval", "evaluate"), ("--halp", "")]
)
def test_an_unknown_command_names_the_nearest(command, near):
    done = run(command)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"unknown command {command!r}; nearest: {near}" in done.stderr


def test_no_command_is_a_mistake():
    done = run()
    assert done.returncode == 2
    assert "no command: give one of train, evaluate, generate, pretrain, report, kernels" in done.stderr


def test_a_command_does_what_its_module_does():
    arguments = ("8 12 5 -> 36", "--gen-length", "5", "--block-length", "2")
    module = run(*arguments, start=("-m", "diffpo.generate"))
    assert module.returncode == 2
    assert "multiple of block_length" in module.stderr
    for start in (("-m", "diffpo"), SCRIPT):
        done = run("generate", *arguments, start=start)
        assert (done.returncode, done.stdout, done.stderr) == (module.returncode, module.stdout, module.stderr)


def test_an_interrupt_while_a_command_is_imported_is_one_line(tmp_path):
    """Torch alone takes seconds, in which nothing of the command can catch it."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    start = ["-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from diffpo.__main__ import main; main()"]
    for command in ("train", "evaluate", "generate", "pretrain", "report", "kernels"):
        done = run(command, start=start)
        assert (done.returncode, done.stderr) == (130, "stopped before the start: interrupted\n"), command


def test_the_kernels_are_reported():
    done = run("kernels")
    assert done.returncode == 0
    assert "row_statistics" in done.stdout


def ending(arguments: list[str], stdout, buffered: bool, start=("-m", "diffpo")) -> tuple[int, str]:
    """The exit code and what is said on standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *start, *arguments]
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, env=environment)
    if process.stdout is not None:
        process.stdout.close()
    return process.wait(), process.stderr.read().decode()


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "at once"])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_fault(arguments, buffered):
    """As in ``diffpo train --help | head -3``."""
    assert ending(arguments, subprocess.PIPE, buffered) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "at once"])
@pytest.mark.parametrize(("arguments", "when"), [(["--help"], "at the end"), (["train", "--dry-run"], "(at the end|before the start)")],
                         ids=["help", "dry run"])  # fmt: skip
def test_an_output_on_a_full_disk_is_one_line(arguments, when, buffered):
    with open("/dev/full", "wb") as full:
        code, said = ending(arguments, full, buffered)
    assert code == 1
    assert re.fullmatch(f"stopped {when}: No space left on device\n", said)


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "at once"])
@pytest.mark.parametrize("start", [("-m", "diffpo_kernels"), ("-m", "diffpo", "kernels")], ids=["module", "command"])
def test_the_report_of_the_kernels_ends_as_the_commands_do(start, buffered):
    assert ending([], subprocess.PIPE, buffered, start) == (1, "")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            assert ending([], full, buffered, start) == (1, "stopped at the end: No space left on device\n")


@pytest.mark.parametrize(
    ("program", "closed"),
    [
        ("diffpo --help", ">&-"),
        ("diffpo train --help", ">&- <&-"),
        ("diffpo train --dry-run", ">&- <&- 2>&-"),
        ("diffpo.generate '1 2 -> 3' --gen-length 4", ">&- <&- 2>&-"),
        ("diffpo_kernels", ">&-"),
    ],
)
def test_streams_that_are_closed_from_the_start_are_no_fault(program, closed):
    """As a daemon may start a program: Python then has no stream at all."""
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m {program} {closed}"], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_a_closed_standard_input_holds_no_prompt():
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m diffpo generate <&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: input standard input holds no prompt: give one per line\n")


def test_every_module_that_is_a_command_may_have_its_output_fail():
    own = {"math_worker.py", "tokenizer_trial.py"}  # processes that a command starts for itself
    programs = [
        path for path in (REPOSITORY / "diffpo").rglob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    ]
    names = {path.name for path in programs}
    assert names > own | {"train.py", "evaluate.py", "generate.py", "pretrain.py"}
    assert {path.name for path in programs if "with output_may_fail():" in path.read_text()} == names - own
