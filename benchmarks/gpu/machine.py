"""What is on this machine: the GPU, the libraries and the code.

`python -m benchmarks.gpu.machine` prints the first two as JSON. Libraries are imported in that
process alone, so a library that crashes does not end the command.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("runtime", "engines", "calibration")
"""Folders of this checkout that packages are imported from, besides its root."""
PRODUCT = ("sg_export", "engines/sg_engines", "runtime/sg_runtime", "calibration/sg_calibration")
CODE = (*PRODUCT, "benchmarks/gpu", "tests/sg_runtime/test_gpu.py")
"""What the results depend on."""

MODULES = {
    "cuda": "cuda-bindings",
    "numpy": "numpy",
    "PIL": "pillow",
    "pydantic": "pydantic",
    "click": "click",
    "rich": "rich",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "ml_dtypes": "ml-dtypes",
    "safetensors": "safetensors",
    "sympy": "sympy",
    "polygraphy": "polygraphy",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt-rtx",
}
"""Distribution of every module that a part may need, besides torch and onnxruntime."""

MEASURED = ("torch", "onnxruntime", "cuda", "numpy", "onnx", "onnx_ir", "onnxscript", "tensorrt", "tensorrt_rtx")
"""Modules whose versions belong to a result."""


@dataclass(frozen=True, slots=True)
class Found:
    """What is installed here.

    card: name of the first GPU, or "" if PyTorch finds none.
    driver: version of NVIDIA's driver, or "unknown".
    cuda: CUDA version that PyTorch was built with, or "".
    providers: execution providers of ONNX Runtime.
    versions: version of every installed module of MODULES, of torch and of onnxruntime; "unknown"
    if it has no metadata.
    errors: why a module cannot be imported.
    """

    card: str
    driver: str
    cuda: str
    providers: tuple[str, ...]
    versions: Mapping[str, str]
    errors: Mapping[str, str]

    @property
    def measured(self) -> dict[str, str]:
        """Versions of Python and of the libraries that matter to a measurement."""
        python = {"python": platform.python_version()}
        return python | {name: self.versions[name] for name in MEASURED if name in self.versions}


def find(timeout: float = 120) -> Found:
    """Look for the GPU and the libraries, in a process of its own.

    Raises RuntimeError if that process fails.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)}: did not end within {timeout:g} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {last[0]}")
    given = json.loads(done.stdout.splitlines()[-1])  # libraries print what they like before
    return Found(**{**given, "providers": tuple(given["providers"])})


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that uses the packages of this checkout."""
    path = [str(ROOT), *(str(ROOT / room) for room in ROOMS), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, **more}


def code(root: Path = ROOT, commit: str | None = None) -> tuple[str, str]:
    """Return the commit and the SHA-256 of the code that is measured.

    commit: the commit, if the caller knows it. By default git is asked for the last commit that
    changed the code. It is "unknown" without a repository. "+changes" follows if files differ.
    """
    if commit is None:
        paths = [path for path in CODE if (root / path).exists()]
        commit = _git(root, "log", "-1", "--format=%h", "--", *paths) or "unknown"
        if commit != "unknown" and _git(root, "status", "--porcelain", "--", *paths):
            commit += "+changes"
    return commit, digest(root / path for path in CODE)


def digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files, and of the Python files in folders, with their names."""
    sha = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []:
            content = file.read_bytes()
            sha.update(f"{file.relative_to(path.parent).as_posix()} {len(content)}\n".encode() + content)
    return sha.hexdigest()


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def look() -> Found:
    """Import torch and ONNX Runtime and look for everything else without importing it."""
    versions, errors = {}, {}
    for module, distribution in MODULES.items():
        if find_spec(module) is not None:
            versions[module] = _version(distribution)
    card = cuda = ""
    providers: list[str] = []
    try:
        import torch

        versions["torch"], cuda = torch.__version__, torch.version.cuda or ""
        if torch.cuda.is_available():
            card = torch.cuda.get_device_name(0)
    except (ImportError, OSError, RuntimeError) as error:
        errors["torch"] = str(error)
    try:
        import onnxruntime

        versions["onnxruntime"], providers = onnxruntime.__version__, onnxruntime.get_available_providers()
    except (ImportError, OSError) as error:
        errors["onnxruntime"] = str(error)
    return Found(card, _driver(), cuda, tuple(providers), versions, errors)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip() if done.returncode == 0 else "unknown"


if __name__ == "__main__":
    print(json.dumps(asdict(look())))
