"""Where a command computes."""

import torch


def choose_device(name: str) -> torch.device:
    """The device called "cpu", "cuda" or "auto" (a GPU where there is one). ValueError for "cuda" without one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no CUDA device; use --device cpu, or auto")
    return torch.device(name)
