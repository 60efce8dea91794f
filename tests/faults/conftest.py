"""What the tests of faults share: a server behind the proxy, the `hessian` command, and the table."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import clouds
import pytest
from fault_table import PROPERTY
from proxy import proxied

TESTS = Path(__file__).parents[1]
JOB = """
problem: made.py:mlp
executor: serial
dtype: float64
engine: factored
microbatch: 7
row_group: 32
chunk: 16
tile: [1, 1]
"""
FACTORY = """
import zoo

def mlp():
    return zoo.mlp().problem
"""


@pytest.fixture
def faults(request):
    """Notes a row of the table, and holds the test to an equal result."""
    row = {"test": request.node.nodeid}
    request.node.user_properties.append((PROPERTY, row))

    def note(fault, where, *, times, recomputed, tiles, equal):
        row.update(fault=fault, where=where, times=times, recomputed=recomputed, tiles=tiles, equal=bool(equal))
        assert equal

    return note


@pytest.fixture(scope="module")
def server():
    """A real S3 server, reached through the proxy, by this process and those it starts."""
    with clouds.moto() as behind, proxied(behind) as proxy:
        for _ in clouds.started(lambda: nullcontext(proxy.cloud)):
            yield proxy


@pytest.fixture
def proxy(server, monkeypatch):
    """The same, with nothing going wrong yet, and a client that leaves all patience to the pipeline."""
    clouds.impatient_client(monkeypatch)
    server.clear()
    yield server
    server.clear()


@pytest.fixture
def url(proxy, request):
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return f"{proxy.cloud.url}/{name}"


@pytest.fixture
def hessian(tmp_path):
    """The command, in a process of its own, where the job is `job.yaml`."""
    (tmp_path / "made.py").write_text(FACTORY)
    (tmp_path / "job.yaml").write_text(JOB)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "support")))}

    def run(*arguments):
        command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)

    return run
