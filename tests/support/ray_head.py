"""A real Ray head with its dashboard, in processes of its own, and a way to it that can be cut."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from clouds import free_port

TOKEN = "of-a-test-and-nothing-else-0123456789"
CLIENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # the environment of those who may use it


@dataclass
class Head:
    """A running head.

    Attributes:
        address: of its dashboard.
        port: the same.
    """

    address: str
    port: int


class _EndedError(RuntimeError):
    """A head that did not come up, with the end of its log: another process may have been faster to a port."""


@contextmanager
def ray_head(cpus: int = 2, attempts: int = 3) -> Iterator[Head]:
    """Start a head that asks for a token; end it with all its children."""
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets lie in it
    try:
        for attempt in range(attempts):
            process, port = _started(Path(folder, str(attempt)), cpus)
            try:
                try:
                    _wait_for(port, process, Path(folder, str(attempt), "log"))
                except _EndedError:
                    if attempt == attempts - 1:
                        raise
                    continue
                yield Head(f"http://127.0.0.1:{port}", port)
                return
            finally:
                _end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _started(folder: Path, cpus: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start the process of a head; gives its dashboard's port."""
    folder.mkdir()
    names = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port"]
    names += ["dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port"]
    ports = {name: free_port() for name in names}
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--dashboard-host=127.0.0.1",
        f"--num-cpus={cpus}", f"--temp-dir={folder}/s", *(f"--{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the job's python3
    environment = {**os.environ, **CLIENT, "PATH": path, "RAY_worker_niceness": "0"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True)
    return process, ports["dashboard-port"]


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    """Wait for an answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            list_jobs(f"http://127.0.0.1:{port}")
            return
        except OSError:
            time.sleep(0.2)
    raise _EndedError(log.read_text()[-2000:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that came from it: its children, and its session's, of one that has ended."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def list_jobs(address: str) -> dict[str, str]:
    """All jobs that were ever sent, with their states."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        jobs = json.load(answer)
    return {job["submission_id"]: job["status"] for job in jobs if job["submission_id"]}


class Way:
    """A port of this machine that leads to another, and that can be cut."""

    def __init__(self, port: int) -> None:
        self._target, self._open = port, True
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """End all connections, and refuse others."""
        self._open = False
        for end in self._pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        self._open = True

    def close(self) -> None:
        """Give the port back."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self._open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            self._pairs += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes until there is no more."""
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
