"""Seconds for a full Hessian: this package's engines and the peers, side by side in one run.

    python tests/benchmarks/peers.py [--only REGEX] [--peers REGEX] [--repeats N] [--results FILE]

Same model, data, type (float32), threads and pages of memory; in turn, several repeats, medians. Ours is the faster of
two ways, see `ours.py`; it is called a few times before, as peers are while their best chunk size is looked for. The
whole call is `compute_hessian` into memory as a user makes it: preflight, planning and proof are in its time. A peer
that takes longer than `PATIENCE` has one repeat; the row loop is timed on some rows and scaled. Peak memory is what a
call adds to the process, on Linux. Results of problems not run now are kept.
"""

import argparse
import json
import platform
import re
import resource
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch
from ours import PROBLEMS, call_seconds, our_ways, peak_bytes, timed
from torch import nn
from torch.func import jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.planning.torch_environment import prepare_environment

CHUNKS = (64, 16, 256)  # columns at a time, of peers that take such
ROWS = 64  # of the row loop, timed
PATIENCE = 20.0  # seconds


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


def functional_hessian(problem, _):
    """All columns at once: it takes no chunk size."""
    loss, theta = flat_loss(problem)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, theta, vectorize=True)


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
    """jax.hessian, jitted, by chunks of forward directions."""
    import jax
    from jax_models import flat_loss

    loss, theta = flat_loss(problem)

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
    "autograd.functional.hessian": (functional_hessian, (None,)),
    "row loop": (row_loop, (None,)),
    "curvlinops H @ I": (curvlinops_identity, CHUNKS),
    "jax.hessian (jit)": (jax_hessian, (*CHUNKS, 4)),
}


@contextmanager
def limited_memory():
    """Have an allocation fail that the machine has no room for, in place of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + int(0.8 * psutil.virtual_memory().available), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def peak_flops():
    """The matrix product at its best: FLOP/s."""
    a = torch.randn(2048, 2048)
    times = [timed(torch.mm, a, a)[0] for _ in range(50)]
    return 2 * 2048**3 / min(times)


def best_of_peer(function, chunks, problem, truth, repeats):
    """The chunk size that is fastest in one go, then repeats of it."""
    first, peak, waited = {}, {}, {}
    for chunk in chunks:
        start = time.perf_counter()
        try:
            with limited_memory():
                peak[chunk], first[chunk] = peak_bytes(timed, function, problem, chunk)
        except Exception as error:
            return {"fails": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
        waited[chunk] = time.perf_counter() - start
        if waited[chunk] > PATIENCE:
            break
    chunk = min(first, key=lambda c: first[c][0])
    seconds, found = first[chunk]
    again = waited[chunk] <= PATIENCE
    times = [timed(function, problem, chunk)[0] for _ in range(repeats)] if again else [seconds]
    error = None if found is None else float((found.detach() - truth).abs().max() / truth.abs().max())
    return {"seconds": statistics.median(times), "chunk": chunk, "repeats": len(times), "error_of_max": error,
            "peak_bytes": peak[chunk]}  # fmt: skip


def lower_bound(problem):
    """FLOPs that no way of computing dense layers' blocks can do without: DESIGN.md, Engines; None for other models."""
    if not all(isinstance(m, (nn.Sequential, nn.Linear, nn.Tanh)) for m in problem.model.modules()):
        return None
    sizes = [sum(p.numel() for p in m.parameters()) for m in problem.model if isinstance(m, nn.Linear)]
    pairs = sum(2 * a * b for k, a in enumerate(sizes) for b in sizes[k + 1 :])
    return float(problem.sample_count * (pairs + sum(a * a for a in sizes) / 2))


def compare(name, repeats, peers):
    problem = PROBLEMS[name]()
    ways, truth, engines = our_ways(name, problem, repeats)
    best, bound = min(ways, key=lambda way: way["seconds"]), lower_bound(problem)
    mine = best["seconds"]
    row = {
        "problem": name,
        "P": problem.layout.size,
        "samples": problem.sample_count,
        "engines": sorted(set(engines.values())),
        "ours": best | {"lower_bound_flops_per_second": bound and bound / mine},
        "ours_in_the_other_way": next(way for way in ways if way is not best),
        "call": {"seconds": call_seconds(problem, repeats)},
    }
    print(name, row["ours"], row["ours_in_the_other_way"], row["call"], flush=True)
    for peer, (function, chunks) in PEERS.items():
        if not re.search(peers, peer):
            continue
        row[peer] = best_of_peer(function, chunks, problem, truth, repeats)
        if "seconds" in row[peer]:
            row[peer]["times_ours"] = row[peer]["seconds"] / mine
            row[peer]["times_call"] = row[peer]["seconds"] / row["call"]["seconds"]
        print(name, peer, row[peer], flush=True)
    return row


def failure(words):
    return "out of memory" if "memory" in words else words.split(":")[0]


def ratios(peer):
    return " / ".join(f"{peer[name]:.1f}" for name in ("times_ours", "times_call") if name in peer)


def table(rows):
    """Ratios of seconds to the engine's and to the whole call's, as Markdown."""
    lines = [
        "| " + " | ".join(["problem", "P", "engine, s", "of the product's peak", "whole call, s", *PEERS]) + " |",
        "|" + "---|" * (5 + len(PEERS)),
    ]
    for row in rows:
        flops = row["ours"]["lower_bound_flops_per_second"]
        peers = (row.get(peer, {}) for peer in PEERS)
        cells = [ratios(peer) if "seconds" in peer else failure(peer.get("fails", "")) for peer in peers]
        share = f"{100 * flops / row['environment']['matrix_product_flops_per_second']:.0f} %" if flops else ""
        seconds, call = (f"{row[way]['seconds']:.2f}" if way in row else "" for way in ("ours", "call"))
        lines.append("| " + " | ".join([row["problem"], f"{row['P']:,}", seconds, share, call, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--peers", default="", help="regular expression")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "peers.json")
    options = parser.parse_args()
    prepare_environment()  # as the command does; the peers shall have them too
    environment = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "matrix_product_flops_per_second": peak_flops(),
    }
    kept = json.loads(options.results.read_text()) if options.results.exists() else []
    rows = {row["problem"]: row for row in kept if row["problem"] in PROBLEMS}
    for name in (name for name in PROBLEMS if re.search(options.only, name)):
        rows[name] = compare(name, options.repeats, options.peers) | {"environment": environment}
        ordered = [rows[name] for name in PROBLEMS if name in rows]
        options.results.write_text(json.dumps(ordered, indent=1) + "\n")
        options.results.with_suffix(".md").write_text(table(ordered))


if __name__ == "__main__":
    main()
