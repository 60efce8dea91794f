"""What a GPU is going to spend its time on, from shapes alone: FLOPs, bytes and launches of the product's own code.

    python tests/benchmarks/roofline.py [--card h100|h200] [--results FILE]

784-128-10, P = 101,770: the tiles that a GPU's worker has are computed on torch's meta device, which carries shapes and
no numbers, with the constants of CUDA. Each operation takes what its arithmetic takes at RATES, or its bytes, or a
launch, whichever is most. Computed, not measured. Bytes on the way out are a plan's (`pipeline.planning`).
"""

import argparse
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipeline import Problem
from pipeline.engines import factored, products
from pipeline.engines.registry import Part, add_batch
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.machine_profiles import ENCODED_BYTES, PINNED_SHARE, find_profile
from pipeline.planning.tile_shapes import choose_tiling
from pipeline.problem.contexts import exact_kernels
from pipeline.problem.read_once import ReadOnce
from pipeline.results.verify import DIRECTIONS, GROUP, MEASURED, OTHERS, SAMPLED_ROWS, SWEEPS
from pipeline.spec import Settings

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
# Of a second: what products reach of the data sheet's FLOP/s, bytes of its memory, and of a launch.
REACHED = 0.75
MEMORY = {"h100": 2.6e12, "h200": 3.8e12}
LAUNCH = 2.5e-6
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
         "as_strided", "detach", "alias", "split", "unbind", "_reshape_alias", "diagonal"}  # fmt: skip


class OneUnit(ReadOnce):
    """Each input of the second layer depends on one unit: there is no number on the meta device to be read."""

    def bound(self, key, count, most):
        return 1


class Count(TorchDispatchMode):
    """Count what passes."""

    def __init__(self, card, dtype, *, splits):
        super().__init__()
        profile = find_profile(card)
        peak = profile.float64 if dtype == torch.float64 else profile.tf32 if splits else profile.float32
        self.peak, self.memory = REACHED * peak, MEMORY[card]
        self.total = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in VIEWS or name.startswith(("empty", "new_empty", "sym_")):
            return found
        flops = 0
        if (counted := flop_registry.get(function._overloadpacket)) is not None:
            flops = counted(*args, **(kwargs or {}), out_val=found)
        tensors = {id(t): t for t in tree_leaves((args, kwargs, found)) if isinstance(t, torch.Tensor)}
        size = sum(t.numel() * t.itemsize for t in tensors.values())
        seconds = max(flops / self.peak, size / self.memory, LAUNCH)
        self.total.update(flops=flops, bytes=size, launches=1, seconds=seconds)
        self.total["product seconds"] += seconds * bool(flops)
        return found


def network(samples):
    """784-128-10, on zeros."""
    model = nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 10))
    return Problem(model, nn.CrossEntropyLoss(), (torch.zeros(samples, 784), torch.zeros(samples, dtype=torch.long)))


def placed_on_meta(problem, dtype):
    """The problem on the meta device, with the constants of CUDA."""
    for constants in (products.STRIP_BYTES, products.OPERAND_BYTES, factored.DIRECTIONS):
        constants["meta"] = constants["cuda"]
    return replace(problem.place(dtype, "meta"), counts=OneUnit())


def tiles_of(layout, dtype, engine):
    """The tiles of one worker on a GPU of 80 GB."""
    settings = Settings(symmetry="upper", dtype=str(dtype).removeprefix("torch."), gpus_per_worker=1.0)
    return choose_tiling(layout, dict.fromkeys(layout.names, engine), settings, dtype.itemsize, 128 * GIB, 1, 60 * GIB)


def computing(problem, tiling, dtype, engine, card, microbatch):
    """All tiles."""
    placed, counted = placed_on_meta(problem, dtype), Count(card, dtype, splits=engine == "factored_tf32x3")
    with exact_kernels(problem.model), counted:
        for tile in tiling.tiles():
            rows, cols = tiling.span(tile.rows), tiling.span(tile.cols)
            right = range(max(cols.start, rows.start), cols.stop)
            out = torch.empty(len(rows), len(right), dtype=dtype, device="meta")
            for batch in placed.batches(microbatch):
                add_batch(engine, placed, TRAITS[engine].habit.most_rows["cuda"], batch, [Part(rows, right, out)])
    return counted.total


def proving(problem, card):
    """The reference's products, in float64 alone."""
    size = problem.layout.size
    counted = Count(card, torch.float64, splits=False)
    vectors = DIRECTIONS * math.ceil(size / GROUP) + SAMPLED_ROWS + SWEEPS + 2 * (1 + OTHERS) * MEASURED
    placed = placed_on_meta(problem, torch.float64)
    directions = torch.empty(vectors, size, dtype=torch.float64, device="meta")
    own = {name: t.requires_grad_() for name, t in placed.parameters.items()}
    with exact_kernels(problem.model), torch.enable_grad(), counted:
        for batch in placed.batches(1024):
            gradient = torch.autograd.grad(placed.loss_sum(own, batch)[0], list(own.values()), create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradient])
            for direction in directions:
                torch.autograd.grad(flat @ direction, list(own.values()), retain_graph=True)
    return counted.total


def row_of(samples, dtype, engine, card):
    """A row of the table."""
    problem, profile = network(samples), find_profile(card)
    size = problem.layout.size
    tiling = tiles_of(problem.layout, dtype, engine)
    found = computing(problem, tiling, dtype, engine, card, min(samples, 10_000))
    chunks = sum(len(tiling.chunks(tile)) for tile in tiling.tiles())
    stored = chunks * tiling.chunk**2 * dtype.itemsize
    way_out = {
        "copying": stored / (PINNED_SHARE * profile.bus_bytes),
        "encoding": stored / ENCODED_BYTES["lz4"],
        "putting, to a bucket": stored / profile.store_bytes,
    }
    print(samples, dtype, engine, dict(found), way_out, flush=True)
    return {
        "samples": samples,
        "dtype": str(dtype).removeprefix("torch."),
        "engine": engine,
        "tiles": len(tiling.tiles()),
        "flops": found["flops"],
        "flops over N P^2": found["flops"] / (3 if "tf32" in engine else 1) / samples / size**2,
        "device_bytes": found["bytes"],
        "launches": found["launches"],
        "computing": found["seconds"],
        "of which products": found["product seconds"],
        "to_the_host_bytes": stored,
        **way_out,
        "proof's products": proving(problem, card)["seconds"],
    }


HEADS = "N", "type", "engine", "tiles", "FLOPs", "/ N P^2", "device bytes", "launches", "computing, s", "products, s"
OUT = "to the host", "copying, s", "encoding, s", "a bucket, s", "proof's products, s"


def table(rows):
    lines = [" | ".join((*HEADS, *OUT)), "|".join(["---"] * len(HEADS + OUT))]
    for row in rows:
        samples, *rest = row.values()
        cells = [f"{samples:,}", *(each if isinstance(each, str) else f"{each:.3g}" for each in rest)]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=MEMORY, default="h100")
    parser.add_argument("--results", type=Path, default=RESULTS / "roofline.md")
    options = parser.parse_args()
    cases = [(10_000, torch.float32, "factored"), (10_000, torch.float32, "factored_tf32x3"),
             (10_000, torch.float64, "factored"), (60_000, torch.float32, "factored_tf32x3"),
             (60_000, torch.float64, "factored")]  # fmt: skip
    rows = [row_of(*case, options.card) for case in cases]
    title = f"# 784-128-10 on one {options.card}, by shapes: computed, not measured\n\n"
    options.results.write_text(title + table(rows))
    options.results.with_suffix(".json").write_text(json.dumps({"card": options.card, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
