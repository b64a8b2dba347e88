"""Small parts of gpu_suite.sh: ``python benchmarks/gpu_parts.py packages | extension | training summary.json``."""

import importlib
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

DOWNLOAD = "pip download --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d benchmarks/wheels pydantic tyro math-verify"

SKIPPED = 77  # what gpu_suite.sh takes for it

# By the name they are installed under; looked up and not imported, which takes seconds each.
PACKAGES = {
    "torch": "everything",
    "numpy": "everything",
    "triton": "the triton backend",
    "rich": "the benchmarks and the report of the backends",
    "pytest": "the tests",
    "hypothesis": "property tests (optional)",
    "pytest-xdist": "running tests side by side (optional)",
    "pydantic": "the commands, from the wheels",
    "tyro": "the commands, from the wheels",
    "math-verify": "grading of MATH-500, from the wheels",
    "transformers": "diffpo",
    "tokenizers": "diffpo",
    "safetensors": "diffpo",
    "tensorboard": "diffpo.train (optional)",
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
    folder, wheels = found_wheels()
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels of {size / 1e6:.1f} MB in {folder}" if wheels else "no wheels")
    return 0


def found_wheels() -> tuple[Path | None, list[Path]]:
    """The folder of wheels that $WHEELS names, or of the usual ones the first that has any, and what is in it."""
    named = os.environ.get("WHEELS")
    for folder in map(Path, [named] if named else ["benchmarks/wheels", "wheels"]):
        if wheels := sorted(folder.glob("*.whl")):
            return folder, wheels
    return None, []


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def use_wheels(site: str) -> str | None:
    """Make what the commands need importable, in child processes too, from wheels where it is missing; or say why that cannot be."""
    if all(map(importable, ("pydantic", "tyro"))):
        return None
    folder, wheels = found_wheels()
    if not wheels:
        return f"training needs pydantic and tyro, and there are no wheels in {os.environ.get('WHEELS') or 'benchmarks/wheels'}: {DOWNLOAD}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
    done = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
    if done.returncode != 0:
        return f"the wheels in {folder} do not install: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    importlib.invalidate_caches()
    return None


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
    """Two updates of DiFFPO on the shipped countdown model; the run's summary is copied to `summary`. 77: its packages are missing."""
    with tempfile.TemporaryDirectory() as site, tempfile.TemporaryDirectory() as runs:
        reason = use_wheels(site)
        if reason is not None:
            print(reason)
            return SKIPPED
        from diffpo import train

        sizes = ["--updates", "2", "--heldout", "64", "--algorithm.prompts-per-update", "8", "--no-sweep"]
        code = train.main(["--device", device, "--runs", runs, "--name", "gpu-suite", *sizes])
        found = sorted(Path(runs).rglob("summary.json"))
        if found:
            Path(summary).write_text(found[0].read_text())
    return code


if __name__ == "__main__":
    part, *arguments = sys.argv[1:] or [""]
    if part in ("-h", "--help"):
        print(__doc__)
        sys.exit()
    parts = {"packages": packages, "extension": extension, "training": training}
    if part not in parts:
        sys.exit(f"{__doc__}\nunknown part {part!r}")
    sys.exit(parts[part](*arguments))
