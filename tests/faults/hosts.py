"""Hosts on one machine: a network namespace each, on one switch, with cables that can be cut. Needs root and `ip`."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.storage.output import Output

NETWORK = "10.77.0"  # in the namespaces alone
RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
STORE_BYTES = 100 * 2**20
STARTS = 3


class Hosts:
    """A network of its own.

    Args:
        names: of the hosts.
    """

    def __init__(self, *names: str) -> None:
        self._prefix = f"hessian-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self.addresses = {name: f"{NETWORK}.{k}" for k, name in enumerate(names, 1)}
        self._processes: list[psutil.Process] = []

    def __enter__(self) -> "Hosts":
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for name, address in self.addresses.items():
            space = self._space(name)
            _ip("netns", "add", space)
            _ip("-n", self._switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", self._switch, "link", "set", name, "master", "switch", "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            # To nowhere: Ray takes the address that would be sent from.
            _ip("-n", space, "route", "add", "default", "via", f"{NETWORK}.254")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            end(process)
        for space in (*map(self._space, self.addresses), self._switch):
            _ip("netns", "del", space)

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """Give the command line that runs a command on a host, under its name."""
        renamed = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
        return ["ip", "netns", "exec", self._space(host), *renamed, *map(str, command)]

    def run(self, host: str, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        return subprocess.run(self.command(host, command), capture_output=True, text=True, check=False)

    def start(self, host: str, *command: str, log: Path | None = None) -> psutil.Popen:
        """Start a command, which the network's end ends, with all its children."""
        with (log or Path(os.devnull)).open("w") as out:
            process = psutil.Popen(self.command(host, command), stdout=out, stderr=out)
        self._processes.append(process)
        return process

    def cut(self, host: str) -> None:
        """Pull its cable: nobody is told."""
        _ip("-n", self._switch, "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Plug it in again."""
        _ip("-n", self._switch, "link", "set", host, "up")

    def _space(self, host: str) -> str:
        return f"{self._prefix}-{host}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def end(process: psutil.Process) -> None:
    """Kill a process and all its children."""
    try:
        family = [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def require_namespaces() -> None:
    """Skip a test where there can be no such hosts."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need Linux, root, `ip` (iproute2) and `unshare`")
    with tempfile.TemporaryFile() as errors:
        name = f"hessian-{os.getpid()}-try"
        if subprocess.run(["ip", "netns", "add", name], stderr=errors, check=False).returncode:
            errors.seek(0)
            pytest.skip(f"network namespaces cannot be made here: {errors.read().decode().strip()}")
    _ip("netns", "del", name)


class RayHosts:
    """A head, hosts of one worker each, and an S3 server, each a host of its own; the driver runs on the head.

    Args:
        hosts: named `head`, `s3`, and what the workers are called.
        folder: for what processes print.
    """

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self._folder = hosts, folder
        self.names = [name for name in hosts.addresses if name not in {"head", "s3"}]
        self._temporary = tempfile.mkdtemp(prefix="ray-")  # short: sockets' names are limited
        self.address = f"{hosts.addresses['head']}:6379"
        endpoint = f"http://{hosts.addresses['s3']}:5000"
        self._environment = [
            "env", f"AWS_ENDPOINT_URL={endpoint}", "AWS_ACCESS_KEY_ID=key", "AWS_SECRET_ACCESS_KEY=secret",
            "AWS_DEFAULT_REGION=us-east-1", "AWS_EC2_METADATA_DISABLED=true", "OMP_NUM_THREADS=1",
            "RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={secrets.token_hex()}",
        ]  # fmt: skip
        hosts.start("s3", sys.executable, "-m", "moto.server", "-H", "0.0.0.0", "-p", "5000", log=folder / "s3.log")
        self._until("s3", f"import urllib.request; urllib.request.urlopen('{endpoint}')")
        bucket = f"import boto3; boto3.client('s3', endpoint_url='{endpoint}').create_bucket(Bucket='bucket')"
        self._until("head", bucket)
        where = (f"--port={self.address.split(':')[1]}", f"--temp-dir={self._temporary}", "--include-dashboard=false")
        self._start("head", "--head", "--num-cpus=0", *where)
        self._nodes: dict[str, psutil.Popen] = {}
        for name in self.names:
            self.join(name)

    def join(self, name: str, own: Path | None = None) -> None:
        """Start a worker's node, in place of the one that was there; a folder may be one that only it has."""
        if name in self._nodes:
            end(self._nodes[name])
        mounted = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(own)] if own else []
        self._nodes[name] = self._start(name, f"--address={self.address}", "--num-cpus=1", within=mounted)

    def hessian(self, *arguments: str) -> list[str]:
        """Give the command line of a command of ours, on the head; `address` is where Ray is."""
        return self.hosts.command("head", (*self._environment, sys.executable, "-m", "pipeline", *arguments))

    def copy(self, folder: Path, url: str, left_out: tuple[str, ...]) -> None:
        """Put the objects of a local output into the bucket, but for those whose names begin so."""
        names = [name for name in Output(str(folder)).sizes() if not name.startswith(left_out)]
        program = (
            "from pipeline.storage.output import Output; import sys; here, there, *names = sys.argv[1:]\n"
            "for name in names: Output(there).put(name, Output(here).get(name))"
        )
        found = self.hosts.run("head", *self._environment, sys.executable, "-c", program, str(folder), url, *names)
        assert found.returncode == 0, found.stderr

    def _start(self, name: str, *options: str, within: Sequence[str] = ()) -> psutil.Popen:
        """Start a node, one at a time: many at once on few cores are not up in the time that Ray gives them."""
        address, log = f"--node-ip-address={self.hosts.addresses[name]}", self._folder / f"{name}.log"
        words = (*within, *self._environment, *RAY, address, f"--object-store-memory={STORE_BYTES}", *options)
        for _ in range(STARTS):
            process = self.hosts.start(name, *words, log=log)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                if "Ray runtime started" in log.read_text():
                    return process
                time.sleep(0.1)
            end(process)
        raise RuntimeError(f"{name} did not start: {log.read_text()}")

    def _until(self, host: str, program: str, seconds: float = 120) -> None:
        """Run a program until it succeeds."""
        stop = time.monotonic() + seconds
        while (found := self.hosts.run(host, *self._environment, sys.executable, "-c", program)).returncode:
            assert time.monotonic() < stop, found.stderr
            time.sleep(0.2)

    def remove(self) -> None:
        """Forget what Ray wrote."""
        shutil.rmtree(self._temporary, ignore_errors=True)


@contextmanager
def ray_hosts(folder: Path, *workers: str) -> Iterator[RayHosts]:
    """Start them, and end them."""
    with Hosts("head", "s3", *workers) as hosts:
        found = RayHosts(hosts, folder)
        try:
            yield found
        finally:
            found.remove()
