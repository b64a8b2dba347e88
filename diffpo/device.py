"""Where a model computes."""

import torch


def default_device() -> str:
    """What "auto" means: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(name: str) -> torch.device:
    """ "auto" or a device as torch names it. ValueError for "cuda" without one, or an unknown name."""
    try:
        device = torch.device(default_device() if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r}: torch does not know it; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no CUDA device; use --device cpu, or auto")
    return device


def release_cached_memory(device: torch.device) -> None:
    """Give back what torch keeps of a GPU for later, where that is more than half of it: the next phase asks for blocks of other sizes."""
    if device.type == "cuda" and 2 * torch.cuda.memory_reserved(device) > torch.cuda.mem_get_info(device)[1]:
        torch.cuda.empty_cache()
