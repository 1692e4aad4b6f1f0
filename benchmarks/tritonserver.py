"""A real Triton server on the loopback address, from the wheel `nvidia-pytriton`.

    pip install --no-deps -r tests/triton.txt

The wheel carries `tritonserver`, its Python backend and a stub for each Python. Its own metadata
asks for NumPy 1, which none of these parts needs, hence `--no-deps`.
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
from importlib.util import find_spec
from pathlib import Path

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
    if find_spec("pytriton") is None or find_spec("tritonclient") is None:
        return "nvidia-pytriton or tritonclient is not installed: pip install --no-deps -r tests/triton.txt"
    if not _stub().exists():
        return f"nvidia-pytriton has no stub for Python {sysconfig.get_python_version()}"
    if not (_library_folder() / str(sysconfig.get_config_var("INSTSONAME"))).exists():
        return f"the Python that runs has no shared library in {_library_folder()}"
    return None


def _parts() -> Path:
    spec = find_spec("pytriton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tritonserver"


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
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "LD_LIBRARY_PATH": os.pathsep.join([str(_library_folder()), str(_parts().parents[1] / "nvidia_pytriton.libs")]),
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
