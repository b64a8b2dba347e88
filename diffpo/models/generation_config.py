"""generation_config.json of a checkpoint folder: the ids that end a completion, beside those of config.json."""

from pathlib import Path

from diffpo.models.folder_files import find, read_json

GENERATION_CONFIG = "generation_config.json"


def generation_eos_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """Its eos_token_id, an id or a list of them; () without the file or the key. ValueError for anything else."""
    path = folder / GENERATION_CONFIG
    found = read_json(path).get("eos_token_id") if find(folder, GENERATION_CONFIG) else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for index in ids:
        if type(index) is not int or not 0 <= index < vocab_size:
            raise ValueError(f"{path}: eos_token_id must be an id, or a list of ids, below {vocab_size}, got {index!r}")
    return tuple(ids)
