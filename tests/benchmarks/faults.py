"""What surviving costs where nothing happens, and how long a lost node holds its tiles up.

    python tests/benchmarks/faults.py [--repeats N] [--results FILE]

Overhead: 784-32-10 on digits of MNIST, P = 25,450, float32, two Ray workers, nothing disturbed. Over the seconds from
the start of the first tile to the end of the last write, as receipts tell: the driver's CPU seconds meanwhile, on its
own thread (its loop, without waiting) and on all threads of its process, Ray's included; the seconds in which the lease
is kept; and those of putting all receipts once more, one after the other. The same for very small tiles, of which it is
the price of one that tells.
Recovery: three nodes of one worker each; one is killed by SIGKILL. Seconds until the driver knows, until the first and
the last of the tiles that were there are computed by another, and until they are stored.
Medians of repeats, with the extremes. Written to `results/overhead.json`.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE.parent),
    str(HERE.parent / "support"),
    str(HERE.parent / "faults"),
    str(HERE.parents[1]),
    str(HERE.parents[1] / "jobs"),
]
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}

import mnist  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
import trouble  # noqa: E402
from nodes import Nodes  # noqa: E402
from runs import planned_copy  # noqa: E402

from pipeline.cluster import executor as ray_executor  # noqa: E402
from pipeline.execution.driver import Driver  # noqa: E402
from pipeline.progress import Reporter  # noqa: E402
from pipeline.runs import lease  # noqa: E402
from pipeline.runs.api import run  # noqa: E402
from pipeline.spec import Settings  # noqa: E402
from pipeline.storage.output import Output  # noqa: E402
from pipeline.storage.receipts import read_receipt, receipt_name  # noqa: E402

SAMPLES = 2500
LARGE = Settings(dtype="float32", tile=(5, 5), symmetry="upper", workers=2, verify=False)
SMALL = Settings(
    dtype="float64", chunk=8, tile=(1, 1), engine="jacrev", row_group=8, microbatch=8, workers=2, verify=False
)
SLOW = Settings(
    dtype="float64", chunk=16, tile=(1, 1), engine="jacrev", row_group=16, microbatch=8, executor="serial", verify=False
)
NODES, KILLED_AFTER = 3, 6  # tiles


@contextmanager
def metered():
    """Seconds spent in the driver's process on running tiles, by what they are spent on."""
    seconds = dict.fromkeys(("thread", "process", "lease"), 0.0)

    class Metered(Driver):
        def run(self):
            thread, process = time.thread_time(), time.process_time()
            super().run()
            seconds["thread"], seconds["process"] = time.thread_time() - thread, time.process_time() - process

    def timed(function):
        @wraps(function)
        def call(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds["lease"] += time.perf_counter() - start

        return call

    with ExitStack() as patches:
        patches.enter_context(patch.object(ray_executor, "Driver", Metered))
        patches.enter_context(patch.object(lease, "_numbers", timed(lease._numbers)))
        patches.enter_context(patch.object(lease.Lease, "_put", timed(lease.Lease._put)))
        yield seconds


def overhead(problem, settings):
    """One undisturbed run."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        with metered() as seconds:
            hessian = run(problem, settings, f"{folder}/out").hessian
        receipts = [read_receipt(hessian.output, hessian.manifest, tile) for tile in hessian.manifest.plan.tiles()]
        first = min(receipt.finished - receipt.write_seconds - receipt.compute_seconds for receipt in receipts)
        wall = max(receipt.finished for receipt in receipts) - first
        start = time.perf_counter()
        for receipt in receipts:
            Output(f"{folder}/again").put(receipt_name(receipt.tile), receipt.to_bytes())
        putting = time.perf_counter() - start
    spent = seconds["process"] + seconds["lease"] + putting
    return {
        "tiles": len(receipts),
        "wall_seconds": wall,
        "driver_thread_seconds": seconds["thread"],
        "driver_process_seconds": seconds["process"],
        "lease_seconds": seconds["lease"],
        "receipts_seconds": putting,
        "of_wall": spent / wall,
        "driver_milliseconds_per_tile": seconds["process"] / len(receipts) * 1e3,
        "receipt_milliseconds": putting / len(receipts) * 1e3,
    }


class Kills(Reporter):
    """Kills the node of some worker, after some tiles."""

    def __init__(self, nodes, folder):
        self._nodes, self._receipts, self._left = nodes, folder / "out" / "receipts", KILLED_AFTER
        self.at = None

    def advance(self, tile_bytes):
        self._left -= 1
        if self._left == 0:
            pids = [json.loads(path.read_text())["pid"] for path in self._receipts.glob("*.json")]
            self.at = time.time()
            self._nodes.kill(min(pids))


class Losses(logging.Handler):
    """When a worker was found to be lost, and which tiles it had."""

    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        if record.event == "worker lost":
            self.found.append((record.created, record.tiles, record.loss))


def recovery(nodes, finished):
    """One killed node, in a run that was planned before."""
    nodes.at_least(NODES)
    log, losses = logging.getLogger("pipeline.execution.events"), Losses()
    log.addHandler(losses)
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        folder = Path(scratch)
        problem, _ = trouble.problem(folder / "orders", pause=0.2)
        kills, settings = Kills(nodes, folder), SLOW.model_copy(update={"executor": "ray", "workers": NODES})
        planned_copy(finished, str(folder / "out"))
        try:
            hessian = run(problem, settings, str(folder / "out"), report=kills).hessian
        finally:
            log.removeHandler(losses)
        (noticed, tiles, loss) = losses.found[0]
        receipts = [
            read_receipt(hessian.output, hessian.manifest, tile)
            for tile in hessian.manifest.plan.tiles()
            if tile.id in tiles
        ]
    begun = [receipt.finished - receipt.write_seconds - receipt.compute_seconds - kills.at for receipt in receipts]
    return {
        "tiles": len(tiles),
        "loss": loss,
        "noticed_seconds": noticed - kills.at,
        "first_computed_elsewhere_seconds": min(begun),
        "all_computed_elsewhere_seconds": max(begun),
        "all_stored_seconds": max(receipt.finished for receipt in receipts) - kills.at,
    }


def summary(rows):
    """Of each number the median, the smallest and the largest."""
    found = {}
    for name in rows[0]:
        column = [row[name] for row in rows]
        if isinstance(column[0], str):
            found[name] = column
        else:
            found[name] = {"median": statistics.median(column), "least": min(column), "most": max(column)}
    return found


def repeated(times, function, *arguments):
    rows = []
    for _ in range(times):
        rows.append(function(*arguments))
        print(function.__name__, rows[-1], flush=True)
    return summary(rows)


def undisturbed(repeats):
    return repeated(repeats, overhead, mnist.mlp(hidden=32, samples=SAMPLES), LARGE)


def very_small_tiles(repeats):
    with tempfile.TemporaryDirectory() as folder:
        return repeated(repeats, overhead, trouble.problem(f"{folder}/orders", hidden=22)[0], SMALL)


def a_node_is_killed(repeats):
    nodes = Nodes()
    ray.init(address=nodes.cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            finished = run(trouble.problem(f"{folder}/orders")[0], SLOW, f"{folder}/out").hessian.output
            return repeated(repeats, recovery, nodes, finished)
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()


PARTS = {part.__name__: part for part in (undisturbed, very_small_tiles, a_node_is_killed)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="the others stay as recorded")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    found["environment"] = {"ray": ray.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    for name in options.only:
        found[name] = {"repeats": options.repeats} | PARTS[name](options.repeats)
        options.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
