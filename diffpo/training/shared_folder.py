"""The folder of a run of several processes: the first holds and writes it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffpo.runs.run_folder import RunFolder
from diffpo.training.distributed import World


class SharedFolder:
    """As `RunFolder`, which ``claim`` makes, for every process. ``path`` has to be the same folder on every machine."""

    def __init__(self, path: Path, claim: Callable[[], RunFolder], world: World):
        self.path, self._world = path, world
        self._held = world.agreed(lambda: claim() if world.first else None)
        self.resumes: bool = world.from_first(lambda: self._held is not None and self._held.resumes)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def inputs(self) -> dict[str, str]:
        return self._held.inputs if self._held else {}

    @property
    def settings(self) -> dict[str, Any]:
        return self._held.settings if self._held else {}

    def begin(self) -> None:
        """Make the folder that of this run."""
        if self._held:
            self._held.begin()

    def write(self, name: str, text: str) -> None:
        """Replace a file of the run; it is whole or as it was."""
        if self._held:
            self._held.write(name, text)

    def release(self) -> None:
        """Let another run claim the folder."""
        if self._held:
            self._held.release()

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise
