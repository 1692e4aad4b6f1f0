"""A real Triton server on the loopback address, from the wheel `nvidia-pytriton`.

    pip install --no-deps --target .triton -r tests/triton.txt

The wheel carries `tritonserver`, its Python backend and a stub for each Python. The stubs are built
for NumPy 1, so the folder `.triton` has one, which only the server imports.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(os.environ.get("SG_EXPORT_TRITON") or Path(__file__).parent.parent / ".triton").absolute()
"""Folder of the wheels of tests/triton.txt. Their clients come last on the path of this process."""

if FOLDER.is_dir() and str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))

START_SECONDS = 300.0
"""Seconds within which a server must be ready. A busy machine takes minutes."""


@dataclass(frozen=True)
class TritonServer:
    """A server that runs. http, grpc: its addresses, 127.0.0.1:PORT. log: file of its output."""

    process: "subprocess.Popen[bytes]"
    http: str
    grpc: str
    log: Path


def missing() -> str | None:
    """Return what a server lacks on this machine, or None."""
    if any(not (FOLDER / name).is_dir() for name in ("pytriton", "tritonclient", "numpy")):
        return f"no tritonserver in {FOLDER}: pip install --no-deps --target {FOLDER} -r tests/triton.txt"
    if not _stub().exists():
        return f"nvidia-pytriton has no stub for Python {sysconfig.get_python_version()}"
    if not (_library_folder() / str(sysconfig.get_config_var("INSTSONAME"))).exists():
        return f"the Python that runs has no shared library in {_library_folder()}"
    return None


def _parts() -> Path:
    return FOLDER / "pytriton/tritonserver"


def _stub() -> Path:
    return _parts() / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"


def _library_folder() -> Path:
    return Path(str(sysconfig.get_config_var("LIBDIR")))


@contextmanager
def running(repository: Path, scratch: Path, *options: str) -> Iterator[TritonServer]:
    """Start a server of a model repository, and yield it when it is ready. It is ended after that.

    scratch: an empty folder for the backend and the log. options: further options of tritonserver.
    """
    backend = scratch / "backends/python"
    shutil.copytree(_parts() / "backends/python", backend)
    shutil.copy(_stub(), backend)
    (backend / _stub().name).chmod(0o755)
    os.chmod(_parts() / "bin/tritonserver", 0o755)
    http, grpc = _free_ports(2)
    command = [
        *(str(_parts() / "bin/tritonserver"), f"--model-repository={repository}"),
        f"--backend-directory={scratch / 'backends'}",
        *("--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--exit-timeout-secs=20", *options),
    ]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(_environment(scratch / "python") / "bin"), os.environ.get("PATH", "")]),
        "LD_LIBRARY_PATH": os.pathsep.join([str(_library_folder()), str(FOLDER / "nvidia_pytriton.libs")]),
    }
    log = scratch / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        _wait(process, f"http://127.0.0.1:{http}/v2/health/ready", log)
        yield TritonServer(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(folder: Path) -> Path:
    """Make a virtual environment that imports what this process imports, and NumPy 1.

    Return its folder. The stub ignores PYTHONPATH. It takes the environment of the `python3` that
    comes first on PATH.
    """
    program = Path(sys.executable).resolve()
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin/python3").symlink_to(program)
    (folder / "pyvenv.cfg").write_text(f"home = {program.parent}\ninclude-system-site-packages = false\n")
    (packages / "imports.pth").write_text(
        "".join(f"{path}\n" for path in (str(FOLDER), *sys.path) if path and Path(path).is_dir())
    )
    return folder


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Wait until a server is ready. Raises RuntimeError with its log if it ends, or takes long."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            with opener.open(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"tritonserver: expected it to be ready, found\n{log.read_text(errors='replace')[-4000:]}")
