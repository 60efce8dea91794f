"""The whole pipeline against its parts: computing alone, writing alone; and two workers against one.

    python tests/benchmarks/whole.py [--samples N] [--repeats N] [--results FILE]

784-32-10 on 10,000 digits of MNIST, P = 25,450, float32, one torch thread a worker, the same tiles. A run's seconds are
those from the start of its first tile to the end of its last write, as receipts tell: without planning, the start of
processes, and verifying. Computing alone is a worker that writes nothing; writing alone puts the same objects again.
All are taken in turn, and each figure is the median of its turns.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from ours import worker_of

from pipeline.factory import build_problem
from pipeline.output import MATRIX, Output
from pipeline.pages import ask_for_large_pages
from pipeline.planner import make_plan
from pipeline.receipts import read_receipt
from pipeline.run import run
from pipeline.spec import Settings

JOBS = Path(__file__).parents[2] / "jobs"
ROOM_BYTES = 8 * 2**30
CASES = (("upper", "none"), ("upper", "lz4"), ("mirrored", "lz4"))
SAME = {"dtype": "float32", "tile": (4, 4), "verify": False}


def run_seconds(problem, folder, settings):
    """Seconds from the first tile's start to the last write's end."""
    hessian = run(problem, settings, folder).hessian
    receipts = [read_receipt(hessian.output, tile) for tile in hessian.manifest.plan.tiles()]
    start = min(r.finished - r.write_seconds - r.compute_seconds for r in receipts)
    return max(r.finished for r in receipts) - start


def computing_seconds(problem, settings):
    plan = make_plan(problem, settings)
    worker = worker_of(problem, plan.manifest, plan.at.gradient)
    start = time.perf_counter()
    for tile in plan.dearest_first():
        worker.values(tile)
    return time.perf_counter() - start


def writing_seconds(folder):
    """Seconds and bytes of putting the objects of a finished run once more."""
    source = Output(folder)
    objects = {name: source.get(f"{MATRIX}/{name}") for name in source.sizes(MATRIX) if name.startswith("c/")}
    with tempfile.TemporaryDirectory() as other:
        target = Output(other)
        start = time.perf_counter()
        for name, data in objects.items():
            target.put(name, data)
        return time.perf_counter() - start, sum(map(len, objects.values()))


def turn(problem, ways):
    """Seconds of the parts and of the whole, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        one = run_seconds(problem, f"{folder}/one", Settings(workers=1, **ways))
        writing, size = writing_seconds(f"{folder}/one")
    with tempfile.TemporaryDirectory() as folder:
        two = run_seconds(problem, f"{folder}/two", Settings(workers=2, **ways))
    computing = computing_seconds(problem, Settings(executor="serial", **ways))
    return {
        "bytes": size,
        "computing_seconds": computing,
        "writing_seconds": writing,
        "one_worker_seconds": one,
        "two_workers_seconds": two,
        "whole_over_slower_part": one / max(computing, writing),
        "two_workers_times_as_fast": one / two,
    }


def compare(problem, symmetry, codec, repeats):
    """One way to store."""
    turns = [turn(problem, SAME | {"symmetry": symmetry, "codec": codec}) for _ in range(repeats)]
    medians = {name: statistics.median(some[name] for some in turns) for name in turns[0]}
    return {"symmetry": symmetry, "codec": codec, "repeats": repeats} | medians


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "whole.json")
    options = parser.parse_args()
    if (free := psutil.disk_usage(tempfile.gettempdir()).free) < ROOM_BYTES:
        raise SystemExit(f"{free / 2**30:.1f} GiB free in {tempfile.gettempdir()}, {ROOM_BYTES / 2**30:.0f} are needed")
    ask_for_large_pages()  # as the command does
    torch.set_num_threads(1)
    problem = build_problem("mnist.py:mlp", {"hidden": 32, "samples": options.samples}, JOBS)
    rows = []
    for case in CASES:
        rows.append(compare(problem, *case, options.repeats))
        print(rows[-1], flush=True)
    environment = {"torch": torch.__version__, "machine": platform.machine(), "P": problem.layout.size}
    text = json.dumps({"environment": environment | {"samples": options.samples}, "cases": rows}, indent=1)
    options.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
