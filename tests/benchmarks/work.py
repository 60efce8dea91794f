"""How much work the upper triangle saves: `jacrev` on the tiles of a plan against the same engine on the full square.

    python tests/benchmarks/work.py [--results FILE]

Prints FLOPs (torch's counter: matrix products) and seconds, in turn, several repeats, on one thread.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import Problem
from pipeline.engines.registry import ENGINES
from pipeline.planning.tiling import default_chunk, plan_tiles
from pipeline.problem.contexts import exact_kernels

ROW_GROUP, REPEATS = 64, 5


def equal_layers(layers=8, width=20, samples=64):
    """A tanh network of equal layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))
    return Problem(model, nn.MSELoss(), (torch.randn(samples, width), torch.randn(samples, width)))


def full_square(placed):
    """All rows against all columns."""
    size = placed.layout.size
    out = torch.zeros(size, size)
    with exact_kernels(placed.problem.model):
        ENGINES["jacrev"](placed, ROW_GROUP).add(next(placed.batches(None)), range(size), range(size), out)
    return out


def upper_triangle(placed):
    """The tiles of the default plan, as a worker computes them."""
    layout = placed.layout
    plan = plan_tiles(layout, "all", default_chunk(layout.size), (1, 10**6))
    out = torch.zeros(layout.size, layout.size)
    engine, batch = ENGINES["jacrev"](placed, ROW_GROUP), next(placed.batches(None))
    with exact_kernels(placed.problem.model):
        for tile in plan.tiles():
            rows, cols = plan.span(tile.rows), plan.span(tile.cols)
            for _, segment in layout.segments(rows):
                right = range(max(cols.start, segment.start), cols.stop)
                engine.add(batch, segment, right, out[segment.start : segment.stop, right.start : right.stop])
    return out


def flops(function, placed):
    with FlopCounterMode(display=False) as counter:
        function(placed)
    return counter.get_total_flops()


def measure():
    """Give FLOPs and median seconds of both, and their ratios."""
    torch.set_num_threads(1)
    placed = equal_layers().place(torch.float32)
    seconds = {full_square: [], upper_triangle: []}
    for _ in range(REPEATS):
        for function, times in seconds.items():
            start = time.perf_counter()
            function(placed)
            times.append(time.perf_counter() - start)
    square, upper = (statistics.median(times) for times in seconds.values())
    square_flops, upper_flops = flops(full_square, placed), flops(upper_triangle, placed)
    return {
        "P": placed.layout.size,
        "full_square": {"flops": square_flops, "seconds": square},
        "upper_triangle": {"flops": upper_flops, "seconds": upper},
        "flops_ratio": upper_flops / square_flops,
        "seconds_ratio": upper / square,
        "environment": {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "repeats": REPEATS},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    text = json.dumps(measure(), indent=1)
    print(text)
    if options.results:
        options.results.write_text(text + "\n")
