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
        known = world.from_first(lambda: self._held and [self._held.resumes, self._held.inputs, self._held.settings])
        self.resumes: bool = known[0]
        self.inputs: dict[str, str] = known[1]
        self.settings: dict[str, Any] = known[2]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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
