"""A Hessian in a few numbers: what a sweep over many keeps of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.errors import IncompleteError
from pipeline.results.hessian import Hessian
from pipeline.storage.read_ahead import ahead
from pipeline.storage.receipts import own_receipt


@dataclass(frozen=True)
class Summary:
    """Of a finished Hessian.

    Attributes:
        loss: L.
        gradient_norm: |dL / dtheta|, Euclidean.
        trace: of H; None where the run did not compute its whole diagonal.
        norm: Frobenius norm of H; None where the run did not compute all of it.
        blocks: Frobenius norm of each block that was computed, by its parameters in the order of rows and columns.
        finished: when the last tile was, in seconds since the epoch.
        worker_seconds: of computing and writing all tiles, over all workers, however many calls that took.
    """

    loss: float
    gradient_norm: float
    trace: float | None
    norm: float | None
    blocks: Mapping[tuple[str, str], float]
    finished: float
    worker_seconds: float


def summarize(hessian: Hessian) -> Summary:
    """Read a Hessian once, and give its summary.

    Args:
        hessian: a finished one.

    Returns:
        The summary.

    Raises:
        IncompleteError: a chunk or a receipt is missing or damaged.
    """
    squares, trace = _one_pass(hessian)
    plan, parameters, everything = hessian.manifest.plan, tuple(hessian.parameters), range(hessian.shape[0])
    blocks = {
        (a.name, b.name): float(np.sqrt(squares[i, j]))
        for i, a in enumerate(parameters)
        for j, b in enumerate(parameters)
        if i <= j and plan.covers(a.span, b.span)
    }
    tiles = plan.tiles()
    receipts = list(ahead(partial(own_receipt, hessian.output, hessian.manifest), tiles))
    found = [receipt for receipt in receipts if receipt is not None]
    if len(found) < len(tiles):
        raise IncompleteError(f"{hessian.url}: {len(tiles) - len(found)} receipts are missing or damaged")
    return Summary(
        hessian.loss,
        float(np.linalg.norm(hessian.gradient)),
        trace if bool(plan.selected.diagonal().all()) else None,
        float(np.sqrt(squares.sum())) if plan.covers(everything, everything) else None,
        blocks,
        max(receipt.finished for receipt in found),
        sum(receipt.compute_seconds + receipt.write_seconds for receipt in found),
    )


def _one_pass(hessian: Hessian) -> tuple[npt.NDArray[np.float64], float]:
    """Sum up squares by pairs of parameters, mirror images included, and the diagonal; in float64."""
    plan, layout = hessian.manifest.plan, hessian.parameters
    number = {name: k for k, name in enumerate(layout.names)}
    squares, trace = np.zeros((len(layout), len(layout))), 0.0
    keys = [(int(i), int(j)) for i, j in zip(*np.nonzero(plan.selected), strict=True)]
    for (i, j), chunk in zip(keys, hessian.store.read_chunks(keys), strict=True):
        if isinstance(chunk, IncompleteError):
            raise chunk
        values = chunk.astype(np.float64)
        trace += float(values.trace()) if i == j else 0.0
        rows, cols = plan.span(range(i, i + 1)), plan.span(range(j, j + 1))
        for a, inside in layout.segments(rows):
            band = values[inside.start - rows.start : inside.stop - rows.start]
            for b, within in layout.segments(cols):
                part = band[:, within.start - cols.start : within.stop - cols.start]
                total = float(np.vdot(part, part))
                squares[number[a.name], number[b.name]] += total
                if i != j:
                    squares[number[b.name], number[a.name]] += total
    return squares, trace
