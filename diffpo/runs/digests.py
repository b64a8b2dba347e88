"""What a run reads, by content: weights, tokenizer, files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from diffpo.models.threshold_file import THRESHOLD
from diffpo.models.tokenizer_files import TOKENIZER_FILES


def weights_digest(folder: Path) -> str:
    """ "sha256:..." over the config and the weights of a checkpoint folder, for a model that no commit names."""
    return files_digest(
        [
            folder / "config.json",
            folder / "adapter_config.json",
            *folder.glob("*.safetensors"),
            *folder.glob(f"*{Path(THRESHOLD).suffix}"),
        ]
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
