"""Small parts of gpu_suite.sh: ``python benchmarks/gpu_parts.py packages | extension | training summary.json``."""

import sys
import tempfile
from importlib import metadata
from pathlib import Path

# By the name they are installed under; looked up and not imported, which takes seconds each.
PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "triton": "the triton backend",
    "rich": "the benchmarks and the report of the backends",
    "pytest": "the tests",
    "hypothesis": "the tests",
    "pytest-xdist": "running tests side by side (optional)",
    "pydantic": "diffpo: training and decoding",
    "tyro": "diffpo.train",
    "transformers": "diffpo",
    "tokenizers": "diffpo",
    "safetensors": "diffpo",
    "tensorboard": "diffpo.train",
    "matplotlib": "diffpo.train",
    "liger-kernel": "a baseline of the kernel benchmark (optional)",
    "cut-cross-entropy": "a baseline of the kernel benchmark (optional)",
}


def packages() -> int:
    """Say what is missing and what then cannot run; never a failure, as each part that needs one fails by itself."""
    for name, purpose in PACKAGES.items():
        try:
            print(name, metadata.version(name))
        except Exception as error:  # a broken installation can raise anything
            print(f"MISSING {name}, needed for {purpose}: {type(error).__name__}: {error}")
    return 0


def extension() -> int:
    """Setup reports a failed build instead of failing; here it counts."""
    from diffpo_kernels import backends

    native = backends.native_module()
    if native is None:
        print(f"the extension is missing: {backends.missing_extension_reason()}")
        return 1
    if not native.has_cuda:
        print(f"the extension has no CUDA kernels: {backends.build_report()}")
        return 1
    print(f"extension with CUDA kernels, CPU instruction set {native.instruction_set}")
    return 0


def training(summary: str, device: str = "cuda") -> int:
    """Two updates of DiFFPO on the shipped countdown model; the run's summary is copied to `summary`."""
    from diffpo import train

    with tempfile.TemporaryDirectory() as runs:
        sizes = ["--updates", "2", "--heldout", "64", "--algorithm.prompts-per-update", "8"]
        code = train.main(["--device", device, "--runs", runs, "--name", "gpu-suite", *sizes])
        found = sorted(Path(runs).rglob("summary.json"))
        if found:
            Path(summary).write_text(found[0].read_text())
    return code


if __name__ == "__main__":
    part, *arguments = sys.argv[1:] or [""]
    parts = {"packages": packages, "extension": extension, "training": training}
    if part not in parts:
        sys.exit(f"{__doc__}\nunknown part {part!r}")
    sys.exit(parts[part](*arguments))
