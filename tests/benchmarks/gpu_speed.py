"""How fast: the parts `peers` and `headline` of `gpu.py`."""

import gc
import statistics
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import jacrev, jvp, vmap
from triangle import (
    JOBS,
    SAME,
    add_tiles,
    attempt,
    chosen_engines,
    hessian,
    in_words,
    kernels,
    least_flops,
    mlp,
    peak_flops,
    tiles,
    timed,
    vector_errors,
)

from pipeline.problem.double_backward import hessian_vector_products
from pipeline.runs.problem_factory import build_problem

ROWS = 64  # of the matrix: checked, and of the row loop timed
UNITS = 8  # of a layer, whose rows are a tile of the headline
MICROBATCH = 10_000  # of the headline
BAND_BYTES = 12e9
SLICE = 2048  # rows of a band that are held in float64 at a time
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1))  # pixels


def flat_loss(placed):
    """The loss over all data as a function of the flat parameters."""
    batch, layout = next(placed.batches(None)), placed.layout
    theta = torch.cat([placed.parameters[p.name].reshape(-1) for p in layout])

    def loss(flat):
        total, weight = placed.loss_sum({p.name: flat[p.place].reshape(p.shape) for p in layout}, batch)
        return total / weight

    return loss, theta


def func_hessian(placed, chunk):
    """torch.func.hessian is jacfwd(jacrev(f)), which takes no chunk size: this is it, some columns at a time."""
    loss, theta = flat_loss(placed)
    eye = torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    return vmap(lambda v: jvp(jacrev(loss), (theta,), (v,))[1], chunk_size=chunk)(eye)


def func_hessian_reverse(placed, chunk):
    loss, theta = flat_loss(placed)
    return jacrev(jacrev(loss), chunk_size=chunk)(theta)


def functional_hessian(placed, _):
    return torch.autograd.functional.hessian(*flat_loss(placed), vectorize=True)


def row_loop(placed, rows):
    """autograd.grad row by row: seconds of some rows, scaled to all."""
    loss, theta = flat_loss(placed)
    theta.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(theta), theta, create_graph=True)
    row = lambda k: torch.autograd.grad(gradient[k], theta, retain_graph=True)
    row(0)
    picked = np.linspace(0, len(theta) - 1, rows).astype(int).tolist()
    return timed(placed.device, lambda: [row(k) for k in picked])[0] * len(theta) / rows


def jitted_jax(placed, chunk):
    """Seconds of jax.hessian, compiled before, where JAX takes it."""
    from peers import jax_hessian

    return jax_hessian(placed.problem, chunk)[1]


def contest(device, function, choices, repeats):
    """The choice that is fastest in a second go, then the median of repeats of it; and the matrix."""
    first, fails = {}, {}
    for choice in choices:
        try:
            first[choice] = [timed(device, function, choice)[0] for _ in range(2)][1]
        except Exception as error:
            fails[str(choice)] = in_words(error)
        gc.collect()
    if not first:
        return {"fails": fails}, None
    best, times, found = min(first, key=first.get), [], None
    for _ in range(repeats):
        found = None  # before the next is made
        seconds, peak, found = timed(device, function, best)
        times.append(found if isinstance(found, float) else seconds)
    matrix = None if isinstance(found, float) else found
    result = {"seconds": statistics.median(times), "choice": best, "repeats": repeats, "peak_bytes": peak}
    return result | ({"fails": fails} if fails else {}), matrix


def peers(device, small):
    """Seconds of the whole matrix in float32."""
    nets = [(8, 8, 8, 4)] if small else [(64, 64, 64, 10), (64, 128, 64, 10)]
    counts, repeats, chunks = ((50,), 1, (16, 64)) if small else ((500, 1797), 5, (64, 512, 4096))
    peak = peak_flops(device, "float32", 512 if small else 8192)
    rows, wrong = [], []
    for widths in nets:
        for samples in counts:
            label = f"mlp {'-'.join(map(str, widths))}, N {samples}"
            rows.append({"problem": label} | compare(mlp(*widths, samples=samples), device, chunks, repeats, peak))
            if rows[-1]["ours"].get("block_error", np.inf) > SAME["float32"]:
                wrong.append(f"{label}: {rows[-1]['ours']}")
    return {"product_flops_per_second": peak, "problems": rows}, wrong


def compare(problem, device, chunks, repeats, peak):
    """Ours and the peers on one problem."""
    placed, layout = problem.place(torch.float32, device), problem.layout
    rivals = {
        "torch.func.hessian": (func_hessian, chunks),
        "jacrev(jacrev)": (func_hessian_reverse, chunks),
        "functional.hessian(vectorize=True)": (functional_hessian, (None,)),
        "row loop": (row_loop, (ROWS,)),
        "jax.hessian (jit)": (jitted_jax, chunks),
    }
    chosen = chosen_engines(problem, torch.float32, device)
    with kernels(problem.model):
        ours, H = contest(device, partial(hessian, placed, chosen), (1024, 4096), repeats)
        found = {"P": layout.size, "engines": sorted(set(chosen.values())), "ours": ours}
        if H is not None:
            flops = least_flops(layout, problem.sample_count, layout.size) / ours["seconds"]
            picked = np.linspace(0, layout.size - 1, ROWS).astype(int)
            exact, units = problem.place(torch.float64, device), np.eye(layout.size)[picked]
            known = hessian_vector_products(exact, units, problem.sample_count, None)
            error = vector_errors(H[picked].double().cpu().numpy(), known, layout, layout.size).max()
            ours |= {"flops_per_second": flops, "of_peak": flops / peak, "block_error": float(error)}
        print(problem.sample_count, found, flush=True)
        for name, (function, choices) in rivals.items():
            found[name], matrix = contest(device, partial(function, placed), choices, repeats)
            if matrix is not None and H is not None:
                found[name]["error_of_max"] = float((matrix - H).abs().max() / H.abs().max())
            if "seconds" in found[name] and "seconds" in ours:
                found[name]["times_ours"] = found[name]["seconds"] / ours["seconds"]
            del matrix
            print(name, found[name], flush=True)
    return found


def augmented(problem):
    """The same network on every image and its shifts."""
    images, labels = problem.batches[0]
    padded = F.pad(images.reshape(-1, 28, 28), (1, 1, 1, 1))
    shifted = [padded[:, 1 + y : 29 + y, 1 + x : 29 + x].flatten(1) for y, x in SHIFTS]
    return problem.on(((torch.cat(shifted), labels.repeat(len(SHIFTS))),), l2=0.0)


def bands(all_tiles, size, most):
    """Group tiles so that a band, from its diagonal on, has at most so many entries."""
    band = []
    for name, rows in all_tiles:
        start = band[0][1].start if band else rows.start
        if band and (rows.stop - start) * (size - start) > most:
            yield band
            band = []
        band.append((name, rows))
    yield band


def band_of(placed, chosen, batches, band):
    start, stop, size = band[0][1].start, band[-1][1].stop, placed.layout.size
    out = torch.zeros(stop - start, size - start, dtype=placed.dtype, device=placed.device)
    add_tiles(placed, chosen, batches, band, out)
    return out


def multiply(products, V, band, start):
    """Add a band's part of H v: its upper triangle, and that once more as the mirror image.  # shape of V: (k, P)."""
    for low in range(0, len(band), SLICE):
        part = band[low : low + SLICE, low:].to(torch.float64, copy=True)
        rows, right = slice(start + low, start + low + len(part)), slice(start + low, None)
        square = part[:, : len(part)]
        square.copy_(square.triu())
        products[:, rows] += V[:, right] @ part.T
        square.copy_(square.triu(1))
        products[:, right] += V[:, rows] @ part


def triangle(problem, chosen, device, kind, most_bytes, most_bands, peak):
    """The upper triangle, un-normalised, band by band, each checked and dropped; or the first bands of it."""
    dtype, layout = torch.float64 if kind == "float64" else torch.float32, problem.layout
    placed, width = problem.place(dtype, device), layout.parameters[0].shape[1]
    batches = list(placed.batches(MICROBATCH))
    vectors = np.zeros((len(layout), layout.size))
    for k, p in enumerate(layout):  # of random signs, each on one parameter
        vectors[k, p.place] = np.random.default_rng(k).choice((-1.0, 1.0), p.size) / p.size**0.5
    V = torch.from_numpy(vectors).to(device)
    products, seconds, checking, most = torch.zeros_like(V), 0.0, 0.0, 0
    cut = list(bands(tiles(layout, UNITS * width), layout.size, most_bytes / torch.finfo(dtype).bits * 8))[:most_bands]
    with kernels(problem.model):
        band_of(placed, chosen, batches[:1], [(layout.names[0], range(width))])  # libraries are loaded outside the time
        for band in cut:
            spent, held, out = timed(device, band_of, placed, chosen, batches, band)
            seconds, most = seconds + spent, max(most, held or 0)
            checking += timed(device, multiply, products, V, out, band[0][1].start)[0]
            del out
    stop = cut[-1][-1][1].stop
    with kernels(problem.model):
        known = hessian_vector_products(problem.place(torch.float64, device), vectors, 1.0, MICROBATCH)
    errors = vector_errors(products.cpu().numpy(), known, layout, stop).max(1)
    flops = least_flops(layout, problem.sample_count, stop) / seconds
    return {
        "type": kind,
        "P": layout.size,
        "samples": problem.sample_count,
        "rows": stop,
        "bands": len(cut),
        "engines": sorted(set(chosen.values())),
        "seconds": seconds,
        "checking_seconds": checking,
        "flops_per_second": flops,
        "of_peak": flops / peak,
        "peak_bytes": most or None,
        "block_error": dict(zip(layout.names, errors.tolist(), strict=True)),
    }


def headline(device, small):
    """Ten thousand real images; sixty thousand by shifts; in three products of TF32; and some of it in float64."""
    is_cuda, side = device.type == "cuda", 512 if small else 8192
    sizes = {"hidden": 16, "samples": 200} if small else {}
    problem = build_problem("mnist.py:mlp", {"steps": 60, **sizes}, JOBS)
    chosen = dict.fromkeys(("float32", "float64"), chosen_engines(problem, torch.float32, device))
    chosen["tf32x3"] = chosen_engines(problem, torch.float32, device, "factored_tf32x3")
    most_bytes = min(BAND_BYTES, torch.cuda.mem_get_info(device)[0] / 4) if is_cuda else 256e6 if small else 2e9
    peaks = {kind: peak_flops(device, kind, side) for kind in chosen}
    peaks["tf32x3"] /= 3
    real = "as they are", problem
    shifted = (
        "augmented: as they are, and shifted by one pixel up, down, left, right, and diagonally",
        augmented(problem),
    )
    cases = [(real, "float32", None), (shifted, "float32", None), (real, "float64", 2)]
    cases += [(real, "tf32x3", None), (shifted, "tf32x3", None)]
    rows, wrong = [], []
    for (data, which), kind, most_bands in cases:
        arguments = which, chosen[kind], device, kind, most_bytes, most_bands, peaks[kind]
        rows.append({"data": data} | attempt(wrong, f"{kind}, {data}", triangle, *arguments))
        print(rows[-1], flush=True)
        if (error := max(rows[-1].get("block_error", {"": 0.0}).values())) > SAME[kind]:
            wrong.append(f"{kind}, {data}: H v is off by {error:.1e}")
    return {"product_flops_per_second": peaks, "cases": rows}, wrong
