"""gpu_suite.sh without a GPU: it says so; and with a list of fake parts: limits, failures and skips stop nothing."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import gpu_parts
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_suite.sh"
PARTS = """
first   | 20 | build      | echo hello; cat
slow    | 1  | tests      | echo before; sleep 30; echo after
bad     | 20 | tests      | echo "some error"; exit 3
skipped | 20 | tests      | echo "because"; exit 77
last    | 20 | benchmarks | echo "left | right"; echo file > "$OUT/result.json"
"""


def suite(tmp_path: Path, *arguments: str, parts: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    environment |= {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    if parts is not None:
        (tmp_path / "parts").write_text(parts)
        environment["GPU_SUITE_PARTS"] = str(tmp_path / "parts")
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_the_script_parses():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_with_its_own_exit_code(tmp_path):
    done = suite(tmp_path)
    assert done.returncode == 3
    assert "no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_argument(tmp_path):
    done = suite(tmp_path, "--fast")
    assert done.returncode == 2
    assert "--fast" in done.stderr


def test_time_limits_and_logs_stay_within_what_a_remote_machine_allows(tmp_path):
    parts = [[field.strip() for field in line.split("|", 3)] for line in suite(tmp_path, "--list").stdout.splitlines()]
    grace = int(re.search(r"\bgrace=(\d+)", SCRIPT.read_text()).group(1))
    looking_for_a_gpu = 15
    assert sum(int(limit) + grace for _, limit, _, _ in parts) + looking_for_a_gpu < 600, "what a call may take"
    assert {log for _, _, log, _ in parts} == {"build", "tests", "benchmarks"}
    assert len({name for name, *_ in parts}) == len(parts)
    for *_, command in parts:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_what_is_worth_most_comes_first(tmp_path):
    names = [line.split("|")[0].strip() for line in suite(tmp_path, "--list").stdout.splitlines()]
    assert names[:5] == ["environment", "build", "tests of GPU", "decoding tests", "kernel tests"]


def test_every_gpu_test_is_in_exactly_one_part(tmp_path):
    """And every one of them is found where they are looked for."""
    commands = [line.split("|", 3)[3].split() for line in suite(tmp_path, "--list").stdout.splitlines()]
    root, listed = SCRIPT.parents[1], []
    for words in (words for words in commands if words[0] == "tests"):
        paths = [root / word for word in words if word.startswith("tests/")]
        left_out = [root / word for option, word in pairwise(words) if option == "--ignore"]
        assert all(path.exists() for path in paths), words
        chosen = [path for path in paths if path not in left_out]
        found = {file for path in chosen for file in ([path] if path.is_file() else path.glob("test_*.py"))}
        listed += found.difference(left_out)
    files = list(root.glob("tests/gpu/test_*.py"))
    assert [listed.count(file) for file in files] == [1] * len(files)
    assert root / "tests/kernels/test_row_statistics.py" in listed


@pytest.mark.slow
def test_a_file_that_cannot_be_imported_stops_no_other_and_a_stopped_part_leaves_what_it_found(tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "test_broken.py").write_text("import no_such_package")
    (folder / "test_fine.py").write_text("def test_passes(): pass")
    (folder / "test_zslow.py").write_text("import time\ndef test_first(): pass\ndef test_sleeps(): time.sleep(60)")
    quick = f"quick | 40 | tests | tests loadfile {folder} --ignore {folder}/test_zslow.py"
    slow = f"slow | 12 | build | tests loadfile {folder}/test_zslow.py"
    verdicts = 'verdicts | 9 | benchmarks | cat "$OUT/suite.json"'
    done = suite(tmp_path, parts="\n".join([quick, slow, verdicts]) + "\n", WORKERS="0")
    assert done.returncode == 1
    log = (tmp_path / "out/tests.log").read_text()
    assert "1 passed, 1 error" in log
    assert "No module named 'no_such_package'" in log
    assert "PASSED" in (tmp_path / "out/build.log").read_text()
    so_far = json.loads((tmp_path / "out/benchmarks.log").read_text().splitlines()[-1])
    assert [part["part"] for part in so_far] == ["quick", "slow"], "written as it goes"


def test_no_part_stops_the_next(tmp_path):
    done = suite(tmp_path, parts=PARTS)
    assert done.returncode == 1
    status = {part["part"]: part["status"] for part in json.loads((tmp_path / "out/suite.json").read_text())}
    assert status == {
        "first": "ok",
        "slow": "failed: stopped after 1 s",
        "bad": "failed: exit code 3",
        "skipped": "skipped",
        "last": "ok",
    }
    table = done.stdout.splitlines()[-6:]
    assert [line.split()[0] for line in table] == [*status, "total"]
    tests = (tmp_path / "out/tests.log").read_text()
    assert "before" in tests
    assert "after" not in tests
    assert "some error" in done.stdout, "the end of a failed part's output is shown"
    assert "left | right" in (tmp_path / "out/benchmarks.log").read_text()
    assert (tmp_path / "out/result.json").read_text() == "file\n"


@pytest.mark.parametrize(("part", "code"), [("a | 9 | build | true", 0), ("a | 9 | build | exit 77", 4)])
def test_exit_codes_without_failures(tmp_path, part, code):
    assert suite(tmp_path, parts=part + "\n").returncode == code


def test_packages_names_what_is_missing_or_broken(monkeypatch, capsys):
    def version(name: str) -> str:
        return {"torch": "2.11.0"}.get(name) or 1 / 0

    monkeypatch.setattr(gpu_parts, "PACKAGES", {"torch": "everything", "tyro": "diffpo.train"})
    monkeypatch.setattr(gpu_parts.metadata, "version", version)
    assert gpu_parts.packages() == 0
    assert capsys.readouterr().out.splitlines() == [
        "torch 2.11.0",
        "MISSING tyro, needed for diffpo.train: ZeroDivisionError: division by zero",
        "no wheels",
    ]


def test_the_wheels_of_the_usual_folders_are_found_and_told_with_their_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WHEELS", raising=False)
    monkeypatch.setattr(gpu_parts, "PACKAGES", {})
    assert gpu_parts.found_wheels() == (None, [])
    for folder in ("wheels", "benchmarks/wheels", "mine"):
        Path(folder).mkdir(parents=True)
        assert gpu_parts.found_wheels()[0] != Path(folder), "an empty one is none"
        Path(folder, "a-1-py3-none-any.whl").write_bytes(bytes(1_500_000))
        expected = Path("mine") if folder == "mine" else Path(folder)
        if folder == "mine":
            monkeypatch.setenv("WHEELS", "mine")
        assert gpu_parts.found_wheels()[0] == expected
    gpu_parts.packages()
    assert capsys.readouterr().out == "1 wheels of 1.5 MB in mine\n"


def test_training_without_its_packages_is_skipped_with_a_line_that_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("WHEELS", str(tmp_path / "nowhere"))
    code = (
        "import sys; sys.modules['pydantic'] = sys.modules['tyro'] = None; sys.path.insert(0, 'benchmarks'); import gpu_parts;"
        f"sys.exit(gpu_parts.training({str(tmp_path / 'summary.json')!r}, 'cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert done.returncode == gpu_parts.SKIPPED == 77, done.stderr
    (line,) = done.stdout.splitlines()
    assert "needs pydantic and tyro" in line
    assert gpu_parts.DOWNLOAD in line


def test_wheels_for_another_machine_are_named(tmp_path, monkeypatch):
    (tmp_path / "tyro-1-cp27-none-win32.whl").write_bytes(b"")
    monkeypatch.setenv("WHEELS", str(tmp_path))
    monkeypatch.setattr(gpu_parts, "importable", lambda name: False)
    reason = gpu_parts.use_wheels(str(tmp_path / "site"))
    assert "do not install" in reason
    assert "tyro-1-cp27-none-win32.whl" in reason


def test_the_command_that_fills_the_wheels_is_documented():
    assert gpu_parts.DOWNLOAD in SCRIPT.read_text()
    assert gpu_parts.DOWNLOAD in (SCRIPT.parents[1] / "CONTRIBUTING.md").read_text()


@pytest.mark.slow
def test_the_training_part_on_a_cpu(tmp_path):
    assert gpu_parts.training(str(tmp_path / "s.json"), "cpu") == 0
    assert json.loads((tmp_path / "s.json").read_text())["heldout"] == 64


def test_kernel_tests_need_none_of_the_dependencies_of_diffpo():
    code = "import sys, pytest; sys.modules['diffpo'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "gpu or (draws_follow_the_distribution and reference)"]
    folders = ["tests/gpu/test_row_statistics_on_gpu.py", "tests/kernels/test_row_statistics.py"]
    command = [sys.executable, "-c", code, *arguments, *folders]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
