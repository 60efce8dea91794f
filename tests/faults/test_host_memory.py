"""A node whose memory runs low: Ray's own monitor, which kills workers, on a cluster of its own."""

import logging

import numpy as np
import psutil
import pytest
import ray
import trouble
from ray.cluster_utils import Cluster

from pipeline.progress import Reporter
from pipeline.runs.api import run
from pipeline.spec import Settings

pytestmark = pytest.mark.long

WORKERS, TAKEN_BYTES = 3, 2 * 2**30  # by the worker that is told to
SETTINGS = {"dtype": "float64", "chunk": 16, "tile": (1, 1), "engine": "jacrev", "row_group": 16, "microbatch": 8}


class GivesOrder(Reporter):
    """After some tiles."""

    def __init__(self, orders, tiles, order):
        self._orders, self._left, self._order = orders, tiles, order

    def advance(self, tile_bytes):
        self._left -= 1
        if self._left == 0:
            self._orders.give(self._order)


@pytest.fixture
def low_memory():
    """A node of three CPUs, whose monitor acts once half of what a worker is going to take is taken."""
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    # Of the machine; the workers themselves, not there yet, take about 0.4 GB each.
    threshold = (used + WORKERS * 400e6 + TAKEN_BYTES / 2) / memory.total
    if threshold > 0.95:
        pytest.skip(f"{memory.available / 2**30:.1f} GiB of memory are free, {2 * TAKEN_BYTES / 2**30:.0f} are needed")
    config = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100}
    head = {"num_cpus": WORKERS, "include_dashboard": False, "_system_config": config}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_memory_of_a_node_runs_low(low_memory, tmp_path, caplog, faults):
    """The worker is killed; the others have more room from then on, and the tile is computed by one of them."""
    problem, orders = trouble.problem(tmp_path / "orders", pause=0.1)
    caplog.set_level(logging.DEBUG, "pipeline.execution.events")
    settings = Settings(**SETTINGS, workers=WORKERS, verify=False)
    outcome = run(problem, settings, str(tmp_path / "out"), report=GivesOrder(orders, 5, "take memory"))
    assert orders.left() == 0
    assert outcome.lost["memory"] >= 1
    said = [record for record in caplog.records if record.name == "pipeline.execution.events"]
    at = max(k for k, record in enumerate(said) if record.event == "worker lost")
    assert max(record.workers for record in said[:at] if record.event == "staff") == WORKERS
    assert max(record.workers for record in said[at:] if record.event == "staff") < WORKERS
    plain, _ = trouble.problem(tmp_path / "none")
    known = run(plain, Settings(**SETTINGS, executor="serial", verify=False), None).hessian.to_numpy()
    faults(
        "memory of a node runs low",
        "Ray node",
        times=1,
        recomputed=sum(outcome.lost.values()),
        tiles=outcome.tiles,
        equal=np.array_equal(outcome.hessian.to_numpy(), known),
    )
