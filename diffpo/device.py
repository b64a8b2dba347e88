"""Where a command computes."""

import torch


def choose_device(name: str) -> torch.device:
    """ "auto", a GPU where there is one, or a device as torch names it. ValueError for "cuda" without one, or an unknown name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: torch does not know it; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no CUDA device; use --device cpu, or auto")
    return device
