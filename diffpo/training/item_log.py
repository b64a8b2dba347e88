"""items.jsonl: one line per evaluated problem, written when it is done, so that nothing done is lost and nothing is done twice."""

import json
from pathlib import Path


class ItemLog:
    """The lines of a file by their "index". What an earlier run wrote is read; a last line that it did not finish is dropped.

    ValueError for any other line that is not valid.
    """

    def __init__(self, path: Path):
        self.items: dict[int, dict] = {}
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                item = json.loads(line)
                self.items[item["index"]] = item
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}: line {number} is no evaluated problem ({error}); start again with --overwrite"
                ) from error
        self._file = path.open("ab")
        self._file.truncate(len(complete))

    def write(self, item: dict) -> None:
        line = json.dumps(item, default=str, allow_nan=False) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        self.items[item["index"]] = item

    def close(self) -> None:
        self._file.close()
