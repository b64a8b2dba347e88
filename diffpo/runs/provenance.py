"""Where a number came from: command, versions, hardware and model, without the folders of the machine it was measured on."""

import hashlib
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import diffpo
from diffpo.models.threshold_file import THRESHOLD
from diffpo.models.tokenizer_files import TOKENIZER_FILES
from diffpo_kernels import backends

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "numpy", "math-verify")


def provenance(module: str, arguments: Sequence[str]) -> dict:
    """JSON values that say how to get the numbers of ``python -m module arguments`` again."""
    return {
        "command": command(module, arguments),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
    }


def command(module: str, arguments: Sequence[str]) -> str:
    """The command line; of an absolute path, only the name."""
    return shlex.join(["python", "-m", module, *map(without_folder, arguments)])


def without_folder(argument: str) -> str:
    """An argument, or the value of a --flag=value, with an absolute path cut to its last part."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + (Path(value).name if value.startswith(("/", "~")) else value)


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
    """System, processor, threads that torch uses, GPUs, and the kernels that run on them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": {name: backends.preferred(name, device) for name in backends.OPERATORS},
    }


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def weights_digest(folder: Path) -> str:
    """ "sha256:..." over the config and the weights of a checkpoint folder, for a model that no commit names."""
    return files_digest(
        [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob(f"*{Path(THRESHOLD).suffix}")]
    )


def tokenizer_digest(folder: Path) -> str:
    """ "sha256:..." over what turns text into tokens and back in a checkpoint folder: tokenizer, chat template, generation defaults."""
    return files_digest(folder / name for name in (*TOKENIZER_FILES, "generation_config.json"))


def files_digest(paths: Iterable[Path]) -> str:
    """ "sha256:..." over the names and the contents of files, not where they lie. Devices and pipes are no content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def model_inputs(folder: Path, commit: str | None) -> dict[str, str]:
    """What identifies the model in a folder by content, for a run that goes on to compare: the hub's commit, or digests."""
    return {"model": commit or weights_digest(folder), "tokenizer": tokenizer_digest(folder)}
