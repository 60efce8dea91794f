"""Seconds for a full Hessian: this package's engines and the peers, side by side in one run.

    python tests/benchmarks/peers.py [--only REGEX] [--repeats N] [--results FILE]

Same model, data, type (float32) and threads; in turn, several repeats, medians. Ours is the upper triangle of the
default plan, with the engines that preflight chose, mirrored into a full matrix. Peers get their best chunk size of
those tried. A peer that takes longer than `PATIENCE` has one repeat; the row loop is timed on some rows and scaled.
"""

import argparse
import json
import platform
import re
import statistics
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import Problem
from pipeline.contexts import exact_kernels
from pipeline.engines import ENGINES
from pipeline.factory import build_problem
from pipeline.preflight import preflight
from pipeline.probe import Segment, choose_sizes
from pipeline.tiling import default_chunk, plan_tiles

CHUNKS = (16, 64, 256)  # columns at a time, of peers that take such
ROWS = 64  # of the row loop, timed
PATIENCE = 60.0  # seconds
BUDGET_BYTES = 4 * 2**30
JOBS = Path(__file__).parents[2] / "jobs"


def mlp(*widths, samples):
    """A tanh network, with cross-entropy on random data."""
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    data = torch.randn(samples, widths[0]), torch.randint(0, widths[-1], (samples,))
    return Problem(nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss(), data)


PROBLEMS = {
    "mlp 64-64-64-10, N 500": lambda: mlp(64, 64, 64, 10, samples=500),
    "mlp 64-64-64-10, N 1797": lambda: mlp(64, 64, 64, 10, samples=1797),
    "mlp 64-128-64-10, N 500": lambda: mlp(64, 128, 64, 10, samples=500),
    "digits_cnn": lambda: build_problem("digits.py:cnn", {"steps": 3}, JOBS),
    "char_transformer": lambda: build_problem("char_transformer.py:transformer", {"steps": 3}, JOBS),
}


def planned(problem):
    """Engines, tiles and sizes, as a run would choose them; not timed."""
    verdict = preflight(problem, list(ENGINES), torch.float32, "cpu")
    placed, layout = problem.place(torch.float32), problem.layout
    segments = [Segment(p, range(p.span.start, layout.size), verdict.engines[p.name]) for p in layout]
    sizes = choose_sizes(placed, segments, BUDGET_BYTES, None, None)
    plan = plan_tiles(layout, "all", default_chunk(layout.size), (1, 10**6))
    return placed, verdict.engines, plan, sizes


def ours(placed, chosen, plan, sizes):
    """The tiles of the plan, as a worker computes them; mirrored at the end."""
    layout = placed.layout
    engines = {name: ENGINES[name](placed, sizes.row_group) for name in set(chosen.values())}
    out, total = torch.zeros(layout.size, layout.size), 0.0
    with exact_kernels(placed.problem.model):
        for batch in placed.batches(sizes.microbatch):
            total += float(placed.loss_sum({}, batch)[1])
            for tile in plan.tiles():
                for p, rows in layout.segments(plan.span(tile.rows)):
                    right = range(rows.start, layout.size)
                    engines[chosen[p.name]].add(batch, rows, right, out[rows.start : rows.stop, rows.start :])
    out /= total
    for tile in plan.tiles():
        rows, right = plan.span(tile.rows), plan.span(tile.rows).stop
        out[right:, rows.start : rows.stop] = out[rows.start : rows.stop, right:].T
        square = out[rows.start : rows.stop, rows.start : rows.stop]
        square.copy_(torch.triu(square) + torch.triu(square, 1).T)
    return out


def flat_loss(problem):
    """The loss over all data as a function of the flat parameters."""
    placed = problem.place(torch.float32)
    batch, layout = next(placed.batches(None)), problem.layout
    theta = torch.cat([placed.parameters[p.name].reshape(-1) for p in layout])

    def loss(flat):
        parameters = {p.name: flat[p.span.start : p.span.stop].reshape(p.shape) for p in layout}
        total, weight = placed.loss_sum(parameters, batch)
        return total / weight

    return loss, theta


def func_hessian(problem, chunk):
    """torch.func.hessian is jacfwd(jacrev(f)), which takes no chunk size: this is it, some columns at a time."""
    loss, theta = flat_loss(problem)
    with sdpa_kernel(SDPBackend.MATH):
        columns = vmap(lambda v: jvp(jacrev(loss), (theta,), (v,))[1], chunk_size=chunk)
        return columns(torch.eye(len(theta)))


def func_hessian_reverse(problem, chunk):
    loss, theta = flat_loss(problem)
    with sdpa_kernel(SDPBackend.MATH):
        return jacrev(jacrev(loss), chunk_size=chunk)(theta)


def row_loop(problem, _):
    """autograd.grad row by row: seconds of some rows, scaled to all."""
    loss, theta = flat_loss(problem)
    theta.requires_grad_(True)
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
        start = time.perf_counter()
        for row in np.linspace(0, len(theta) - 1, ROWS).astype(int):
            torch.autograd.grad(gradient[row], theta, retain_graph=True)
    return (time.perf_counter() - start) * len(theta) / ROWS


def curvlinops_identity(problem, chunk):
    from curvlinops import HessianLinearOperator

    theta = [p for p in problem.model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(problem.model, nn.CrossEntropyLoss(), theta, list(problem.batches))
    with sdpa_kernel(SDPBackend.MATH):
        eye = torch.eye(operator.shape[1])
        return torch.cat([operator @ eye[:, k : k + chunk] for k in range(0, len(eye), chunk)], 1)


def jax_hessian(problem, chunk):
    """jax.hessian, jitted, by chunks of forward directions; for tanh networks."""
    import jax
    import jax.numpy as jnp

    layers = [m for m in problem.model if isinstance(m, nn.Linear)]
    if len(layers) * 2 - 1 != len(problem.model):
        raise NotImplementedError("written for tanh networks")
    x, y = (jnp.asarray(t.numpy()) for t in problem.batches[0])
    shapes = [p.shape for p in problem.layout]
    ends = [p.span.stop for p in problem.layout]
    theta = jnp.concatenate([jnp.asarray(p.detach().numpy()).reshape(-1) for p in problem.model.parameters()])

    def loss(flat):
        parts = [part.reshape(shape) for part, shape in zip(jnp.split(flat, ends[:-1]), shapes, strict=True)]
        h = x
        for k in range(0, len(parts), 2):
            h = h @ parts[k].T + parts[k + 1]
            h = jnp.tanh(h) if k + 2 < len(parts) else h
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(h), y[:, None], 1))

    @jax.jit
    def columns(directions):
        return jax.vmap(lambda v: jax.jvp(jax.grad(loss), (theta,), (v,))[1])(directions)

    eye = np.eye(len(theta), dtype=np.float32)
    pad = -len(eye) % chunk
    eye = np.concatenate([eye, np.zeros((pad, len(theta)), np.float32)])
    columns(eye[:chunk]).block_until_ready()  # compiled outside the time
    start = time.perf_counter()
    found = np.concatenate([np.asarray(columns(eye[k : k + chunk])) for k in range(0, len(eye), chunk)])
    return torch.from_numpy(found[: len(theta)].copy()), time.perf_counter() - start


PEERS = {
    "torch.func.hessian": (func_hessian, CHUNKS),
    "jacrev(jacrev)": (func_hessian_reverse, CHUNKS),
    "row loop": (row_loop, (None,)),
    "curvlinops H @ I": (curvlinops_identity, CHUNKS),
    "jax.hessian (jit)": (jax_hessian, CHUNKS),
}


def timed(function, *arguments):
    """Give seconds and result; a function that measures by itself gives a number, or (result, seconds)."""
    start = time.perf_counter()
    found = function(*arguments)
    seconds = time.perf_counter() - start
    if isinstance(found, float):
        return found, None
    return (found[1], found[0]) if isinstance(found, tuple) else (seconds, found)


def peak_flops():
    """The matrix product at its best: FLOP/s."""
    a = torch.randn(2048, 2048)
    times = [timed(torch.mm, a, a)[0] for _ in range(7)]
    return 2 * 2048**3 / min(times)


def best_of_peer(function, chunks, problem, truth, repeats):
    """The chunk size that is fastest in one go, then repeats of it."""
    first = {}
    for chunk in chunks:
        try:
            first[chunk] = timed(function, problem, chunk)
        except Exception as error:
            return {"fails": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
        if first[chunk][0] > PATIENCE:
            break
    chunk = min(first, key=lambda c: first[c][0])
    seconds, found = first[chunk]
    times = [seconds]
    while len(times) < repeats and seconds < PATIENCE:
        times.append(timed(function, problem, chunk)[0])
    error = None if found is None else float((found.detach() - truth).abs().max() / truth.abs().max())
    return {"seconds": statistics.median(times), "chunk": chunk, "repeats": len(times), "error_of_max": error}


def compare(name, repeats):
    problem = PROBLEMS[name]()
    plan = planned(problem)
    P, samples = problem.layout.size, problem.sample_count
    times, truth = [], None
    for _ in range(repeats):
        seconds, truth = timed(ours, *plan)
        times.append(seconds)
    mine = statistics.median(times)
    linear = sum(2.0 * samples * p.size * (P - p.span.stop + p.size / 2) for p in problem.layout)
    row = {
        "problem": name,
        "P": P,
        "samples": samples,
        "engines": sorted(set(plan[1].values())),
        "ours": {"seconds": mine, "repeats": repeats, "product_flops_per_second": linear / mine},
    }
    for peer, (function, chunks) in PEERS.items():
        row[peer] = best_of_peer(function, chunks, problem, truth, repeats)
        if "seconds" in row[peer]:
            row[peer]["times_ours"] = row[peer]["seconds"] / mine
        print(name, peer, row[peer], flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "peers.json")
    options = parser.parse_args()
    peak = peak_flops()
    rows = []
    for name in PROBLEMS:
        if re.search(options.only, name):
            rows.append(compare(name, options.repeats))
            print({k: v for k, v in rows[-1].items() if not isinstance(v, dict) or k == "ours"}, flush=True)
    environment = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "matrix_product_flops_per_second": peak,
    }
    options.results.write_text(json.dumps({"environment": environment, "problems": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
