"""How long an actor takes from being asked for to its first tile, and what it holds of the problem by then.

    python tests/benchmarks/startup.py [--results FILE]

Actors are started one after the other on a Ray of this machine, each in a process of its own: the first takes one that
Ray has kept ready, the others wait for theirs. Seconds, part by part:
    process     until a process runs what it is told to
    imports     of this package, torch, zarr and all that they need (Ray's own are in `process`)
    unpickling  the problem, read from Ray's object store
    worker      `start`: the problem once more, its digest, the output
    first_tile  computed and written
    second_tile the same again, without what is done but once
Then resident MiB, the object store's pages that are mapped into the process counted: when the problem has arrived, when
it is unpickled, at the end. And the seconds of Ray's start, and of imports alone.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import psutil
import ray
import torch
from torch import nn

from pipeline import Problem
from pipeline.cluster.actors import pickled
from pipeline.execution.executors import Work
from pipeline.preflight.planner import make_plan
from pipeline.results.fingerprint_check import save_weights
from pipeline.spec import Settings
from pipeline.storage.output import Output
from pipeline.storage.run_files import write_manifest
from pipeline.storage.zarr_store import MatrixStore

REPEATS = 3
BALLAST = {"small": 0, "256 MiB": 2**28}  # bytes that the problem has beside its few samples
SETTINGS = {"dtype": "float32", "chunk": 256, "tile": (1, 1), "row_group": 8, "workers": 1, "memory": 4 * 2**30}


def network(ballast):
    """P = 2,710."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 36), nn.Tanh(), nn.Linear(36, 10))
    model.register_buffer("ballast", torch.zeros(ballast, dtype=torch.uint8))
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(200, 64), torch.randint(0, 10, (200,))))


class Timed:
    """An actor that starts a worker's actor inside itself, and looks at the clock in between."""

    def __init__(self, *arguments):
        self.times = {"process": time.time()}
        from pipeline.cluster.actors import Actor

        self.times["imports"] = time.time()
        self.resident = {"arrived": psutil.Process().memory_info().rss}
        self.arguments, self.actor = arguments, Actor(*arguments)

    def first_tiles(self, tiles):
        """Do as a worker does, and give the moments at which each part was done."""
        ray.cloudpickle.loads(self.arguments[0])
        del self.arguments
        self.times["unpickling"] = time.time()
        self.actor.start()
        self.times["worker"] = time.time()
        self.resident["unpickled"] = psutil.Process().memory_info().rss
        for name, tile in zip(("first_tile", "second_tile"), tiles, strict=True):
            self.actor.compute(tile, 1)
            self.actor.compute(None, 1)
            self.times[name] = time.time()
        self.resident["end"] = psutil.Process().memory_info().rss
        return self.times, self.resident, os.getpid()


def prepared(problem, settings, url):
    """Plan, and set an output up: a run up to its first tile."""
    made, output = make_plan(problem, settings), Output(url)
    save_weights(problem, output)
    MatrixStore.create(output, made.manifest, made.at.gradient)
    write_manifest(output, made.manifest)
    return Work(problem, made.manifest, output), made.dearest_first()


def start_one(work, settings, sent, tiles):
    """Start an actor: seconds by part, and resident MiB."""
    asked = time.time()
    actor = ray.remote(num_cpus=1)(Timed).remote(sent, work.manifest, work.output, settings)
    times, resident, pid = ray.get(actor.first_tiles.remote(tiles))
    ray.kill(actor)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=30)
    moments = [asked, *times.values()]
    parts = dict(zip(times, (b - a for a, b in pairwise(moments)), strict=True))
    return parts | {f"resident_{name}_mib": size / 2**20 for name, size in resident.items()}


def measure(ballast):
    """Start actors for one problem."""
    settings, problem = Settings(**SETTINGS), network(ballast)
    with tempfile.TemporaryDirectory() as folder:
        work, tiles = prepared(problem, settings, f"{folder}/out")
        sent = ray.put(pickled(problem))
        found = [start_one(work, settings, sent, tiles[:2]) for _ in range(REPEATS + 1)]
    kept_ready, others = found[0], found[1:]
    medians = {name: round(statistics.median(each[name] for each in others), 3) for name in kept_ready}
    return {
        "problem_bytes": problem.byte_count,
        "process_kept_ready": {name: round(value, 3) for name, value in kept_ready.items()},
        "median_of_others": medians,
        "slowest_of_others": {name: round(max(each[name] for each in others), 3) for name in kept_ready},
    }


def seconds_of(command):
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", command], check=True)
    return round(time.perf_counter() - start, 2)


def main(results):
    start = time.perf_counter()
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    found = {
        "ray_init_seconds": round(time.perf_counter() - start, 2),
        "import_seconds": {
            name: seconds_of(f"import {name}") for name in ("torch", "ray", "pipeline.cluster.executor")
        },
        "repeats": REPEATS,
        **{name: measure(ballast) for name, ballast in BALLAST.items()},
        "environment": {
            "ray": ray.__version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        },
    }
    ray.shutdown()
    text = json.dumps(found, indent=1)
    print(text)
    if results:
        results.write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    main(parser.parse_args().results)
