"""Prediction against measurement: what `hessian plan` says, and the run that follows.

    python tests/benchmarks/predictions.py [JOB ...] [--results FILE]

Of tiles: from the start of the first to the end of the last write, as receipts tell. Of the whole: as the command
tells, with the start of Ray and its workers. Needs a machine with nothing else to do. mnist_mlp takes seven minutes
and 13 GB of disk; name the jobs to leave it out. Rows of jobs that are not run again stay in the results.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import psutil
import torch

from pipeline.planning.machine_profiles import CPU_START_SECONDS
from pipeline.progress import Reporter
from pipeline.runs import api as run
from pipeline.spec import load_job
from pipeline.storage.receipts import read_receipt

JOBS = Path(__file__).parents[2] / "jobs"
WITHIN = 0.2


def compare(job):
    """Run one job, without its proof, and hold its plan against its receipts."""
    spec, start = load_job(JOBS / f"{job}.yaml", ["verify=false"]), time.monotonic()
    plan = run.plan(spec, JOBS)
    planning = time.monotonic() - start
    with tempfile.TemporaryDirectory() as folder:
        outcome = run.run_job(spec.model_copy(update={"output": folder}), JOBS, Reporter())
        output, tiles = outcome.hessian.output, outcome.hessian.manifest.plan.tiles()
        receipts = [read_receipt(output, outcome.hessian.manifest, tile) for tile in tiles]
    start = min(r.finished - r.write_seconds - r.compute_seconds for r in receipts)
    span, predicted = max(r.finished for r in receipts) - start, plan.makespan_seconds()
    costs = [plan.tile_cost(tile) for tile in plan.tiling.tiles()]
    return {
        "P": plan.tiling.size,
        "tiles": len(receipts),
        "workers": plan.workers,
        "predicted_seconds": predicted,
        "measured_seconds": span,
        "predicted_over_measured": predicted / span,
        "whole_predicted_seconds": predicted + CPU_START_SECONDS,
        "whole_measured_seconds": outcome.tile_seconds,
        "whole_predicted_over_measured": (predicted + CPU_START_SECONDS) / outcome.tile_seconds,
        "compute_predicted_over_measured": sum(c.compute_seconds for c in costs)
        / sum(r.compute_seconds for r in receipts),
        "write_predicted_over_measured": sum(c.write_seconds for c in costs) / sum(r.write_seconds for r in receipts),
        "planning_seconds": planning,
        "load_average_before": psutil.getloadavg()[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", default=sorted(path.stem for path in JOBS.glob("*.yaml")))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "predictions.json")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text())["jobs"] if options.results.exists() else {}
    for job in options.jobs:
        rows[job] = compare(job)
        print(job, json.dumps(rows[job]), flush=True)
        environment = {"torch": torch.__version__, "machine": platform.machine(), "cpus": psutil.cpu_count()}
        options.results.write_text(json.dumps({"environment": environment, "jobs": rows}, indent=1) + "\n")
    off = [job for job in options.jobs if abs(rows[job]["predicted_over_measured"] - 1) > WITHIN]
    if off:
        raise SystemExit(f"predictions off by more than {WITHIN:.0%}: {', '.join(off)}")


if __name__ == "__main__":
    main()
