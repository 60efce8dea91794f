"""The upper triangle on any device, as a plan would have it computed; what it is timed and judged by."""

import contextlib
import gc
import io
import time
import traceback
from itertools import pairwise

import numpy as np
import torch
from bare import ROOT
from torch import nn

from pipeline import Problem
from pipeline.engines.registry import ENGINES
from pipeline.planning.engine_traits import candidates
from pipeline.preflight.checks import preflight
from pipeline.problem.contexts import exact_kernels
from pipeline.problem.double_backward import MOST_SAMPLES

SAME = {"float64": 1e-8, "float32": 1e-4, "tf32x3": 1e-4}  # block error against plain double backward in float64
FLOOR = 1e-6  # of the largest entry: blocks below are rounding, judged by that
JOBS = ROOT / "jobs"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device, function, *arguments):
    """Give seconds, the most bytes held on the device beyond those held before, and the result."""
    is_cuda, held = device.type == "cuda", 0
    if is_cuda:
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    start = time.perf_counter()
    found = function(*arguments)
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) - held if is_cuda else None, found


@contextlib.contextmanager
def kernels(model, *, tf32=False):
    """The kernels of a run; TF32 for what is to be compared with. All is put back at the end."""
    with exact_kernels(model):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        yield


def peak_flops(device, kind, side):
    """The matrix product at its best: FLOP/s."""
    a = torch.randn(side, side, device=device, dtype=torch.float64 if kind == "float64" else torch.float32)
    with kernels(nn.Identity(), tf32=kind == "tf32x3"):
        return 2 * side**3 / min(timed(device, torch.mm, a, a)[0] for _ in range(7))


def least_flops(layout, samples, stop):
    """Two for each sample and entry of the first rows that symmetry does not give; 0.52 N P^2 for the headline.

    Within a layer H[(i, j), (p, k)] = H[(i, k), (p, j)]: a quarter of the block is enough, of others the upper half.
    """
    entries = 0
    for p in layout:
        units, width = p.shape[0], p.size // p.shape[0]
        done = min(max(stop - p.offset, 0) // width, units)
        pairs = done * units - done * (done - 1) // 2
        entries += pairs * width * (width + 1) // 2 + done * width * (layout.size - p.span.stop)
    return 2.0 * samples * entries


def tiles(layout, height):
    """Rows of one parameter at a time, of whole units where so many fit."""
    for p in layout:
        width = p.size // p.shape[0] if p.size and p.shape else 1
        step = height - height % width if height >= width else height
        for start in range(p.offset, p.span.stop, step):
            yield p.name, range(start, min(start + step, p.span.stop))


def chosen_engines(problem, dtype, device, asked="auto"):
    """The engine of each parameter, as preflight chooses it; not timed."""
    found = preflight(problem, candidates(asked), dtype, str(device), MOST_SAMPLES).parameters
    return {name: verdict.engine for name, verdict in found.items()}


def add_tiles(placed, chosen, batches, band, out):
    """Add rows against columns from the diagonal on to `out`, whose first entry is the band's on the diagonal."""
    start, size = band[0][1].start, placed.layout.size
    made = {name: ENGINES[name](placed, max(len(rows) for _, rows in band)) for name in set(chosen.values())}
    for batch in batches:
        for name, rows in band:
            part = out[rows.start - start : rows.stop - start, rows.start - start :]
            made[chosen[name]].add(batch, rows, range(rows.start, size), part)


def hessian(placed, chosen, height, microbatch=None):
    """The whole matrix on the device: the upper triangle by tiles, mirrored at the end."""
    problem, layout, band = placed.problem, placed.layout, list(tiles(placed.layout, height))
    out = torch.zeros(layout.size, layout.size, dtype=placed.dtype, device=placed.device)
    add_tiles(placed, chosen, placed.batches(microbatch), band, out)
    if problem.reduction == "mean":
        out /= sum(float(placed.loss_sum({}, batch)[1]) for batch in placed.batches(microbatch))
    out.diagonal().add_(problem.l2)
    for _, rows in band:
        square = out[rows.start : rows.stop, rows.start : rows.stop]
        square.copy_(square.triu() + square.triu(1).T)
        out[rows.stop :, rows.start : rows.stop] = out[rows.start : rows.stop, rows.stop :].T
    return out


def vector_errors(found, known, layout, stop):
    """Block errors of products, or rows: of each parameter's entries, to its own largest.  # shape: (k, parameters)."""
    gap, size = np.nan_to_num(np.abs(found - known), nan=np.inf)[:, :stop], np.abs(known)[:, :stop]
    places = [slice(p.offset, min(p.span.stop, stop)) for p in layout if p.offset < stop]
    largest = np.stack([size[:, place].max(1) for place in places], 1)
    worst = np.stack([gap[:, place].max(1) for place in places], 1)
    return worst / (largest + FLOOR * size.max(1, keepdims=True) + np.finfo(float).tiny)


def attempt(wrong, label, function, *arguments):
    """Call a part, and note what it raises: the others shall still be run."""
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        wrong.append(f"{label} raised {in_words(error)}")
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return {"raised": wrong[-1]}


def in_words(error):
    memory = "memory" in str(error).lower()
    return f"{'out of memory: ' if memory else ''}{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def quietly(function, *arguments):
    """Call what prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def mlp(*widths, samples):
    """A tanh network, with cross-entropy on random data."""
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    return classifier(nn.Sequential(*layers[:-1]), torch.randn(samples, widths[0]), widths[-1])


def classifier(model, inputs, classes):
    return Problem(model, nn.CrossEntropyLoss(), (inputs, torch.randint(0, classes, (len(inputs),))))
