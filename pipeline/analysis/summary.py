"""A Hessian in a few numbers: what a sweep over many keeps of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.analysis.hessian import Hessian
from pipeline.errors import IncompleteError
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
    order = {name: k for k, name in enumerate(hessian.parameters.names)}
    blocks = {(a, b): norm for (a, b), norm in hessian.block_norms().items() if order[a] <= order[b]}
    plan = hessian.manifest.plan
    tiles = plan.tiles()
    receipts = list(ahead(partial(own_receipt, hessian.output, hessian.manifest), tiles))
    found = [receipt for receipt in receipts if receipt is not None]
    if len(found) < len(tiles):
        raise IncompleteError(f"{hessian.url}: {len(tiles) - len(found)} receipts are missing or damaged")
    return Summary(
        hessian.loss,
        float(np.linalg.norm(hessian.gradient)),
        hessian.trace() if plan.selected.diagonal().all() else None,
        hessian.norm() if hessian.is_complete else None,
        blocks,
        max(receipt.finished for receipt in found),
        sum(receipt.compute_seconds + receipt.write_seconds for receipt in found),
    )
