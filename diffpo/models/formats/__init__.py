"""Checkpoint formats: the config keys and tensor names of every model family that loads, one file each."""

from pathlib import Path

from diffpo.models.folder_files import read_json, shown
from diffpo.models.formats.diffpo import DIFFPO, DiffpoFormat
from diffpo.models.formats.dream import DREAM
from diffpo.models.formats.llada import LLADA
from diffpo.models.formats.published import PublishedFormat
from diffpo.models.formats.unsupported import refuse_unsupported_family

__all__ = ["CONFIG", "FORMATS", "PublishedFormat", "format_of", "read_json"]

CONFIG = "config.json"
FORMATS: dict[str, DiffpoFormat | PublishedFormat] = {known.model_type: known for known in (DIFFPO, LLADA, DREAM)}


def format_of(fields: dict, where: str | Path) -> DiffpoFormat | PublishedFormat:
    """The format of a config.json by its model_type; ValueError for a family that does not load, with the reason."""
    model_type = fields.get("model_type")
    refuse_unsupported_family(fields, where)
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise ValueError(f"{where}: model_type {shown(model_type)} is not supported; supported: {', '.join(FORMATS)}")
    return FORMATS[model_type]
