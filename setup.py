"""Builds the compiled extension with CMake, and installs without it where it cannot be built.

Everything else about the package is in pyproject.toml. The outcome of the build is written to diffpo_kernels/_build_report.json, which
`python -m diffpo_kernels` prints. Environment: DIFFPO_CUDA=0 leaves the CUDA kernels out even where nvcc is found.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake; a failure becomes a line of the build report, never a failed install.

    What was built before goes only when there is something newer, or when it is of other sources: those must not be loaded.
    """

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package = (ROOT if in_place else Path(self.build_lib)) / "diffpo_kernels"
        package.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            report = build_extension(Path(folder)) | {"sources": sources_digest()}
            replace_extension(package, list(Path(folder).glob("_native.*")), report)
        print("diffpo_kernels:", json.dumps(report))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "diffpo_kernels").glob("_*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def replace_extension(package: Path, built: list[Path], report: dict[str, str]) -> None:
    """Put what was built, and the report, into `package`; without anything built, keep an earlier extension of the same sources."""
    written = package / "_build_report.json"
    before = json.loads(written.read_text()) if written.exists() else {}
    earlier = list(package.glob("_native.*"))
    if earlier and not built and before.get("sources") == report["sources"]:
        reason = report["native"]
        report |= {"native": f"kept from an earlier build of the same sources: {reason}", "cuda": before["cuda"]}
    else:
        for stale in earlier:
            stale.unlink()
    for module in built:
        shutil.copy2(module, package / module.name)
    written.write_text(json.dumps(report, indent=2) + "\n")


def sources_digest() -> str:
    """Of all that the extension is compiled from."""
    digest = hashlib.sha256()
    for path in [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").glob("*"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build_extension(package: Path) -> dict[str, str]:
    """Build into `package`, with CUDA if nvcc works; return what happened to each half."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return {
            "native": "no C++ compiler was found at install time",
            "cuda": "no C++ compiler was found at install time",
        }
    if shutil.which("cmake") is None:
        return {"native": "cmake was not found at install time", "cuda": "cmake was not found at install time"}
    nvcc = find_nvcc()
    if nvcc is None:
        cuda = (
            "nvcc was not found at install time"
            if os.environ.get("DIFFPO_CUDA") != "0"
            else "switched off by DIFFPO_CUDA=0"
        )
    else:
        error = run_cmake(package, [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DDIFFPO_CUDA=ON"])
        if error is None:
            return {"native": "built", "cuda": f"built with {nvcc}"}
        cuda = f"nvcc failed at install time: {error}"
    error = run_cmake(package, ["-DDIFFPO_CUDA=OFF"])
    return {"native": "built" if error is None else f"the build failed at install time: {error}", "cuda": cuda}


def find_nvcc() -> str | None:
    if os.environ.get("DIFFPO_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (
        os.environ.get("CUDACXX")
        or shutil.which("nvcc")
        or (shutil.which("nvcc", path=f"{home}/bin") if home else None)
    )


def run_cmake(package: Path, options: list[str]) -> str | None:
    """Configure, build and copy the module into `package`; return None, or the end of the output that explains the failure."""
    with tempfile.TemporaryDirectory() as build:
        try:
            import pybind11

            generator = ["-G", "Ninja"] if shutil.which("ninja") else []
            python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            run(["cmake", "-S", str(ROOT), "-B", build, *generator, *python, *options])
            run(["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)])
            (module,) = [path for path in Path(build).glob("_native*") if path.suffix in (".so", ".pyd", ".dylib")]
            shutil.copy2(module, package / module.name)
        except subprocess.CalledProcessError as failure:
            print(failure.stdout, file=sys.stderr)
            return explain(failure.stdout)
        except (ImportError, OSError, ValueError) as failure:
            return str(failure)
    return None


def run(command: list[str]) -> None:
    print("+", " ".join(command))
    subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def explain(output: str) -> str:
    """The first lines that name an error, as one short line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return " | ".join((errors or lines[-3:])[:3])[:400]


if __name__ == "__main__":
    setup(ext_modules=[Extension("diffpo_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
