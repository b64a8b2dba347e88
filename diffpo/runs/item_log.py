"""items.jsonl: one line per evaluated problem, written when it is graded, so that nothing done is lost and nothing is done twice."""

from pathlib import Path

from diffpo.runs.json_lines import JsonLines, own_file


class ItemLog:
    """The lines of a file by their "index". What an earlier run wrote is read; a last line that it did not finish is dropped.

    ValueError for any other line that is not valid.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines = JsonLines(own_file(path), str(path), "evaluated problem")
        self.items: dict[int, dict] = {}
        for place, item in enumerate(self._lines.rows):
            if type(item.get("index")) is not int:
                raise self._lines.refused(place)
            self.items[item["index"]] = item

    def write(self, item: dict) -> None:
        self._lines.write(item)
        self.items[item["index"]] = item

    def check(self, problems: int) -> None:
        """Close; ValueError unless every row can be counted together with those of ``problems`` problems."""
        self.close()
        for index, item in self.items.items():
            counted = all(type(item.get(name)) in (int, float) for name in ("nfe", "tokens", "seconds"))
            decided = type(item.get("correct", ...)) in (bool, type(None))
            rewarded = type(item.get("reward", ...)) in (int, float, type(None))
            if not (0 <= index < problems and counted and decided and rewarded):
                raise ValueError(
                    f"resume: {self._path}: the row of index {index} is no evaluated problem; start again with --overwrite"
                )

    def close(self) -> None:
        self._lines.close()
