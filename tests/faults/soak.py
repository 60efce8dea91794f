"""The soak: thousands of small tiles on three nodes, while workers and nodes are killed and the store misbehaves.

    python tests/faults/soak.py [--seconds N] [--seed N] [--results FILE]

The driver is `hessian run` in a process of its own, joined to a cluster of nodes of one CPU; the store is a real S3
server behind the proxy. Every few seconds a worker or a node is killed by SIGKILL, which one is drawn; nodes come back.
In the end the matrix must be that of an undisturbed run, to the last bit, with a receipt for each tile, and each object
as its receipt says. Written to `tests/benchmarks/results/soak.json`; exit status 1 where anything was lost.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "support"), str(HERE.parents[1])]
# One thread everywhere, or last bits differ; one try by each client, so that what the proxy does is ours to mend.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "AWS_MAX_ATTEMPTS": "1"}

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import ray  # noqa: E402
import trouble  # noqa: E402
from clouds import moto  # noqa: E402
from nodes import Nodes  # noqa: E402
from proxy import cut_before, cut_in_body, delay, lose_answer, mixture, proxied, refuse  # noqa: E402
from runs import planned_copy  # noqa: E402

from pipeline import open_hessian  # noqa: E402
from pipeline.results.receipt_audit import audit_output  # noqa: E402
from pipeline.runs.api import run  # noqa: E402
from pipeline.spec import Settings, load_job  # noqa: E402
from pipeline.storage.output import RECEIPTS, Output  # noqa: E402

NODES = 3
HIDDEN, CHUNK = 44, 8  # P = 622, 3,081 tiles
KILL_SECONDS = (3.0, 7.0)  # between kills, drawn
NODE_SHARE = 0.25  # of kills
FAULTS = {
    refuse(503, "SlowDown"): 0.015,
    refuse(500, "InternalError"): 0.005,
    cut_before: 0.005,
    cut_in_body: 0.01,
    lose_answer: 0.01,
    delay(0.5): 0.01,
}


class Killer:
    """Kills a worker or a node every few seconds, for so many seconds.

    Attributes:
        kills: what it was, and what it was doing.
    """

    def __init__(self, nodes, seed, seconds):
        self._nodes, self._draw, self._seconds = nodes, random.Random(seed), seconds
        self.kills = []

    def disturb(self, process):
        """Until a process ends."""
        end = time.monotonic() + self._seconds
        while True:
            try:
                process.wait(self._draw.uniform(*KILL_SECONDS))
                return
            except subprocess.TimeoutExpired:
                if time.monotonic() < end:
                    self._kill_node() if self._draw.random() < NODE_SHARE else self._kill_worker()

    def _kill_node(self):
        self._nodes.kill_raylet(self._draw.choice(self._nodes.raylets()))
        self.kills.append(("node", ""))
        self._nodes.add()

    def _kill_worker(self):
        found = [process for raylet in self._nodes.raylets() for process in _workers(raylet)]
        if found:
            process, doing = self._draw.choice(found)
            process.kill()
            self.kills.append(("worker", doing))


def _workers(raylet):
    """The workers of a node, with the call that each is in; those that idle have none."""
    for process in psutil.Process(raylet).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::Actor"):
            yield process, title.partition(".")[2].strip() or "nothing"


def events(log):
    """What the driver logged, by event."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        name: [line for line in lines if line.get("event") == name] for name in {line.get("event") for line in lines}
    }


def moment(line):
    return datetime.strptime(line["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp()


def undisturbed(folder):
    """The matrix, by a plain loop in this process."""
    problem, _ = trouble.problem(folder / "none", hidden=HIDDEN)
    spec = load_job(HERE / "trouble.yaml", (f"chunk={CHUNK}", f"row_group={CHUNK}", "executor=serial"), "")
    settings = Settings(**{**spec.model_dump(include=set(Settings.model_fields)), "workers": None, "verify": False})
    outcome = run(problem, settings, str(folder / "undisturbed"))
    return outcome.hessian.to_numpy(), outcome.tiles


def disturbed(folder, nodes, url, pause):
    """Start the command, with what the undisturbed run planned; its log tells the rest."""
    planned_copy(Output(str(folder / "undisturbed")), url)
    sets = {
        "problem_args.orders": folder / "orders", "problem_args.pause": pause, "problem_args.hidden": HIDDEN,
        "chunk": CHUNK, "row_group": CHUNK, "workers": NODES, "address": nodes.cluster.address,
        "verify": "false",  # all is compared in the end
    }  # fmt: skip
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pipeline", "run", HERE / "trouble.yaml", "--output", url, "--log", folder / "log"]
    with (folder / "errors").open("w") as errors:
        return subprocess.Popen([*map(str, command), *words], stderr=errors)


def lost(found):
    """How often workers were lost, and the tiles that these gave back, by what became of them."""
    rows = {}
    for line in found.get("worker lost", []):
        row = rows.setdefault(line["loss"], {"workers": 0, "tiles": 0})
        row["workers"] += 1
        row["tiles"] += len(line["tiles"])
    return rows


def left(url, known):
    """What a finished output holds, against an undisturbed one."""
    hessian, found = open_hessian(url), audit_output(url)
    return {
        "equal": bool(np.array_equal(hessian.to_numpy(), known)),
        "receipts": len(hessian.output.sizes(RECEIPTS)),
        "objects": sum(audited.objects for audited in found),
        "faults_in_objects": sum(len(audited.faults) for audited in found),
    }


def soak(seed, seconds, pause):
    """Do it; gives what is reported."""
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch, moto() as server, proxied(server) as proxy:
        folder, url = Path(scratch), f"{proxy.cloud.url}/soak"
        known, tiles = undisturbed(folder)
        os.environ |= proxy.cloud.environment
        nodes = Nodes()
        try:
            nodes.at_least(NODES)
            begun = time.time()
            with disturbed(folder, nodes, url, pause) as process:
                until_it_computes(folder / "log", process)
                proxy.rule(mixture(seed, FAULTS))
                killer = Killer(nodes, seed, seconds)
                killer.disturb(process)
            ended = time.time()
        finally:
            nodes.cluster.shutdown()
        faults = Counter(request.fault for request in proxy.requests if request.fault not in {"", "passing"})
        requests = len(proxy.requests)
        proxy.clear()
        found = events(folder / "log")
        done = sorted(map(moment, found["tile done"]))
        receipts = Counter(line["tile"] for line in found["tile done"])
        report = {
            "exit_status": process.returncode,
            "last_words": (folder / "errors").read_text().splitlines()[-1:] if process.returncode else [],
            "seconds": round(ended - begun, 1),
            "seconds_of_tiles": round(done[-1] - done[0], 1),
            "longest_without_a_tile_seconds": round(max(b - a for a, b in pairwise(done)), 1),
            "tiles": tiles,
            "tiles_done": len(receipts),
            "kills": dict(Counter(kind for kind, _ in killer.kills)),
            "killed_in": dict(Counter(doing for _, doing in killer.kills if doing)),
            "lost": lost(found),
            "tiles_given_again": sum(row["tiles"] for row in lost(found).values()),
            "tiles_set_aside": len(found.get("tile set aside", [])),
            "most_attempts": max(line["attempt"] for line in found["tile done"]),
            "requests": requests,
            "faults": dict(sorted(faults.items())),
        }
        report["faults_in_all"] = sum(report["faults"].values())
        return report | (left(url, known) if process.returncode == 0 else {})


def until_it_computes(log, process):
    """Wait for the first tile."""
    while not (log.exists() and "tile done" in log.read_text()):
        if process.poll() is not None:
            sys.exit(f"the run ended before its first tile: {(log.parent / 'errors').read_text()}")
        time.sleep(0.1)


def nothing_lost(report):
    whole = report["tiles"] == report["tiles_done"] == report.get("receipts")
    clean = report["exit_status"] == report["tiles_set_aside"] == report.get("faults_in_objects") == 0
    return whole and clean and report["equal"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="of killing; the run goes on until it is done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--pause", type=float, default=0.1, help="seconds that each pass through the model takes longer"
    )
    parser.add_argument("--results", type=Path, default=HERE.parent / "benchmarks" / "results" / "soak.json")
    options = parser.parse_args()
    report = soak(options.seed, options.seconds, options.pause)
    report = {"nothing_lost": nothing_lost(report), "seed": options.seed, "nodes": NODES} | report
    report["environment"] = {"ray": ray.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    options.results.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    sys.exit(0 if report["nothing_lost"] else 1)


if __name__ == "__main__":
    main()
