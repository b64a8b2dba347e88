"""gpu_suite.sh without a GPU: it says so; and with a list of fake parts: limits, failures and skips stop nothing."""

import json
import os
import re
import subprocess
import sys
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
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


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
    assert sum(int(limit) + grace for _, limit, _, _ in parts) < 540
    assert {log for _, _, log, _ in parts} == {"build", "tests", "benchmarks"}
    assert len({name for name, *_ in parts}) == len(parts)
    for *_, command in parts:
        subprocess.run(["bash", "-n", "-c", command], check=True)


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
    ]


def test_kernel_tests_need_none_of_the_dependencies_of_diffpo():
    code = "import sys, pytest; sys.modules['diffpo'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "no:cacheprovider", "-k", "gpu or (draws_follow_the_distribution and reference)"]
    folders = ["tests/gpu/test_row_statistics_on_gpu.py", "tests/kernels/test_row_statistics.py"]
    command = [sys.executable, "-c", code, *arguments, *folders]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
