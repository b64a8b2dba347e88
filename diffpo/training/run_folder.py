"""The folder of a run: who may write to it, and the configuration it was started with."""

import fcntl
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from diffpo.config import fail
from diffpo.models.file_replacement import write_atomically
from diffpo.training.config import TrainConfig

if TYPE_CHECKING:
    from diffpo.evaluate import EvaluateConfig

# Fields that say where or whether to run, not what the run computes.
_FREE_ON_RESUME = {
    "resume",
    "overwrite",
    "allow_config_change",
    "dry_run",
    "max_minutes",
    "save_every",
    "name",
    "runs",
    "batch_size",
    "device",
}


class RunFolder:
    """<runs>/<name> with config.json, metrics.jsonl, checkpoints/, model/, curves.png and summary.json."""

    def __init__(self, config: "TrainConfig | EvaluateConfig"):
        """Claim the folder; a used, locked or unwritable one ends the program with exit code 2."""
        self.path = Path(config.runs) / config.name
        config_file = self.path / "config.json"
        if config.resume and config.overwrite:
            fail("resume and overwrite exclude each other")
        before = _config_before(config_file)
        if config.resume and before is None:
            fail(f"resume: {self.path} holds no run to continue")
        if self.path.exists() and not self.path.is_dir():
            fail(f"output folder {self.path} is a file")
        used = self.path.exists() and any(entry.name != ".lock" for entry in self.path.iterdir())
        if used and config.overwrite and (before is None or before.keys() - type(config).model_fields.keys()):
            fail(
                f"overwrite: {self.path} holds files but no run of this command; delete it yourself or pick another --name"
            )
        if used and not (config.resume or config.overwrite):
            fail(
                f"output folder {self.path} is already used: --resume continues it, --overwrite deletes it, --name picks another"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            fail(f"output folder {self.path} is not writable: {error.strerror}")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however the process ends
        except BlockingIOError:
            fail(f"output folder {self.path} is in use by another run")
        if config.resume:
            self._check_same(config, before)
            if _may_change(config):
                (self.path / "base.json").unlink(missing_ok=True)  # it may have been made on other problems
        else:
            self._clear()
        text = config.model_dump_json(indent=2) + "\n"
        write_atomically(config_file, lambda temporary: Path(temporary).write_text(text))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()

    @staticmethod
    def _check_same(config: "TrainConfig | EvaluateConfig", before: dict) -> None:
        now = json.loads(config.model_dump_json())
        changes = _differences(before, now)
        if changes and not _may_change(config):
            hint = " (--allow-config-change resumes all the same)" if isinstance(config, TrainConfig) else ""
            fail("resume: the configuration changed: " + "; ".join(changes) + hint)


def _config_before(config_file: Path) -> dict | None:
    """The configuration in a used folder; None where there is none that can be read."""
    try:
        before = json.loads(config_file.read_text())
    except (OSError, ValueError):
        return None
    return before if isinstance(before, dict) else None


def _may_change(config: "TrainConfig | EvaluateConfig") -> bool:
    """Rows of an evaluation under two configurations have no meaning together; a training may go on under another."""
    return isinstance(config, TrainConfig) and config.allow_config_change


def _differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    """Fields of nested configurations that differ, as "name: old -> new"."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new and prefix + key not in _FREE_ON_RESUME:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found
