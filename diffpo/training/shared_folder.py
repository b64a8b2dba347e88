"""The folder of a run of several processes: the first holds and writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.runs.run_folder import ClaimedFolder, RunFolder
from diffpo.training.checkpointing import Saved, newest
from diffpo.training.distributed import World


class SharedFolder(ClaimedFolder):
    """As `RunFolder`, which ``claim`` makes, for every process. ``path`` has to be the same folder on every machine."""

    def __init__(self, path: Path, claim: Callable[[], RunFolder], world: World):
        self.path, self._world = path, world
        self._held = world.agreed(lambda: claim() if world.first else None)
        known = world.from_first(lambda: self._held and [self._held.resumes, self._held.inputs, self._held.settings])
        self.resumes: bool = known[0]
        self.inputs: dict[str, str] = known[1]
        self.settings: dict[str, Any] = known[2]

    def begin(self) -> None:
        """Make the folder that of this run."""
        if self._held:
            self._held.begin()

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run; it is whole or as it was."""
        if self._held:
            self._held.write(name, text)

    def release(self) -> None:
        if self._held:
            self._held.release()


def newest_of_first(folder: SharedFolder, model: MaskedDiffusionLM, world: World) -> Saved | None:
    """`newest` in the first process, whose choice is everybody's."""

    def found() -> dict | None:
        saved = newest(folder.checkpoints, model, folder.inputs["model"])
        return {"path": str(saved.path), "state": saved.state} if saved else None

    saved = world.from_first(found)
    return Saved(Path(saved["path"]), saved["state"]) if saved else None
