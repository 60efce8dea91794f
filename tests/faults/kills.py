"""A hundred commands killed at random moments, and given again: the same matrix each time, and nothing left behind.

    python tests/faults/kills.py [--kills N] [--seed N] [--results FILE]

Runs in this process and on Ray, exports, proofs and sweeps of checkpoints are started as a user would, killed by
SIGKILL at a moment drawn from the time that they take undisturbed, and started once more. What then lies in the output
must be what an undisturbed command leaves there, to the last bit; no process, no file in /dev/shm and no half of an
object may remain. Written to `tests/benchmarks/results/kills.json`; exit status 1 where anything was lost or left.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "jobs"))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import zarr  # noqa: E402

MARK = "HESSIAN_KILLED"  # of processes, in their environment: a command's, and all that came from it
# One thread: the same weights are trained, to the last bit.
ENVIRONMENT = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
PATIENCE = 120.0  # seconds, in which what a killed driver had started must have ended
SMALL = "problem_args={hidden: 6, steps: 0}", "chunk=32", "tile=[1, 1]", "dtype=float64"  # P = 502, 136 tiles
SPEC = ROOT / "jobs" / "digits_mlp.yaml"
SHARES = {"run": 0.4, "ray": 0.2, "export": 0.15, "verify": 0.1, "run-due": 0.15}  # of all kills


@dataclass(frozen=True)
class Deed:
    """A command that is killed.

    Attributes:
        words: of the command, for the folder of its output.
        prepare: puts there what it needs.
    """

    words: Callable[[Path], list[str]]
    prepare: Callable[[Path], object] = lambda folder: folder.mkdir()


def settings(*more):
    """Options that set a spec's keys."""
    return [word for each in (*SMALL, *more) for word in ("--set", each)]


def run_words(*more):
    """The words of a run into a folder."""
    return lambda folder: ["run", str(SPEC), "--output", str(folder / "out"), *settings(*more)]


def computed(folder):
    """Compute a matrix, for what is done with one."""
    folder.mkdir()
    finished(run_words("executor=serial")(folder))


def swept(folder):
    """Train three checkpoints, and write the schedule of their Hessians."""
    import digits_epochs

    folder.mkdir()
    digits_epochs.train(folder / "epochs", 2, hidden=6)
    lines = [
        f"job: {SPEC}",
        f"overrides: {json.dumps([*SMALL, 'executor=serial'])}",
        f"checkpoints: {folder / 'epochs'}/epoch*",
        f"output: {folder / 'out'}",
    ]
    (folder / "schedule.yaml").write_text("\n".join(lines))


DEEDS = {
    "run": Deed(run_words("executor=serial")),
    "ray": Deed(run_words("executor=ray", "workers=2")),
    "export": Deed(lambda folder: ["export", str(folder / "out"), "--format", "parquet"], computed),
    "verify": Deed(
        lambda folder: ["verify", str(folder / "out"), "--job", str(SPEC), *settings("executor=serial")], computed
    ),
    "run-due": Deed(lambda folder: ["run-due", str(folder / "schedule.yaml")], swept),
}


def started(words, mark=""):
    """Start a command, with its descendants marked."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words],
        env=ENVIRONMENT | {MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(words):
    """Have a command end well; return its seconds."""
    begun = time.monotonic()
    process = started(words)
    _, said = process.communicate()
    if process.returncode:
        raise AssertionError(f"{' '.join(words)}: exit {process.returncode}: {said[-500:]}")
    return time.monotonic() - begun


def left(mark):
    """Describe the processes that a marked command has left."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return found


def shared_memory():
    """Name what lies in shared memory and is of no process that is alive: a killed one has left it."""
    held = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            held |= {Path(each.path).name for each in process.memory_maps() if each.path.startswith("/dev/shm/")}
    return set(os.listdir("/dev/shm")) - held


def content(folder):
    """Return the entries of each matrix below a folder, and the names of what lies beside them."""
    matrices = {
        str(path.relative_to(folder)): np.asarray(zarr.open_array(path, mode="r"))
        for path in sorted(folder.rglob("hessian.zarr"))
    }
    names = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "lease" not in path.parts and path.suffix != ".jsonl"
    }
    return matrices, names


def killed(deed, folder, moment):
    """Kill a command at a moment, in seconds; return what remained of it, and whether it had ended before."""
    mark, shared = uuid.uuid4().hex, set(os.listdir("/dev/shm"))  # others' too, which may end meanwhile
    process = started(deed.words(folder), mark)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    ended = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + PATIENCE
    while (remain := left(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return remain + sorted(shared_memory() - shared), ended


def faults_of(deed, place, known, moment):
    """Kill a command once, give it again, and compare."""
    folder = place / "killed"
    deed.prepare(folder)
    try:
        remain, ended = killed(deed, folder, moment)
        faults = [f"left behind: {each}" for each in remain]
        finished(deed.words(folder))
        matrices, names = content(folder)
        faults += [f"other files: {sorted(names ^ known[1])[:5]}"] if names != known[1] else []
        faults += [
            f"another matrix in {name}"
            for name, H in known[0].items()
            if name not in matrices or not np.array_equal(matrices[name], H)
        ]
        return faults, ended
    finally:
        shutil.rmtree(folder)


def tried(name, count, draw, place):
    """Kill a command so many times, at moments drawn from all that it takes."""
    deed, folder = DEEDS[name], place / "undisturbed"
    deed.prepare(folder)
    seconds = finished(deed.words(folder))
    known = content(folder)
    shutil.rmtree(folder)
    faults, kills, late = [], 0, 0
    while kills < count:
        moment = draw.uniform(0, seconds)
        found, ended = faults_of(deed, place, known, moment)
        kills, late = kills + (not ended), late + ended
        faults += [f"at {moment:.2f} s: {each}" for each in found]
        said = "; ".join(found) or "right"
        print(f"{name} {kills}/{count}, at {moment:.2f} of {seconds:.2f} s: {said}", flush=True)
        if late > count:
            raise AssertionError(f"{name}: of {kills + late} commands {late} had ended before they were killed")
    return {"kills": kills, "ended_before": late, "seconds_undisturbed": seconds, "faults": faults}


def main():
    """Kill, compare, write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "benchmarks" / "results" / "kills.json")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="hessian-kills-") as folder:
        found = {
            name: tried(name, max(1, round(share * options.kills)), draw, Path(folder))
            for name, share in SHARES.items()
        }
    faults = [fault for each in found.values() for fault in each["faults"]]
    about = {"date": datetime.now().astimezone().isoformat(), "machine": platform.machine(), "seed": options.seed}
    options.results.write_text(json.dumps({**about, "commands": found}, indent=1) + "\n")
    print(f"{sum(each['kills'] for each in found.values())} kills, {len(faults)} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
