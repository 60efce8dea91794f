"""A million parameters on 1 to 1,024 workers, simulated: the real driver, workers that only say how long they take.

    python tests/benchmarks/simulate.py [--results FILE] [--profiles cpu h100 ...]

The network is 784-1024-192-10, P = 1,002,570, on 10,000 digits of MNIST, float32, the upper triangle of chunks: two
terabytes. It is planned as for 256 workers on this machine, where its engines are timed, by seconds of CPU, as many at
a time as it has CPUs; "measured" are workers like these, each of one CPU. Others are data sheets and assumptions, which
are printed. The bound is all computing, or all writing where that is more, shared out evenly among the workers: it
knows no start, no failure, no unevenness. For each number of workers there are the tiles that the planner chooses.

Then the driver alone: a tile for each chunk, some 1e5, on 1,024 workers; its seconds of CPU, and its memory.
"""

import argparse
import json
import platform
import sys
import time
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from pipeline import probe
from pipeline.planner import choose_tiling, make_plan
from pipeline.profiles import CPU_START_SECONDS, CPU_STORE_BYTES, find_profile
from pipeline.simulator import Circumstances, TileSeconds, simulate, tile_seconds
from pipeline.spec import Settings

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))
import mnist

RESULTS = Path(__file__).parent / "results"
WORKERS = tuple(2**k for k in range(11))
PLANNED_FOR = 256
MEMORY = 8 * 2**30
TARGET = 1.05  # makespan over bound, on as many workers as are planned for
# A process dies every two days; one spot node of eight workers in twenty is taken away in an hour.
TROUBLE = Circumstances(spread=0.03, deaths=0.02, preemptions=0.05)


def network():
    """The network after a few steps of training, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 192), nn.Tanh(), nn.Linear(192, 10))
    return mnist.trained(model, *mnist.digits(), steps=20)


def lower_bound(made):
    """Of arithmetic, in operations: 2 N P_l P_m for two layers, N P_l^2 / 2 within one."""
    sizes = {}
    for p in made.manifest.layout:
        sizes[p.name.split(".")[0]] = sizes.get(p.name.split(".")[0], 0) + p.size
    total, squares = sum(sizes.values()), sum(size**2 for size in sizes.values())
    return made.manifest.fingerprint.samples * (total**2 - squares + squares / 2)


def on_cpus(made):
    """Tiles of workers like those measured, whose chunks then go to a bucket while the next tile is computed."""
    costs = {tile: made.tile_cost(tile) for tile in made.dearest_first()}
    return {
        tile: TileSeconds(cost.compute_seconds + cost.write_seconds, cost.bytes / CPU_STORE_BYTES, cost.bytes)
        for tile, cost in costs.items()
    }


def scaled(made, settings, name, start_seconds, costs_of):
    """One kind of worker, by their number."""
    rows = []
    for workers in WORKERS:
        layout, engines = made.manifest.layout, made.manifest.engines
        tiling = choose_tiling(layout, engines, settings, 4, made.allowed_bytes, workers)
        costs = costs_of(replace(made, tiling=tiling))
        for trouble in (Circumstances(), TROUBLE):
            found = simulate(costs, workers, replace(trouble, start_seconds=start_seconds))
            rows.append(
                asdict(found)
                | {
                    "profile": name,
                    "trouble": trouble is TROUBLE,
                    "tile": tiling.tile_shape,
                    "makespan_over_bound": 1 / found.efficiency,
                    "after_start_over_bound": (found.makespan_seconds - start_seconds) / found.bound_seconds,
                    "largest_tile_over_bound": max(c.compute + c.write for c in costs.values()) / found.bound_seconds,
                    "gigabytes_per_second": found.bytes_per_second / 1e9,
                    "driver_microseconds_per_tile": 1e6 * found.driver_seconds / found.tiles,
                    "driver_answers_per_second": found.answers / found.driver_seconds,
                    "answers_per_second": found.answers / found.makespan_seconds,
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def driver_alone(made):
    """The driver with a tile for each chunk, on 1,024 workers; once for its seconds and once for its memory."""
    tiling = replace(made.tiling, tile_shape=(1, 1))
    costs = {tile: TileSeconds(30.0, 5.0, 2**24) for tile in tiling.tiles()}
    found = simulate(costs, 1024, replace(TROUBLE, start_seconds=30.0))
    tracemalloc.start()
    simulate(costs, 1024, replace(TROUBLE, start_seconds=30.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "tiles": found.tiles,
        "workers": found.workers,
        "answers": found.answers,
        "lost": found.lost,
        "driver_seconds": found.driver_seconds,
        "driver_microseconds_per_tile": 1e6 * found.driver_seconds / found.tiles,
        "driver_answers_per_second": found.answers / found.driver_seconds,
        "peak_bytes_driver_and_simulator": peak,
    }


COLUMNS = (
    ("profile", "{profile}"),
    ("workers", "{workers:,}"),
    ("failures", "{failures}"),
    ("tiles", "{tiles:,}"),
    ("makespan, s", "{makespan_seconds:,.1f}"),
    ("over the bound", "{makespan_over_bound:.3f}"),
    ("the same, after the start", "{after_start_over_bound:.3f}"),
    ("tail, s", "{tail_seconds:,.1f}"),
    ("tiles repeated", "{repeated}"),
    ("GB/s", "{gigabytes_per_second:.2f}"),
    ("driver, us per tile", "{driver_microseconds_per_tile:.0f}"),
)


def line(row):
    values = row | {"failures": "yes" if row["trouble"] else "no", "repeated": sum(row["lost"].values())}
    return "| " + " | ".join(form.format(**values) for _, form in COLUMNS) + " |"


def table(rows):
    heads = [name for name, _ in COLUMNS]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(line, rows)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profiles", nargs="*", default=["h100", "l4"], help="beside that measured")
    parser.add_argument("--results", type=Path, default=RESULTS / "simulate.json")
    options = parser.parse_args()
    settings = Settings(dtype="float32", symmetry="upper", workers=PLANNED_FOR, memory=MEMORY)
    probe.clock = time.process_time  # what else the machine does is no part of a tile
    start = time.process_time()
    made = make_plan(network(), settings)
    planning_seconds = time.process_time() - start
    costs = [made.tile_cost(tile) for tile in made.tiling.tiles()]
    flops, computing = lower_bound(made), sum(c.compute_seconds for c in costs)
    assumptions = {
        "measured": f"one CPU like this machine's: {flops / computing / 1e9:.1f} GFLOP/s of the lower bound, "
        f"{CPU_STORE_BYTES / 1e6:.0f} MB/s to the store beside them, {CPU_START_SECONDS:.0f} s to start",
        **{name: find_profile(name).describe() for name in options.profiles},
        "failures": str(TROUBLE),
    }
    for name, text in assumptions.items():
        print(f"{name}: {text}")
    rows = scaled(made, settings, "measured", CPU_START_SECONDS, on_cpus)
    for name in options.profiles:
        profile = find_profile(name)
        rows += scaled(made, settings, name, profile.start_seconds, lambda plan, p=profile: tile_seconds(plan, p))
    alone = driver_alone(made)
    print(alone)
    environment = {"torch": torch.__version__, "machine": platform.machine(), "planning_cpu_seconds": planning_seconds}
    found = {
        "environment": environment,
        "P": made.tiling.size,
        "samples": made.manifest.fingerprint.samples,
        "lower_bound_flops": flops,
        "bytes": sum(c.bytes for c in costs),
        "assumptions": assumptions,
        "driver_alone": alone,
        "runs": rows,
    }
    options.results.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(f"- {name}: {text}" for name, text in assumptions.items())
    options.results.with_suffix(".md").write_text(f"{text}\n\n{table(rows)}")
    at = [row for row in rows if (row["profile"], row["workers"]) == ("measured", PLANNED_FOR)]
    if max(row["makespan_over_bound"] for row in at) > TARGET:
        raise SystemExit(f"on {PLANNED_FOR} workers the makespan is over {TARGET} times the bound")


if __name__ == "__main__":
    main()
