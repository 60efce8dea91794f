"""The problems that speed is measured on, and this package's engines on them.

Ours is what workers compute with the engines that preflight chose, mirrored into a full matrix in memory: one worker
with all threads, as one tile, or the default plan by one worker for each thread, in processes of their own.
"""

import multiprocessing
import os
import statistics
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Thread

import psutil
import torch
from torch import nn

from pipeline import Problem, compute_hessian
from pipeline.engines.cost import torch_threads
from pipeline.execution.worker import Worker
from pipeline.planning.placement import Staff
from pipeline.preflight.planner import make_plan
from pipeline.runs.problem_factory import build_problem
from pipeline.spec import Settings
from pipeline.storage.output import Output
from pipeline.storage.zarr_store import MatrixStore

os.environ["HESSIAN_CACHE"] = ""  # each plan is made as the first of its kind
WARM_UP = 3  # calls, until the system has its memory
MIRRORED = 512  # rows at a time; twice as fast as 1024
JOBS = Path(__file__).parents[2] / "jobs"
ROUNDING = 1e-4  # of the largest entry


def mlp(*widths, samples):
    """A tanh network, with cross-entropy on random data."""
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    data = torch.randn(samples, widths[0]), torch.randint(0, widths[-1], (samples,))
    return Problem(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), data)


def lenet(samples):
    """LeNet-5 on 28 x 28 images with narrower dense layers, on random data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10),
    )  # fmt: skip
    return Problem(model, nn.CrossEntropyLoss(), (torch.randn(samples, 1, 28, 28), torch.randint(0, 10, (samples,))))


def transformer(**sizes):
    """The char transformer of the jobs, briefly trained."""
    return build_problem("char_transformer.py:transformer", {"steps": 3, **sizes}, JOBS)


def digits(hidden):
    """The digits network of the jobs, briefly trained."""
    return build_problem("digits.py:mlp", {"hidden": hidden, "steps": 3}, JOBS)


PROBLEMS = {
    "digits, P 247, N 1797": lambda: digits(3),
    "digits, P 1066, N 1797": lambda: digits(12),
    "digits, P 3466, N 1797": lambda: digits(32),
    "mlp 64-64-64-10, N 500": lambda: mlp(64, 64, 64, 10, samples=500),
    "mlp 64-64-64-10, N 1797": lambda: mlp(64, 64, 64, 10, samples=1797),
    "mlp 64-128-64-10, N 500": lambda: mlp(64, 128, 64, 10, samples=500),
    "mlp 64-128-64-10, N 1797": lambda: mlp(64, 128, 64, 10, samples=1797),
    "mlp 256-64-64-10, N 500": lambda: mlp(256, 64, 64, 10, samples=500),
    "lenet, N 32": lambda: lenet(32),
    "char transformer, width 16, N 64": lambda: transformer(),
    "char transformer, width 32, N 16": lambda: transformer(width=32, samples=16),
}


def planned(problem):
    """A plan of one tile, and a worker for it in this process; not timed."""
    plan = make_plan(problem, Settings(executor="serial", dtype="float32", tile=(problem.layout.size,) * 2))
    return plan, worker_of(problem, plan.manifest, plan.at.gradient)


def worker_of(problem, manifest, gradient):
    output = Output.private()
    MatrixStore.create(output, manifest, gradient)
    return Worker(problem, manifest, output)


def place(H, tiling, tile, values):
    rows, cols = tiling.span(tile.rows), tiling.span(tile.cols)
    H[rows.start : rows.stop, cols.start : cols.stop] = torch.from_numpy(values)


def mirrored(H):
    for start in range(0, len(H), MIRRORED):
        stop = start + MIRRORED
        H[stop:, start:stop] = H[start:stop, stop:].T
        square = H[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
    return H


def ours(plan, worker):
    """The one tile as a worker computes it, mirrored in memory."""
    (tile,) = plan.tiling.tiles()
    return mirrored(torch.from_numpy(worker.values(tile)))


class Crew:
    """Workers with one thread each, in processes of their own, that compute tiles into shared memory."""

    def __init__(self, name, manifest, gradient, tiles):
        context, self.tiles, self.added = torch.multiprocessing.get_context("spawn"), tiles, {}
        self.H = torch.empty(manifest.plan.size, manifest.plan.size).share_memory_()
        self.tasks, self.done = context.Queue(), context.Queue()
        given = name, manifest, gradient, self.H, self.tasks, self.done
        self.members = [context.Process(target=work, args=given) for _ in range(torch.get_num_threads())]
        for member in self.members:
            member.start()

    def __call__(self):
        """The whole matrix."""
        for tile in self.tiles:
            self.tasks.put(tile)
        for _ in self.tiles:
            member, added = self.done.get(timeout=600)
            self.added[member] = added
        return mirrored(self.H)

    def stop(self):
        for _ in self.members:
            self.tasks.put(None)
        for member in self.members:
            member.join()


def end_with_parent():
    """Leave no process behind a benchmark that is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(name, manifest, gradient, H, tasks, done):
    """A member of a crew: after each tile it tells what its memory has grown by at most."""
    Thread(target=end_with_parent, daemon=True).start()
    worker = worker_of(PROBLEMS[name](), manifest, gradient)
    torch.set_num_threads(1)
    before = psutil.Process().memory_info().rss
    for tile in iter(tasks.get, None):
        place(H, manifest.plan, tile, worker.values(tile))
        done.put((os.getpid(), peak_rss() - before))


def our_ways(name, problem, repeats):
    """Ours in both ways, one after the other: seconds and peak memory of each, and the matrix."""
    plan, worker = planned(problem)
    times, peak, truth = [], 0, None
    for _ in range(WARM_UP + repeats):
        truth = None  # so that its memory serves again: peers' results are dropped as well
        more, (seconds, truth) = peak_bytes(timed, ours, plan, worker)
        times.append(seconds)
        peak = max(peak, more)
    ways = [{"workers": 1, "seconds": statistics.median(times[WARM_UP:]), "repeats": repeats, "peak_bytes": peak}]
    count = torch.get_num_threads()
    with torch_threads(1):
        plan = make_plan(problem, Settings(workers=count, dtype="float32"), staff=Staff(count, count))
    crew = Crew(name, plan.manifest, plan.at.gradient, plan.dearest_first())
    try:
        times = [timed(crew)[0] for _ in range(WARM_UP + repeats)][WARM_UP:]
    finally:
        crew.stop()
    if (crew.H - truth).abs().max() > ROUNDING * truth.abs().max():
        raise ValueError(f"{name}: both ways give different matrices")
    ways.append({"workers": len(crew.members), "seconds": statistics.median(times), "repeats": repeats,
                 "peak_bytes": sum(crew.added.values())})  # fmt: skip
    return ways, truth, plan.manifest.engines


def call_seconds(problem, repeats):
    """Seconds of the call as a user makes it, into memory: with preflight, planning and proof."""
    compute_hessian(mlp(2, 2, samples=3), executor="serial")  # what a process imports once
    call = partial(compute_hessian, problem, executor="serial", dtype="float32")
    return statistics.median(timed(call)[0] for _ in range(repeats))


def peak_bytes(function, *arguments):
    """Give what a call adds to this process's memory at most, and what it returns."""
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    found = function(*arguments)
    return max(peak_rss() - before, 0), found


def peak_rss():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def timed(function, *arguments):
    """Give seconds and result; a function that measures by itself gives a number, or (result, seconds)."""
    start = time.perf_counter()
    found = function(*arguments)
    seconds = time.perf_counter() - start
    if isinstance(found, float):
        return found, None
    return (found[1], found[0]) if isinstance(found, tuple) else (seconds, found)
