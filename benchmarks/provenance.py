"""Where a number came from: command, hardware, versions and commit, kept beside every benchmark result."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from diffpo_kernels import backends

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "numpy")


def provenance(seeds: dict[str, int]) -> dict:
    """JSON values that say how to get the numbers again; ``seeds`` by what they seed."""
    return {
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": seeds,
        "hardware": hardware(),
        "versions": versions(),
        "git_commit": git_commit(),
    }


def command() -> str:
    """The command line, without folders of this machine: paths are relative to the repository, or their last part alone."""
    script, *arguments = sys.argv
    return shlex.join(["python", portable(str(Path(script).resolve())), *map(portable, arguments)])


def portable(argument: str) -> str:
    """An absolute path without what is special to this machine; anything else as it is."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def hardware() -> dict:
    """CPU, threads torch uses, memory in GiB, GPUs, and the kernels that run on them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
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


def versions() -> dict[str, str | None]:
    """Of Python, the system and the packages that decide the numbers; None for one that is not installed."""
    found: dict[str, str | None] = {
        "diffpo": diffpo_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def diffpo_version() -> str | None:
    """None where a dependency is missing: the kernels alone need few."""
    try:
        import diffpo
    except ImportError:
        return None
    return diffpo.__version__


def git_commit() -> str | None:
    """The commit of the checkout, with "-dirty" when files differ from it; None without git or outside a checkout."""
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
