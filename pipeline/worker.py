"""The worker: where engines and the store meet. Computes tiles on the calling thread, writes them on one other."""

import os
import platform
import resource
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.contexts import exact_kernels
from pipeline.engines import ENGINES, Engine
from pipeline.errors import FingerprintError, HessianError, NotFiniteError, TileError
from pipeline.manifest import Manifest
from pipeline.output import Output
from pipeline.problem import Problem
from pipeline.receipts import Receipt, receipt_name
from pipeline.store import MatrixStore, StoredObject
from pipeline.tiling import Tile


class Worker:
    """Computes tiles of one run.

    Args:
        problem: with the run's weights.
        manifest: the run.
        output: where tiles go.
        device: for the engines.

    Raises:
        FingerprintError: the problem's weights are not those of the run.
    """

    def __init__(self, problem: Problem, manifest: Manifest, output: Output, device: str = "cpu") -> None:
        if problem.weights_digest() != manifest.fingerprint.weights:
            raise FingerprintError("a worker received weights that are not those of the run")
        self.manifest, self.plan, self.layout = manifest, manifest.plan, manifest.layout
        self._placed = problem.place(getattr(torch, manifest.dtype), device)
        self._l2, self._weight = problem.l2, manifest.fingerprint.weight
        self._engines: dict[str, Engine] = {
            name: ENGINES[name](self._placed, manifest.row_group) for name in set(manifest.engines.values())
        }
        self._output, self._store = output, MatrixStore(output, manifest, write=True)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hessian-writer")
        self._pending: tuple[str, Future[Receipt]] | None = None

    def compute(self, tile: Tile, attempt: int = 1) -> list[Receipt]:
        """Compute a tile and hand it to the writer.

        Args:
            tile: of the run's plan.
            attempt: noted in the receipt.

        Returns:
            Receipts of tiles written since the last call: this one's comes with the next call, or with `flush`.

        Raises:
            NotFiniteError: an entry is NaN or infinite.
            TileError: the tile before could not be written.
        """
        start = time.perf_counter()
        values = self._values(tile)
        seconds = time.perf_counter() - start
        receipts = self.flush()
        self._pending = tile.id, self._writer.submit(self._write, tile, values, seconds, attempt)
        return receipts

    def flush(self) -> list[Receipt]:
        """Wait for the writer.

        Returns:
            The receipt of the tile that was being written, if there was one.

        Raises:
            TileError: it could not be written.
        """
        if self._pending is None:
            return []
        tile, written = self._pending
        self._pending = None
        try:
            return [written.result()]
        except HessianError:
            raise
        except Exception as error:
            raise TileError(f"tile {tile}: writing failed with {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Stop the writer."""
        self._writer.shutdown()

    def _values(self, tile: Tile) -> npt.NDArray[Any]:
        """Compute the tile's part of the upper triangle; entries below the diagonal are left zero."""
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        out = torch.zeros(len(rows), len(cols), dtype=self._placed.dtype, device=self._placed.device)
        with exact_kernels(self._placed.problem.model):
            for batch in self._placed.batches(self.manifest.microbatch):
                for parameter, segment in self.layout.segments(rows):
                    right = range(max(cols.start, segment.start), cols.stop)
                    if right:  # not all below the diagonal
                        engine = self._engines[self.manifest.engines[parameter.name]]
                        engine.add(batch, segment, right, _view(out, rows, cols, segment, right))
        out /= self._weight
        for i in range(max(rows.start, cols.start), min(rows.stop, cols.stop)):
            out[i - rows.start, i - cols.start] += self._l2
        self._require_finite(out, rows, cols)
        return out.cpu().numpy()

    def _require_finite(self, out: Tensor, rows: range, cols: range) -> None:
        """Refuse NaN and infinities, naming the block."""
        bad = (~out.isfinite()).nonzero()
        if len(bad):
            row, col = rows.start + int(bad[0, 0]), cols.start + int(bad[0, 1])
            a, b = (next(self.layout.segments(range(k, k + 1)))[0].name for k in (row, col))
            raise NotFiniteError(
                f"{len(bad)} entries are NaN or infinite, the first at row {row}, column {col}: H[{a}, {b}]"
            )

    def _write(self, tile: Tile, values: npt.NDArray[Any], compute_seconds: float, attempt: int) -> Receipt:
        """Put all chunks of a tile, then its receipt; runs on the writer's thread."""
        start = time.perf_counter()
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        asymmetry = self._asymmetry(values, rows, cols)
        puts: list[StoredObject] = []
        squares = largest = 0.0
        for i, j in self.plan.chunks(tile):
            span_i, span_j = self.plan.span(range(i, i + 1)), self.plan.span(range(j, j + 1))
            chunk = _view(values, rows, cols, span_i, span_j).astype(self.manifest.store_dtype)
            if i == j:
                chunk = np.triu(chunk) + np.triu(chunk, 1).T
            puts += self._store.write_chunk(i, j, chunk)
            largest = max(largest, float(np.abs(chunk).max()))
            squares += float(np.vdot(chunk, chunk)) * (1 if i == j else 2)
        receipt = Receipt(
            tile=tile.id,
            chunks=tuple(puts),
            max_abs=largest,
            norm=squares**0.5,
            asymmetry=asymmetry,
            compute_seconds=compute_seconds,
            write_seconds=time.perf_counter() - start,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            attempt=attempt,
            host=platform.node(),
            pid=os.getpid(),
            device=str(self._placed.device),
            finished=time.time(),
        )
        self._output.put(receipt_name(tile.id), receipt.to_bytes())
        return receipt

    def _asymmetry(self, values: npt.NDArray[Any], rows: range, cols: range) -> float:
        """Compare entries on both sides of the diagonal, which the engine computed independently of each other."""
        worst = 0.0
        for _, segment in self.layout.segments(range(max(rows.start, cols.start), min(rows.stop, cols.stop))):
            square = _view(values, rows, cols, segment, segment)
            scale = float(np.abs(square).max())
            if scale > 0:
                worst = max(worst, float(np.abs(square - square.T).max()) / scale)
        return worst


def _view(out: Any, rows: range, cols: range, some_rows: range, some_cols: range) -> Any:
    """Give the part of a tile's values at some of its rows and columns (flat indices)."""
    return out[
        some_rows.start - rows.start : some_rows.stop - rows.start,
        some_cols.start - cols.start : some_cols.stop - cols.start,
    ]
