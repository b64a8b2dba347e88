"""Fetching a checkpoint from the Hugging Face hub: safetensors, config, tokenizer; offline mode and revisions."""

from pathlib import Path

from diffpo.models.formats import CONFIG, format_of, read_json

# *.py is what a published config.json refers to in auto_map: kept for other tools, never imported or run
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py", "*.st"]


def download(hub_id: str, revision: str | None = None, cached_only: bool = False) -> tuple[Path, str]:
    """The local folder of a hub repository at a branch, tag or commit (default: main), and the commit it is at.

    The config comes first, so that an unsupported model is refused before its weights are fetched. HF_HUB_OFFLINE and the
    other settings of huggingface_hub apply. cached_only: nothing is fetched. FileNotFoundError if it cannot be fetched and is not cached.
    """
    folder = _snapshot(hub_id, revision, [CONFIG], cached_only)
    if (folder / CONFIG).exists():
        format_of(read_json(folder / CONFIG), hub_id)
    commit = folder.name  # the cache names the folder of a snapshot by its commit
    return _snapshot(hub_id, commit, _WANTED, cached_only), commit


def _snapshot(hub_id: str, revision: str | None, patterns: list[str], cached_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=cached_only,
            )
        )
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"model {hub_id!r}{at} is no local folder and could not be fetched from the hub: {error}"
        ) from error
