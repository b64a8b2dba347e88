"""Adapters (LoRA and others, as peft saves them): recognised and refused, because ignoring one gives another model's numbers."""

from pathlib import Path

from diffpo.models.folder_files import read_json, shown

_CONFIG = "adapter_config.json"
_FILES = ("adapter_config.json", "adapter_model*", "adapters.safetensors", "adapters.npz")


def refuse_adapter(folder: Path) -> None:
    """ValueError, with the way to merge it, if a folder holds an adapter, beside base weights or alone."""
    patterns = (*_FILES, f"*/{_CONFIG}")  # named adapters have folders of their own
    found = sorted({str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern)})
    if found:
        base = _base(folder) if _CONFIG in found else None
        raise ValueError(
            f"{folder} holds an adapter ({', '.join(found)}), which is not supported yet and would be ignored; "
            f"merge it into its base model, {base or 'which the folder does not name'}, and load the result: "
            f"{merge_command(base or 'BASE', str(folder))}. If the weights beside it are the merged ones, remove the adapter's files"
        )


def merge_command(base: str, adapter: str) -> str:
    """How to write base model and adapter as one checkpoint."""
    return (
        f"with base = {base} as the tool that trained the adapter loads it, "
        f"peft.PeftModel.from_pretrained(base, {adapter!r}).merge_and_unload().save_pretrained('merged'), "
        "then copy the base's tokenizer files to 'merged'"
    )


def _base(folder: Path) -> str | None:
    """base_model_name_or_path of the adapter's config."""
    name = read_json(folder / _CONFIG).get("base_model_name_or_path")
    return shown(name).strip("'\"") if isinstance(name, str) and name else None
