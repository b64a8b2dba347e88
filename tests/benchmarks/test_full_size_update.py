"""The benchmark of a whole update of LLaDA-8B's size, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size_update.py"


def test_from_chat_prompt_to_saved_adapter(tmp_path):
    pytest.importorskip("peft", reason="needs the extra diffpo[lora]")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "model"), "--smoke", "--out", str(tmp_path / "out.json")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "estimated" in done.stdout.splitlines()[-1]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["update"]["peak_bytes"] > 10**8
    assert found["update"]["metrics"]["nfe"] == 8
    assert {path.name for path in (tmp_path / "model-adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
