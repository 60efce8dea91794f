"""Workers and nodes that are really lost: Ray processes on a cluster of several nodes, each with its own raylet."""

import json
import logging
import tempfile
import time
import urllib.request
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import trouble
from nodes import Nodes
from runs import RESULTS

from pipeline import NotFiniteError, TileError, WorkerError
from pipeline.execution.worker import Worker
from pipeline.progress import Reporter
from pipeline.runs.api import run
from pipeline.runs.status import status
from pipeline.spec import Settings
from pipeline.storage.output import Output
from pipeline.storage.receipts import read_receipt
from pipeline.storage.run_files import read_manifest

pytestmark = pytest.mark.full("kills workers of Ray")

SETTINGS = {"dtype": "float64", "chunk": 16, "tile": (1, 1), "engine": "jacrev", "row_group": 16, "microbatch": 8}
TILES = 45


@pytest.fixture(scope="module")
def nodes():
    cluster = Nodes()
    ray.init(address=cluster.cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.cluster.shutdown()


class At(Reporter):
    """Does something once so many tiles are done."""

    def __init__(self, tiles, act):
        self.left, self.act = tiles, act

    def advance(self, tile_bytes):
        self.left -= 1
        if self.left == 0:
            self.act()


@cache
def undisturbed():
    """A run that nothing befell: what it left, by name, and the matrix."""
    with tempfile.TemporaryDirectory() as folder:
        problem, _ = trouble.problem(f"{folder}/orders")
        outcome = run(problem, Settings(**SETTINGS, executor="serial", verify=False), f"{folder}/out")
        assert outcome.tiles == TILES
        output = outcome.hessian.output
        return {name: output.get(name) for name in output.sizes()}, outcome.hessian.to_numpy()


def computed(problem, output, at=None, *, planned=True, **settings):
    """Run on Ray, from where planning left an output: the outcome."""
    if planned and not output.exists():
        for name, data in undisturbed()[0].items():
            if not name.startswith(RESULTS):
                Output(str(output)).put(name, data)
    return run(problem, Settings(**SETTINGS | {"workers": 2, "verify": False} | settings), str(output), report=at)


@pytest.fixture(scope="module")
def known():
    """The matrix of an undisturbed run."""
    return undisturbed()[1]


@pytest.fixture
def survived(known, faults):
    """Notes what a run survived; its matrix must be that of the undisturbed one."""

    def note(fault, outcome, *, times=1, recomputed=0):
        equal = np.array_equal(outcome.hessian.to_numpy(), known)
        faults(fault, "Ray node", times=times, recomputed=recomputed, tiles=TILES, equal=equal)

    return note


def receipts(hessian):
    """Those of all tiles."""
    return [read_receipt(hessian.output, hessian.manifest, tile) for tile in hessian.manifest.plan.tiles()]


def places(output):
    """How many tiles each process stored."""
    manifest = read_manifest(Output(str(output)))
    found = (read_receipt(Output(str(output)), manifest, tile) for tile in manifest.plan.tiles())
    return Counter(receipt.pid for receipt in found if receipt is not None)


def test_a_worker_dies_in_mid_tile(nodes, tmp_path, survived):
    nodes.at_least(2)
    problem, orders = trouble.problem(tmp_path / "orders")
    outcome = computed(problem, tmp_path / "out", At(3, lambda: orders.give("die", "die")))
    assert orders.left() == 0
    repeated = outcome.lost["died"]
    assert 2 <= repeated <= 6  # of each the one computed, the one waiting and the one being written
    again = [receipt.attempt - 1 for receipt in receipts(outcome.hessian)]
    assert sum(again) == repeated
    survived("worker killed in mid-tile", outcome, times=2, recomputed=repeated)


@pytest.mark.parametrize(("order", "loss"), [("fail", "error"), ("nan", "error"), ("hang", "hung")])
def test_a_tile_fails_once(nodes, tmp_path, survived, order, loss):
    nodes.at_least(2)
    problem, orders = trouble.problem(tmp_path / "orders")
    outcome = computed(problem, tmp_path / "out", At(3, lambda: orders.give(order)), tile_deadline=4)
    assert orders.left() == 0
    assert 1 <= outcome.lost[loss] <= 3
    survived(f"a tile is ordered to {order}", outcome, recomputed=outcome.lost[loss])


def test_memory_of_the_device_runs_out(nodes, tmp_path, known, faults):
    """Split inside the worker, without a tile being given back, and remembered."""
    nodes.at_least(2)
    problem, orders = trouble.problem(tmp_path / "orders")
    outcome = computed(problem, tmp_path / "out", At(3, lambda: orders.give("run out of memory")), workers=1)
    assert not outcome.lost
    halved = [receipt.halvings for receipt in receipts(outcome.hessian)]
    assert set(halved) == {0, 1}
    assert halved.count(1) > TILES / 2
    equal = np.allclose(outcome.hessian.to_numpy(), known, rtol=0, atol=1e-14)  # smaller groups round otherwise
    faults("CUDA out of memory, simulated", "worker", times=1, recomputed=0, tiles=TILES, equal=equal)


def test_a_tile_that_always_fails_is_set_aside(nodes, tmp_path, survived):
    """The rest is finished, and the same call goes on with it."""
    nodes.at_least(1)
    problem, orders = trouble.problem(tmp_path / "orders")
    with pytest.raises(TileError, match=r"1 tile failed each time .* ordered to fail") as error:
        computed(problem, tmp_path / "out", At(3, lambda: orders.give(*["fail"] * 3)), workers=1)
    assert error.value.exit_code == 75
    told = status(str(tmp_path / "out"))
    assert (told["done"], told["failed"], told["finished"]) == (TILES - 1, 1, False)
    assert "ordered to fail" in told["last errors"]
    outcome = computed(problem, tmp_path / "out")
    assert outcome.computed == 1
    survived("a tile fails three times", outcome, times=3, recomputed=1)


def test_a_tile_that_is_never_finite(nodes, tmp_path, survived):
    nodes.at_least(1)
    problem, orders = trouble.problem(tmp_path / "orders")
    with pytest.raises(NotFiniteError, match="1 tile failed each time"):
        computed(problem, tmp_path / "out", At(3, lambda: orders.give(*["nan"] * 3)), workers=1)
    outcome = computed(problem, tmp_path / "out")
    assert outcome.computed == 1
    survived("a tile gives NaN three times", outcome, times=3, recomputed=1)


def test_workers_that_do_not_start(nodes, tmp_path, survived):
    nodes.at_least(2)
    problem, orders = trouble.problem(tmp_path / "orders")
    orders.give("fail to start", "fail to start")
    outcome = computed(problem, tmp_path / "out", workers=1)
    assert orders.left() == 0
    survived("a worker does not start, twice", outcome, times=2)
    problem, orders = trouble.problem(tmp_path / "other")
    orders.give(*["fail to start"] * 3)
    with pytest.raises(WorkerError, match=r"3 workers in a row did not start: .*ordered not to start") as error:
        computed(problem, tmp_path / "never", workers=1)
    assert error.value.exit_code == 75


def test_planning_is_lost(nodes, tmp_path, survived):
    """With a process that dies in it, and with one that does not start; never more than three times."""
    nodes.at_least(2)
    problem, orders = trouble.problem(tmp_path / "orders")
    orders.give("die", "fail to start")
    outcome = computed(problem, tmp_path / "out", planned=False)
    assert orders.left() == 0
    survived("planner killed, another does not start", outcome, times=2)
    problem, orders = trouble.problem(tmp_path / "other")
    orders.give(*["fail to start"] * 3)
    with pytest.raises(WorkerError, match=r"3 workers in a row did not start: .*ordered not to start"):
        computed(problem, tmp_path / "never", planned=False)


def test_a_node_is_killed(nodes, tmp_path, survived):
    nodes.at_least(3)
    problem, _ = trouble.problem(tmp_path / "orders", pause=0.05)
    outcome = computed(problem, tmp_path / "out", At(6, lambda: nodes.kill(min(places(tmp_path / "out")))), workers=3)
    assert 1 <= sum(outcome.lost.values()) <= 3
    survived("node killed", outcome, recomputed=sum(outcome.lost.values()))


def test_a_node_is_drained_and_killed(nodes, tmp_path, survived):
    """What was begun there is finished, and nothing more is given to it."""
    nodes.at_least(3)
    problem, _ = trouble.problem(tmp_path / "orders", pause=0.1)
    drained, killed = [], []

    class Acts(Reporter):
        def __init__(self):
            self.done = 0

        def advance(self, tile_bytes):
            self.done += 1
            if self.done == 6:
                drained.append(nodes.drain())
            elif drained and not killed and nodes.is_left():
                killed.append(nodes.kill())

    outcome = computed(problem, tmp_path / "out", Acts(), workers=3)
    assert drained
    assert killed
    assert not any(outcome.lost.values())  # no tile: it was left in peace before it was killed
    survived("node drained, then killed", outcome)


def test_all_workers_are_lost_and_others_come(nodes, tmp_path, survived):
    nodes.at_least(2)
    problem, _ = trouble.problem(tmp_path / "orders", pause=0.05)

    def replace():
        nodes.at_least(0)
        nodes.add()
        nodes.add()

    outcome = computed(problem, tmp_path / "out", At(6, replace))
    repeated = sum(outcome.lost.values())
    assert 1 <= repeated <= 6
    survived("all nodes killed, others added", outcome, times=2, recomputed=repeated)


def test_a_node_that_joins_late_gets_work(nodes, tmp_path, survived):
    nodes.at_least(1)
    problem, _ = trouble.problem(tmp_path / "orders", pause=0.05)

    class Joins(At):
        def advance(self, tile_bytes):
            super().advance(tile_bytes)
            if self.left < 0 and len(places(tmp_path / "out")) == 1:
                time.sleep(0.5)  # or a slow machine is done before it is up

    outcome = computed(problem, tmp_path / "out", Joins(3, nodes.add), workers=2)
    stored = places(tmp_path / "out")
    assert len(stored) == 2
    assert min(stored.values()) > 3
    survived("node joins late", outcome)


def test_workers_that_are_not_needed_are_let_go(nodes, tmp_path, survived, caplog):
    """At the tail, while the last tile is still being computed: its node may be taken away."""
    nodes.at_least(3)
    problem, orders = trouble.problem(tmp_path / "orders", pause=0.02)
    free = []

    class Told(logging.Handler):
        def emit(self, record):
            if record.event == "staff" and (record.workers, record.queued) == (1, 0):
                free.append(ray.available_resources().get("CPU"))

    told = Told()
    caplog.set_level(logging.DEBUG, "pipeline.execution.events")
    logging.getLogger("pipeline.execution.events").addHandler(told)
    try:
        outcome = computed(problem, tmp_path / "out", At(TILES - 6, lambda: orders.give("dawdle")), workers=3)
    finally:
        logging.getLogger("pipeline.execution.events").removeHandler(told)
    assert orders.left() == 0
    assert free
    survived("surplus workers let go at the tail", outcome)


def test_a_late_writer_changes_nothing(nodes, tmp_path, survived):
    """A worker that was given up writes its tile when another has done so and the run is over."""
    nodes.at_least(2)
    problem, _ = trouble.problem(tmp_path / "orders")
    outcome = computed(problem, tmp_path / "out")
    output, manifest = outcome.hessian.output, outcome.hessian.manifest
    late = Worker(problem, manifest, output)
    late.compute(manifest.plan.tiles()[5])
    (receipt,) = late.flush()
    late.close()
    assert receipt.pid == psutil.Process().pid
    assert computed(problem, tmp_path / "out", verify=True).verification.ok
    survived("late writer of a tile already done", outcome)


def test_metrics_of_the_cluster(nodes, tmp_path):
    """As Ray gives them to Prometheus."""
    nodes.at_least(1)
    problem, orders = trouble.problem(tmp_path / "orders")
    computed(problem, tmp_path / "out", At(3, lambda: orders.give("fail")), workers=1)
    wanted = {"hessian_tiles", "hessian_bytes", "hessian_tile_seconds", "hessian_retries", "hessian_queue_depth"}
    end = time.monotonic() + 60
    missing = wanted
    while missing and time.monotonic() < end:
        pages = [_metrics(node) for node in ray.nodes() if node["Alive"]]
        missing = {name for name in wanted if not any(f"ray_{name}" in page for page in pages)}
        time.sleep(1)
    assert not missing


def _metrics(node: dict[str, Any]) -> str:
    """Read a node's page; one that has only just come up may not answer yet, and one that just died no more."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}", timeout=10) as page:
            return page.read().decode()
    except OSError:
        return ""


def test_receipts_say_where_and_when(nodes, tmp_path):
    nodes.at_least(1)
    problem, _ = trouble.problem(tmp_path / "orders")
    before = time.time()
    computed(problem, tmp_path / "out", workers=1)
    for path in (tmp_path / "out" / "receipts").iterdir():
        receipt = json.loads(path.read_text())
        assert before < receipt["finished"] < time.time()
        assert receipt["host"]
        assert receipt["compute_seconds"] > 0
        assert receipt["write_seconds"] > 0
        assert receipt["peak_memory_bytes"] > 2**20
        assert receipt["attempt"] == 1
