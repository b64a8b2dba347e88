"""How much memory a device has for this process."""

import os
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import torch

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit(device: torch.device) -> int | None:
    """Bytes of a GPU, or of the machine and of the control groups that this process is in, whichever is least; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] if torch.cuda.is_available() else None
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_limits_of_control_groups(_CGROUPS, _OWN)])


def _limits_of_control_groups(root: Path, own: Path) -> Iterator[int]:
    """Of both versions of control groups. A container sees its own group as the root, whatever its path says."""
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
            for group in [base, *(base / part for part in accumulate(Path(path.strip("/")).parts, os.path.join))]:
                text = "".join(_lines(group / name))
                if text.isdecimal():  # not "max"
                    yield int(text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # there is none
        return []
