"""Peak memory of a worker against what was planned: three sizes, two tile shapes, two micro-batches, both formats.

    python tests/benchmarks/memory.py [--results FILE]

Peaks are the resident sets that Ray workers report in their receipts; each run has a worker process of its own.
"""

import argparse
import json
import tempfile
from pathlib import Path

import ray
import torch
from torch import nn

from pipeline import Problem
from pipeline.preflight.planner import make_plan
from pipeline.runs.api import run
from pipeline.spec import Settings
from pipeline.storage.receipts import read_receipt

WIDTHS = (13, 27, 108)  # P = 985, 2,035, 8,110
TILES = ((1, 1), (1, 64))
MICROBATCHES = (8, 64)


def network(hidden):
    """One hidden layer on 64 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 10))
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(64, 64), torch.randint(0, 10, (64,))))


def measure(hidden, tile, microbatch, formats=("zarr",)):
    """Run once, and give planned and measured bytes."""
    settings = Settings(
        dtype="float64",
        chunk=512,
        tile=tile,
        microbatch=microbatch,
        row_group=8,
        workers=1,
        verify=False,
        formats=formats,
    )
    problem = network(hidden)
    plan = make_plan(problem, settings)
    with tempfile.TemporaryDirectory() as folder:
        H = run(problem, settings, f"{folder}/out").hessian
        output = H.output
        receipts = [read_receipt(output, H.manifest, t) for t in plan.tiling.tiles()]
    return {
        "P": problem.layout.size,
        "tile": tile,
        "microbatch": microbatch,
        "formats": formats,
        "tile_bytes": plan.memory.tile_bytes,
        "engine_bytes": plan.memory.engine_bytes,
        "planned_bytes": plan.memory.total_bytes,
        "peak_bytes": max(r.peak_memory_bytes for r in receipts),
        "matrix_bytes": plan.stored_bytes,
    }


def measure_all():
    """Measure every combination."""
    few, many = MICROBATCHES
    cases = [(width, tile, few) for width in WIDTHS for tile in TILES] + [(WIDTHS[-1], TILES[1], many)]
    both = (WIDTHS[-1], TILES[0], few, ("zarr", "parquet"))
    return [measure(*case) for case in (*cases, both)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    text = json.dumps(measure_all(), indent=1)
    ray.shutdown()
    print(text)
    if options.results:
        options.results.write_text(text + "\n")
