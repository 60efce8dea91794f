"""A million parameters on 1 to 1,024 workers, simulated: the real driver, workers that only say how long they take.

    python tests/benchmarks/simulate.py [--results FILE] [--profiles cpu h100 ...]

The network is 784-1024-192-10, P = 1,002,570, N = 10,000 samples, float32, the upper triangle of chunks: two
terabytes. A tile costs its lower bound of arithmetic, by layer, at the speed of the worker. "measured" is one CPU: in
the whole run of jobs/mnist_mlp.yaml (784-128-10, the same samples), encoding included, each of two workers made
MEASURED_FLOPS of the lower bound. Others are data sheets and assumptions, which are printed. The bound is all
computing, or all writing where that is more, shared out evenly among the workers: it knows no start, no failure, no
unevenness. For each number of workers there are the tiles that the planner chooses.

Then the driver alone: a tile for each chunk, some 1e5, on 1,024 workers; its seconds of CPU, and its memory.
"""

import argparse
import json
import platform
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.execution.simulator import simulate
from pipeline.execution.virtual_pool import Circumstances, TileSeconds
from pipeline.planning.costs import work
from pipeline.planning.machine_profiles import CPU_START_SECONDS, CPU_STORE_BYTES, TileCost, find_profile
from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.tile_shapes import choose_tiling
from pipeline.planning.tiling import plan_tiles
from pipeline.spec import Settings

RESULTS = Path(__file__).parent / "results"
LAYOUT = ParameterLayout.of(
    {"0.weight": (1024, 784), "0.bias": (1024,), "2.weight": (192, 1024), "2.bias": (192,), "4.weight": (10, 192),
     "4.bias": (10,)}
)  # fmt: skip
SAMPLES = 10_000
MEASURED_FLOPS = 68e9  # a worker: jobs/mnist_mlp.yaml on two cores
WORKERS = tuple(2**k for k in range(11))
PLANNED_FOR = 256
CHUNK = 2352  # three units of the first layer
MEMORY = 8 * 2**30
SETTINGS = Settings(dtype="float32", symmetry="upper", memory=MEMORY)
TARGET = 1.05  # makespan over bound, on as many workers as are planned for
# A process dies every two days; one spot node of eight workers in twenty is taken away in an hour.
TROUBLE = Circumstances(spread=0.03, deaths=0.02, preemptions=0.05)


def tilings(workers):
    """The tiles for so many workers, and what each costs."""
    tiling = choose_tiling(LAYOUT, dict.fromkeys(LAYOUT.names, "factored"), SETTINGS, 4, MEMORY, workers)
    return {tile: cost(tiling, tile) for tile in tiling.tiles()}


def cost(tiling, tile):
    """Two operations for each sample and entry at or right of the diagonal; half of that within a layer."""
    rows, cols = tiling.span(tile.rows), tiling.span(tile.cols)
    flops = sum(2 * SAMPLES * work("factored", some, cols, p.span) for p, some in LAYOUT.segments(rows))
    stored = len(tiling.chunks(tile)) * tiling.chunk**2 * 4
    return TileCost(flops / MEASURED_FLOPS, 0.0, flops, 0.0, stored, stored, SETTINGS.codec)


def on_cpus(found):
    """On a CPU like those measured; chunks go to a bucket while the next tile is computed."""
    return TileSeconds(found.compute_seconds, found.bytes / CPU_STORE_BYTES, found.bytes)


def scaled(name, start_seconds, seconds):
    """One kind of worker, by their number."""
    rows = []
    for workers in WORKERS:
        found = {tile: seconds(each) for tile, each in tilings(workers).items()}
        costs = dict(sorted(found.items(), key=lambda item: -(item[1].compute + item[1].write)))
        for trouble in (Circumstances(), TROUBLE):
            found = simulate(costs, workers, replace(trouble, start_seconds=start_seconds))
            rows.append(
                asdict(found)
                | {
                    "profile": name,
                    "trouble": trouble is TROUBLE,
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


def driver_alone():
    """The driver with a tile for each chunk, on 1,024 workers; once for its seconds and once for its memory."""
    tiling = plan_tiles(LAYOUT, "all", CHUNK, (1, 1))
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
    costs = tilings(PLANNED_FOR).values()
    assumptions = {
        "measured": f"one CPU, calibrated by jobs/mnist_mlp.yaml: {MEASURED_FLOPS / 1e9:.0f} GFLOP/s of the bound, "
        f"{CPU_STORE_BYTES / 1e6:.0f} MB/s to the store beside it (assumed), {CPU_START_SECONDS:.0f} s to start",
        **{name: find_profile(name).describe() for name in options.profiles},
        "failures": str(TROUBLE),
    }
    for name, text in assumptions.items():
        print(f"{name}: {text}")
    rows = scaled("measured", CPU_START_SECONDS, on_cpus)
    for name in options.profiles:
        profile = find_profile(name)
        rows += scaled(name, profile.start_seconds, lambda c, p=profile: TileSeconds(*p.seconds(c, "float32"), c.bytes))
    alone = driver_alone()
    print(alone)
    found = {
        "environment": {"python": platform.python_version(), "machine": platform.machine()},
        "P": LAYOUT.size,
        "samples": SAMPLES,
        "lower_bound_flops": sum(c.flops for c in costs),
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
