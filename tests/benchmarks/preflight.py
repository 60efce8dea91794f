"""What preflight costs: its seconds, on every job in the repository, against those of the whole run.

    python tests/benchmarks/preflight.py

Each job is run as its file says, in a process of its own, into a folder that is removed afterwards.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "preflight.json"
MOST_SECONDS, MOST_SHARE = 10.0, 0.05


def cost(job, folder):
    """Run a job; the manifest keeps the seconds of preflight."""
    output = folder / job.stem
    start = time.perf_counter()
    command = [sys.executable, "-m", "pipeline", "run", str(job), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    verdict = json.loads((output / "manifest.json").read_text())["preflight"]
    return {
        "job": job.stem,
        "parameters": len(verdict["parameters"]),
        "samples": verdict["samples"],
        "preflight_seconds": round(verdict["seconds"], 2),
        "run_seconds": round(seconds, 1),
    }


def main():
    rows = []
    for job in sorted((ROOT / "jobs").glob("[!m]*.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(cost(job, Path(folder)))
        print(rows[-1], flush=True)
    RESULTS.write_text(json.dumps({"torch": torch.__version__, "jobs": rows}, indent=1) + "\n")
    late = [r for r in rows if r["preflight_seconds"] > max(MOST_SECONDS, MOST_SHARE * r["run_seconds"])]
    sys.exit(f"too long: {late}" if late else 0)


if __name__ == "__main__":
    main()
