"""Where a number came from: command, versions, hardware and commit, without the folders of the machine it was measured on.

It needs torch alone, as the kernels do.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import diffpo
from diffpo_kernels import backends

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "math-verify")


def provenance(seeds: dict[str, int] | None = None, command: str | None = None) -> dict:
    """JSON values that say how to get the numbers again. seeds: by what they seed; command: of this script, if it is not given."""
    return {
        "command": script_command() if command is None else command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **({} if seeds is None else {"seeds": seeds}),
        "hardware": hardware(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def command_provenance(name: str, arguments: Sequence[str], inputs: Mapping[str, str]) -> dict:
    """Of what ``python -m diffpo.<name>`` wrote. inputs: by name, digests of the contents that it read."""
    revisions = {f"{what}_revision": digest for what, digest in inputs.items()}
    return provenance(command=module_command(f"diffpo.{name}", arguments)) | revisions


def module_command(module: str, arguments: Sequence[str]) -> str:
    """The command line of ``python -m module``."""
    return shlex.join(["python", "-m", module, *map(portable, arguments)])


def script_command() -> str:
    """The command line of the script that runs."""
    script, *arguments = sys.argv
    return shlex.join(["python", portable(str(Path(script).resolve())), *map(portable, arguments)])


def portable(argument: str) -> str:
    """An argument, or the value of a --flag=value, without what is special to this machine: an absolute path becomes relative to the
    repository, or its last part alone."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if path.is_absolute() and path.is_relative_to(REPOSITORY):
        value = str(path.relative_to(REPOSITORY))
    elif value.startswith(("/", "~")):
        value = path.name
    return flag + equals + value


def versions() -> dict[str, str | None]:
    """Of Python, diffpo and the packages that decide the numbers; None for one that is not installed."""
    found: dict[str, str | None] = {"diffpo": diffpo.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict:
    """System, processor, threads that torch uses, memory in GiB, GPUs, and the kernels that run on them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": {name: backends.preferred(name, device) for name in backends.OPERATORS},
    }


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout, with "-dirty" when files differ from it; None without git or outside a checkout."""
    if not (REPOSITORY / ".git").exists():  # an installed package may lie in somebody else's repository
        return None
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
