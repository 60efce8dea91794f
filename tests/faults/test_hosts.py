"""Head and driver, three nodes, and the store, each in a network namespace of its own, and cables that are cut."""

import json
import subprocess
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import trouble
from hosts import ray_hosts, require_namespaces
from runs import RESULTS

from pipeline.runs.api import run
from pipeline.spec import Settings, load_job

JOB = Path(__file__).parent / "trouble.yaml"
TILES = 45
PAUSE = 0.5  # in each pass through the model: three nodes have something to do until the last one is up

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    require_namespaces()
    with ray_hosts(tmp_path_factory.mktemp("hosts"), "one", "two", "three") as found:
        yield found


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A finished output, by a plain loop."""
    folder = tmp_path_factory.mktemp("known")
    problem, _ = trouble.problem(folder / "orders")
    spec = load_job(JOB, ("executor=serial",), "")
    settings = Settings(**{**spec.model_dump(include=set(Settings.model_fields)), "workers": None})
    return run(problem, settings, str(folder / "out")).hessian


class Run:
    """A run of the job that was planned already, on all hosts; its log tells how it goes."""

    def __init__(self, hosts, known, folder, name):
        self._hosts, self._folder, self.url, self._log = hosts, folder, f"s3://bucket/{name}", folder / "log"
        hosts.copy(known.url, self.url, RESULTS)
        sets = {
            "problem_args.orders": folder / "orders", "problem_args.pause": PAUSE, "address": hosts.address,
            "workers": len(hosts.names), "verify": "false",
        }  # fmt: skip
        words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        command = hosts.hessian("run", str(JOB), "--output", self.url, "--log", str(self._log), *words)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.communicate()

    def events(self, name):
        """What was logged so far of a kind."""
        lines = self._log.read_text().splitlines(keepends=True) if self._log.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line for line in found if line.get("event") == name]

    def places(self):
        """How many tiles each host has stored."""
        return Counter(line["host"] for line in self.events("tile done"))

    def until(self, condition):
        while not condition():
            assert self._process.poll() is None, self._process.communicate()
            time.sleep(0.05)

    def matrix(self):
        """Wait for the end, and read the result."""
        _, errors = self._process.communicate(timeout=400)
        assert self._process.returncode == 0, errors
        file = self._folder / "H.npy"
        export = self._hosts.hessian("export", self.url, "--format", "npy", str(file))
        subprocess.run(export, check=True, capture_output=True)
        return np.load(file)


def seconds(line):
    return datetime.strptime(line["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def test_three_nodes(hosts, known, tmp_path):
    """Each on a host of its own; all work, and the matrix is that of the plain loop."""
    with Run(hosts, known, tmp_path, "three") as three:
        matrix = three.matrix()
    assert set(three.places()) == {"one", "two", "three"}
    assert sum(three.places().values()) == TILES
    np.testing.assert_array_equal(matrix, known.to_numpy())


def test_a_folder_that_each_host_has_for_itself(hosts, tmp_path):
    """Refused by the first worker, before anything is computed."""
    (folder := tmp_path / "out").mkdir()
    for name in hosts.names:
        hosts.join(name, own=folder)
    sets = {"problem_args.orders": tmp_path / "orders", "problem_args.pause": 0, "address": hosts.address}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    command = hosts.hessian("run", str(JOB), "--output", str(folder), *words)
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    for name in hosts.names:
        hosts.join(name)
    assert found.returncode == 2, found.stderr
    assert "is not the same place on node" in found.stderr
    assert not list(folder.glob("receipts/*"))


def test_a_silent_partition(hosts, known, tmp_path, faults):
    """Packets of a node vanish: nobody is told, and calls to it stay open."""
    with Run(hosts, known, tmp_path, "partition") as cut:
        cut.until(lambda: cut.places()["two"] >= 2)
        hosts.hosts.cut("two")
        begun = time.time()
        matrix = cut.matrix()
    hosts.hosts.mend("two")
    (gone,) = cut.events("worker lost")
    print(f"silent partition: noticed after {seconds(gone) - begun:.1f} s")
    assert gone["loss"] == "node"
    assert 1 <= len(gone["tiles"]) <= 3
    assert seconds(gone) - begun < 120
    faults(
        "silent network partition",
        "hosts",
        times=1,
        recomputed=len(gone["tiles"]),
        tiles=TILES,
        equal=np.array_equal(matrix, known.to_numpy()),
    )
    hosts.join("two")


def test_a_partition_that_ends(hosts, known, tmp_path, faults):
    """A worker that was given up is back, with what it has not written yet, while others do its tiles."""
    with Run(hosts, known, tmp_path, "mended") as cut:
        cut.until(lambda: cut.places()["three"] >= 2)
        hosts.hosts.cut("three")
        cut.until(lambda: cut.events("worker lost"))
        hosts.hosts.mend("three")
        matrix = cut.matrix()
    (gone,) = cut.events("worker lost")
    faults(
        "network partition that ends",
        "hosts",
        times=1,
        recomputed=len(gone["tiles"]),
        tiles=TILES,
        equal=np.array_equal(matrix, known.to_numpy()),
    )
    hosts.join("three")


def test_the_store_is_cut_off(hosts, known, tmp_path, faults):
    """For twenty seconds nobody can reach it; workers wait."""
    with Run(hosts, known, tmp_path, "store") as cut:
        cut.until(lambda: len(cut.events("tile done")) >= 8)
        hosts.hosts.cut("s3")
        time.sleep(20)
        hosts.hosts.mend("s3")
        matrix = cut.matrix()
    assert not cut.events("worker lost")
    faults(
        "store cut off for 20 s",
        "hosts",
        times=1,
        recomputed=0,
        tiles=TILES,
        equal=np.array_equal(matrix, known.to_numpy()),
    )
