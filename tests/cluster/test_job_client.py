"""Jobs sent to a real Ray head from processes that have no torch: followed, left, found again, ended."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import clouds
import numpy as np
import pytest
import yaml
from commands import command
from ray_head import CLIENT, Way, list_jobs, ray_head

from pipeline import SpecError, open_hessian
from pipeline.cluster import job_client
from pipeline.cluster.job_package import MOST_BYTES, pack
from pipeline.progress import Reporter
from pipeline.runs.api import run_job
from pipeline.runs.status import status
from pipeline.spec import load_job

pytestmark = pytest.mark.full("starts clusters of Ray, and sends them jobs")

MADE = """
import torch
from torch import nn
from parts.net import Held
from pipeline import Problem

def problem(folder):
    torch.manual_seed(0)
    return Problem(Held(folder), nn.MSELoss(), (torch.randn(8, 7), torch.randn(8, 6)))

def broken():
    raise FileNotFoundError("data.npz was not sent")
"""
NET = """
import time
from pathlib import Path

from torch import nn

from .sizes import SIZES

class Held(nn.Sequential):
    # Waits once there are receipts, as long as there is a gate.
    def __init__(self, folder):
        super().__init__(nn.Linear(SIZES[0], SIZES[1]), nn.Tanh(), nn.Linear(SIZES[1], SIZES[2]))
        self.gate, self.receipts = Path(folder, "gate"), Path(folder, "out", "receipts")

    def forward(self, x):
        while self.gate.exists() and len(list(self.receipts.glob("*.json"))) >= 3:
            time.sleep(0.01)
        return super().forward(x)
"""
SPEC = {
    "problem": "made.py:problem", "dtype": "float64", "chunk": 32, "tile": [1, 1], "engine": "jacrev", "row_group": 32,
    "microbatch": 8, "workers": 1, "output": "out",
}  # fmt: skip
TILES = 15
NO_TORCH = "import sys; sys.modules['torch'] = None; from pipeline.cli import main; main()"


@pytest.fixture(scope="module")
def head():
    with ray_head() as running:
        yield running


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job, its source, and much beside it that must stay where it is."""
    files = {
        "made.py": MADE, "parts/__init__.py": "", "parts/net.py": NET, "parts/sizes.py": "SIZES = 7, 9, 6\n",
        "parts/unused.py": "1 / 0\n", "other.py": "import nothing\n", "weights.pt": "w", "data.npz": "d", ".git/x": "x",
        "job.yaml": yaml.safe_dump({**SPEC, "problem_args": {"folder": str(tmp_path)}}), "gate": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Laptop:
    """A `hessian submit` in a process that can import no torch."""

    def __init__(self, folder, address):
        self.out, self.err = folder / f"{time.monotonic_ns()}.out", folder / f"{time.monotonic_ns()}.err"
        words = [sys.executable, "-c", NO_TORCH, "submit", "job.yaml", "--address", address]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(words, stdout=out, stderr=err, env={**os.environ, **CLIENT})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def wait_until(self, found, seconds=180):
        end = time.monotonic() + seconds
        while not found():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def ends(self):
        """The status it ends with."""
        return self.process.wait(180)

    def said(self):
        return self.out.read_text() + self.err.read_text()


def tiles(folder):
    return len(list((folder / "out" / "receipts").glob("*.json")))


def hessian(*arguments, before="", **environment):
    """The command in a process of its own, without torch: status, standard output and standard error."""
    words = [sys.executable, "-c", before + NO_TORCH, *arguments]
    environment = {**os.environ, **CLIENT, **environment}
    found = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    return found.returncode, found.stdout, found.stderr


def test_the_laptop_dies(head, job):
    """The job goes on; its status is seen from elsewhere; the same command finds it, over a way that is cut."""
    gate = job / "gate"
    with Laptop(job, head.address) as laptop:
        laptop.wait_until(lambda: tiles(job) >= 3)
        laptop.process.kill()
        laptop.process.wait()
    name = laptop.err.read_text().split()[1]
    told = status(str(job / "out"))
    assert 3 <= told["done"] < TILES
    assert "heard" in told["lease"]
    way = Way(head.port)
    try:
        with Laptop(job, way.address) as again:
            again.wait_until(lambda: "planning" in again.said())
            assert f"job {name} is running already" in again.said()
            way.cut()
            again.wait_until(lambda: "does not answer, asking again" in again.said())
            way.mend()
            again.wait_until(lambda: "answers again" in again.said())
            gate.unlink()
            assert again.ends() == 0
            said = again.said()
    finally:
        way.close()
    assert [said.count(word) for word in ("building", "planning: preflight", "against double backward")] == [1, 1, 1]
    found = {job: state for job, state in list_jobs(head.address).items() if job.startswith(name)}
    assert found == {name: "SUCCEEDED"}
    assert f"{name} is done before" in hessian("submit", "job.yaml", "--address", head.address)[2]
    run_job(load_job("job.yaml", ["executor=serial", "workers=1"], "serial"), job, Reporter())
    np.testing.assert_array_equal(open_hessian("out").to_numpy(), open_hessian("serial").to_numpy())


def test_left_ended_and_begun_again(head, job):
    gate, address = job / "gate", ("--address", head.address)
    with Laptop(job, head.address) as laptop:
        laptop.wait_until(lambda: tiles(job) >= 3)
        laptop.process.send_signal(signal.SIGINT)
        assert laptop.ends() == 75
    line = laptop.err.read_text().splitlines()[-1]
    assert line.startswith("error: no longer following job hessian-")
    name = line.split()[5].rstrip(";")
    assert f"`hessian cancel {name} --address {head.address}` ends it" in line
    assert "did you mean" in hessian("cancel", name[:-1], *address)[2]
    assert f"job {name} is stopped" in hessian("cancel", name, *address)[1]
    assert f"job {name} has stopped before" in hessian("cancel", name, *address)[1]
    kept = tiles(job)
    gate.unlink()
    assert hessian("submit", "job.yaml", "--detach", *address)[1] == f"{name}-2\n"
    found = hessian("submit", "job.yaml", *address)
    assert found[0] == 0
    assert f"{kept} of {TILES} tiles are there, going on" in found[1]
    assert f"job {name}-2 is" in found[2]


def test_the_status_of_the_job_is_that_of_the_command(head, job):
    broken = ("--set", "problem=made.py:broken", "--set", "problem_args={}")
    found = hessian("submit", "job.yaml", "--address", head.address, *broken)
    assert found[0] == 2
    assert "data.npz was not sent" in found[1]
    assert found[2].splitlines()[-1].endswith("is failed: Job entrypoint command failed with exit code 2,")


def test_without_the_token(head, job):
    status, _, said = hessian("submit", "job.yaml", "--address", head.address, RAY_AUTH_TOKEN="of-somebody-else")
    assert status == 2
    assert "set RAY_AUTH_MODE=token" in said
    assert len(said.splitlines()) == 1


def test_paths_that_a_cluster_cannot_reach(head, job):
    """Behind an address of this machine may be a tunnel: its nodes' names tell."""
    elsewhere = "import platform; platform.node = lambda: 'a-laptop'; "
    address = ("--address", head.address)
    for extra, key in [((), "output"), (("--output", "s3://b/o", "--set", "checkpoint=w.pt"), "checkpoint")]:
        status, _, said = hessian("submit", "job.yaml", *address, *extra, before=elsewhere)
        assert status == 2
        assert said.startswith(f"error: `{key}` got ")
        assert "give the URL of a bucket, or file:///" in said


def test_what_is_sent(job):
    parcel = pack(job / "job.yaml", ["address=auto", "output=s3://bucket/out"])
    assert set(parcel.files) == {"job.yaml", "made.py", "parts/__init__.py", "parts/net.py", "parts/sizes.py"}
    sent = yaml.safe_load(parcel.files["job.yaml"])
    assert sent == {**SPEC, "output": "s3://bucket/out", "problem_args": {"folder": str(job)}}
    same = ["output=s3://bucket/out"]
    assert pack(job / "job.yaml", same).digest == parcel.digest
    assert pack(job / "job.yaml", [*same, "chunk=48"]).digest != parcel.digest
    (job / "other.py").write_text("changed = 1\n")
    assert pack(job / "job.yaml", same).digest == parcel.digest
    (job / "parts" / "sizes.py").write_text("SIZES = 7, 9, 7\n")
    assert pack(job / "job.yaml", same).digest != parcel.digest


def test_what_is_sent_of_others(job):
    assert set(pack(job / "job.yaml", ["problem=a.b:c"], "s3://b/o").files) == {"job.yaml"}
    (job / "specs").mkdir()
    (job / "specs" / "job.yaml").write_text((job / "job.yaml").read_text())
    below = pack(job / "specs" / "job.yaml", ["problem=../made.py:problem"], "s3://b/o")
    assert below.spec.problem == "made.py:problem"
    assert "parts/net.py" in below.files
    assert pack(job / "job.yaml", here=lambda: True).spec.output == str(job / "out")
    assert pack(job / "job.yaml", (), "file:///shared/out").spec.output == "file:///shared/out"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["problem=nowhere.py:f"], "cannot read .*nowhere.py"),
        (["problem=weights.py:f"], "is not a Python file"),
        (["problem=large.py:f"], r"have 4\.19 MB, at most 4\.19 MB are sent \(large.py alone"),
        (["output=null"], "missing key `output`"),
        (["output=memory://x"], "no other process can reach"),
        (["chnk=3"], "unknown key `chnk`"),
    ],
)
def test_what_cannot_be_sent(job, overrides, message):
    (job / "weights.py").write_text("not a Python file\n")
    (job / "large.py").write_text(f"x = '{'x' * MOST_BYTES}'\n")
    with pytest.raises(SpecError, match=message):
        pack(job / "job.yaml", overrides, here=lambda: True)


class NotRay(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *_):
        """Not to the terminal."""


def refused(*arguments):
    begun = time.monotonic()
    status, _, said = command("submit", "job.yaml", *arguments)
    assert status == 2
    assert len(said.splitlines()) == 1
    assert time.monotonic() - begun < 30
    return said


def test_wrong_addresses(job, monkeypatch):
    assert "no answer as of a Ray dashboard" in refused("--address", f"http://127.0.0.1:{clouds.free_port()}")
    assert "expected that of the dashboard, as http://" in refused("--address", "127.0.0.1:6379")
    monkeypatch.setattr(job_client, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "timed out" in refused("--address", f"http://127.0.0.1:{mute.getsockname()[1]}")
    with HTTPServer(("127.0.0.1", 0), NotRay) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        assert "no answer as of a Ray dashboard" in refused("--address", f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
        thread.join()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "--address got http://a, but RAY_ADDRESS is auto" in refused("--address", "http://a")


@pytest.mark.parametrize("arguments", [["submit", "job.yaml"], ["cancel", "x"], ["submit", "--help"]])
def test_neither_torch_nor_a_dashboard(job, arguments):
    """One line, where nobody listens."""

    status, _, said = hessian(*arguments, RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{clouds.free_port()}")
    assert status == (0 if "--help" in arguments else 2), said
    assert len(said.splitlines()) == status // 2
