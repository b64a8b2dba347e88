"""What a result says about its origin."""

import json
import os
import subprocess

import torch

from diffpo.runs import provenance


def test_the_record_is_json_and_complete(monkeypatch):
    script = provenance.REPOSITORY / "benchmarks/nfe_pareto.py"
    monkeypatch.setattr("sys.argv", [str(script), "--quick", "--model", "a b"])
    record = json.loads(json.dumps(provenance.provenance({"heldout": 0})))
    assert record["command"] == "python benchmarks/nfe_pareto.py --quick --model 'a b'"
    assert record["seeds"] == {"heldout": 0}
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cpu"]
    assert set(record["hardware"]["kernels"].values()) <= {"reference", "native", "triton", "cuda"}


def test_without_git_there_is_no_commit(monkeypatch):
    def missing(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.git_commit() is None


def test_outside_a_checkout_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    assert provenance.git_commit() is None


def test_a_recorded_command_names_no_folder_of_this_machine(monkeypatch):
    script = str(provenance.REPOSITORY / "benchmarks" / "x.py")
    arguments = ["--output", "/home/someone/out", "--model", str(provenance.REPOSITORY / "runs" / "m"), "--seeds", "5"]
    monkeypatch.setattr("sys.argv", [script, *arguments])
    assert provenance.script_command() == "python benchmarks/x.py --output out --model runs/m --seeds 5"


def test_the_command_of_a_module_holds_no_folders():
    arguments = [
        "/home/me/x.toml",
        "--data=/data/test.jsonl",
        "--model",
        "~/models/tiny",
        "--runs",
        "runs",
        "--steps=4",
        "a b",
    ]
    assert provenance.module_command("diffpo.evaluate", arguments) == (
        "python -m diffpo.evaluate x.toml --data=test.jsonl --model tiny --runs runs --steps=4 'a b'"
    )


def test_versions_and_hardware_are_those_of_this_process():
    assert provenance.versions()["torch"] == torch.__version__
    assert provenance.hardware()["torch_threads"] == torch.get_num_threads()
    assert provenance.hardware()["cpu_cores"] == os.cpu_count()
    assert "row_statistics" in provenance.hardware()["kernels"]
