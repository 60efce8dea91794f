"""The whole pipeline against its parts: computing alone, writing alone; and two workers against one.

    python tests/benchmarks/whole.py [--only REGEX] [--repeats N] [--results FILE]

784-32-10 on 10,000 digits of MNIST, P = 25,450, where entries are many and cheap, and the char transformer of the
jobs, where they are few and dear; float32, one torch thread a worker, the same tiles. A run's seconds are those from
the start of its first tile to the end of its last write, as receipts tell: without planning, the start of processes,
and verifying. Computing alone is a worker that writes nothing; writing alone puts the same objects again. All are taken
in turn, and each figure is the median of its turns. Results of cases not run now are kept.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import torch
from ours import worker_of

from pipeline.planning.torch_environment import prepare_environment
from pipeline.preflight.planner import make_plan
from pipeline.runs.api import run
from pipeline.runs.problem_factory import build_problem
from pipeline.spec import Settings
from pipeline.storage.output import MATRIX, Output
from pipeline.storage.receipts import read_receipt

JOBS = Path(__file__).parents[2] / "jobs"
ROOM_BYTES = 8 * 2**30
SAME = {"dtype": "float32", "verify": False}
MLP = "mnist.py:mlp", {"hidden": 32, "samples": 10_000}
TRANSFORMER = "char_transformer.py:transformer", {"steps": 3}
CASES = {
    "784-32-10, upper, none": (MLP, {"symmetry": "upper", "codec": "none", "tile": (4, 4)}),
    "784-32-10, upper, lz4": (MLP, {"symmetry": "upper", "codec": "lz4", "tile": (4, 4)}),
    "784-32-10, mirrored, lz4": (MLP, {"symmetry": "mirrored", "codec": "lz4", "tile": (4, 4)}),
    "char transformer, mirrored, lz4": (TRANSFORMER, {"symmetry": "mirrored", "codec": "lz4", "tile": (1, 16)}),
}


def run_seconds(problem, folder, settings):
    """Seconds from the first tile's start to the last write's end."""
    hessian = run(problem, settings, folder).hessian
    receipts = [read_receipt(hessian.output, hessian.manifest, tile) for tile in hessian.manifest.plan.tiles()]
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


def compare(case, repeats):
    """One problem, and one way to store."""
    (factory, arguments), ways = CASES[case]
    problem = build_problem(factory, arguments, JOBS)
    turns = [turn(problem, SAME | ways) for _ in range(repeats)]
    medians = {name: statistics.median(some[name] for some in turns) for name in turns[0]}
    size = {"P": problem.layout.size, "samples": problem.sample_count}
    environment = {"torch": torch.__version__, "machine": platform.machine()}
    return {"case": case, **size, "repeats": repeats, **medians, "environment": environment}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="regular expression")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "whole.json")
    options = parser.parse_args()
    if (free := psutil.disk_usage(tempfile.gettempdir()).free) < ROOM_BYTES:
        raise SystemExit(f"{free / 2**30:.1f} GiB free in {tempfile.gettempdir()}, {ROOM_BYTES / 2**30:.0f} are needed")
    prepare_environment()  # as the command does
    torch.set_num_threads(1)
    kept = json.loads(options.results.read_text()) if options.results.exists() else []
    rows = {row["case"]: row for row in kept if row["case"] in CASES}
    for case in (case for case in CASES if re.search(options.only, case)):
        rows[case] = compare(case, options.repeats)
        print(rows[case], flush=True)
        text = json.dumps([rows[case] for case in CASES if case in rows], indent=1)
        options.results.write_text(text + "\n")


if __name__ == "__main__":
    main()
