"""The worker: where engines and the store meet. Computes tiles on the calling thread, writes them on one other."""

import os
import platform
import resource
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import grad

from pipeline.engines.registry import add_batch
from pipeline.errors import FingerprintError, HessianError, NotFiniteError, ProblemError, TileError
from pipeline.planning.manifest import Manifest
from pipeline.planning.memory import BUFFERED_TILES
from pipeline.planning.tiling import Tile
from pipeline.problem.contexts import exact_kernels
from pipeline.problem.problem import Problem
from pipeline.storage.output import Output
from pipeline.storage.parquet_store import ParquetFiles
from pipeline.storage.receipts import Receipt, receipt_name
from pipeline.storage.tile_products import TileProducts, check_vectors
from pipeline.storage.zarr_store import MatrixStore, StoredObject

BAND = 64  # rows, which stay in a CPU's cache from one operation to the next
FEW_ROWS = 1 / 16  # of those before: what is computed below the diagonal then costs less than another pass


class Worker:
    """Computes tiles of one run.

    Args:
        problem: with the run's weights.
        manifest: the run.
        output: where tiles go.
        device: for the engines.
        concurrent_puts: chunks encoded and put at a time.

    Raises:
        FingerprintError: the problem's weights are not those of the run.
    """

    def __init__(
        self, problem: Problem, manifest: Manifest, output: Output, device: str = "cpu", concurrent_puts: int = 1
    ) -> None:
        if problem.weights_digest() != manifest.fingerprint.weights:
            raise FingerprintError("a worker received weights that are not those of the run")
        grad(torch.sum)(torch.zeros(1))  # torch imports 800 modules at the first transform, which is no tile's fault
        self.manifest, self.plan, self.layout = manifest, manifest.plan, manifest.layout
        self._placed = problem.place(getattr(torch, manifest.dtype), device)
        self._l2, self._weight = problem.l2, manifest.fingerprint.weight
        self._sizes, self._halvings = dict(manifest.sizes), 0
        self._stored: torch.dtype = getattr(torch, manifest.store_dtype)
        self._vectors = torch.from_numpy(check_vectors(manifest.digest, self.layout.size)).to(device)
        self._products: TileProducts  # of the tile computed last
        self._buffers = _Buffers(self._placed.dtype, self._placed.device)
        self._output, self._store = output, MatrixStore(output, manifest)
        self._files = ParquetFiles(output, manifest) if "parquet" in manifest.formats else None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hessian-writer")
        self._putters = ThreadPoolExecutor(concurrent_puts, thread_name_prefix="hessian-putter")
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
            TileError: the tile before could not be written, or the user's code raised something.
        """
        start = time.perf_counter()
        try:
            values = self.values(tile)
        except ProblemError as error:  # of the user's code, which preflight saw work: it may do so again
            raise TileError(f"tile {tile.id}: {error}", tile.id) from error
        seconds = time.perf_counter() - start
        receipts = self.flush()
        made = self._products.to_text(), seconds, attempt, self._halvings
        self._pending = tile.id, self._writer.submit(self._write, tile, values, *made)
        self._buffers.turn()
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
            raise TileError(f"tile {tile}: writing failed with {type(error).__name__}: {error}", tile) from error

    def wait_for_writer(self, seconds: float) -> None:
        """Wait for the tile that is being written, from any thread; its receipt stays where it is."""
        if self._pending is not None:
            wait([self._pending[1]], seconds)

    def close(self) -> None:
        """Stop the writer."""
        self._writer.shutdown()
        self._putters.shutdown()

    def values(self, tile: Tile) -> npt.NDArray[Any]:
        """Compute a tile without writing it.

        Args:
            tile: of the run's plan.

        Returns:
            Its entries, valid until the next call; those of chunks below the diagonal mean nothing.

        Raises:
            NotFiniteError: an entry is NaN or infinite.
            TileError: the tile that was being written could not be.
        """
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        host, out = self._buffers.take(len(rows), len(cols))
        for some_rows, some_cols in self._bands(tile):
            _view(out, rows, cols, some_rows, some_cols).zero_()
        with exact_kernels(self._placed.problem.model):
            for segment, engine in self._segments(rows):
                right = range(max(cols.start, segment.start), cols.stop)
                if right:  # not all below the diagonal
                    self._add(engine, segment, right, _view(out, rows, cols, segment, right))
        self._finish(tile, out)
        if out is not host:
            host.copy_(out)
        return host.numpy()

    def _segments(self, rows: range) -> list[tuple[range, str]]:
        """Cut rows at parameter borders; a factored bias goes with its weight: they share what is pulled back."""
        found: list[tuple[range, str]] = []
        for parameter, segment in self.layout.segments(rows):
            engine = self.manifest.engines[parameter.name]
            if found and found[-1][1] == engine == "factored" and len(segment) <= FEW_ROWS * len(found[-1][0]):
                found[-1] = range(found[-1][0].start, segment.stop), engine
            else:
                found.append((segment, engine))
        return found

    def _require_writer(self) -> None:
        """Raise what went wrong with the tile before as soon as it is known: what is computed now would be lost."""
        if self._pending is not None and self._pending[1].done() and self._pending[1].exception():
            self.flush()

    def _add(self, engine: str, rows: range, cols: range, out: Tensor) -> None:
        """Add all micro-batches; where the device runs out of memory, from then on by smaller groups."""
        while True:
            sizes = self._sizes[engine]
            try:
                for batch in self._placed.batches(sizes.microbatch):
                    self._require_writer()
                    add_batch(engine, self._placed, sizes.row_group, batch, rows, cols, out)
                return
            except torch.OutOfMemoryError:
                smaller = sizes.halved(self._placed.problem.is_cuttable)
                if smaller is None:
                    raise
                self._sizes[engine] = smaller
                self._halvings += 1
            out.zero_()

    def _bands(self, tile: Tile) -> Iterator[tuple[range, range]]:
        """Give a few rows at a time, with the columns of their chunks that are not below the diagonal."""
        cols = self.plan.span(tile.cols)
        for row in tile.rows:
            here = self.plan.span(range(row, row + 1))
            for start in range(here.start, here.stop, BAND):
                yield range(start, min(start + BAND, here.stop)), range(max(here.start, cols.start), cols.stop)

    def _finish(self, tile: Tile, out: Tensor) -> None:
        """Divide a tile by the total weight, add the L2 term, and take its products; refuse what is not finite."""
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        self._products = TileProducts(torch, self._vectors, rows, cols)
        for some_rows, some_cols in self._bands(tile):  # one pass, while a band is in the cache
            part = _view(out, rows, cols, some_rows, some_cols)
            part.div_(self._weight)
            part.diagonal(some_rows.start - some_cols.start).add_(self._l2)
            for left in self.plan.stored_columns(tile, some_rows.start // self.plan.chunk):
                kept = _view(out, rows, cols, some_rows, left)
                self._products.add(kept.to(self._stored).double(), some_rows, left)
        if not bool(self._products.right.isfinite().all()):
            self._refuse(out, rows, cols)

    def _refuse(self, out: Tensor, rows: range, cols: range) -> None:
        """Refuse NaN and infinities, naming the block."""
        for row in rows:  # one by one: a mask of all of a tile is memory that is not planned
            right = range(max(row, cols.start), cols.stop)
            finite = _view(out, rows, cols, range(row, row + 1), right).isfinite()
            if not bool(finite.all()):
                col = right.start + int(finite.byte().argmin())
                a, b = (next(self.layout.segments(range(k, k + 1)))[0].name for k in (row, col))
                raise NotFiniteError(f"entries are NaN or infinite, the first at row {row}, column {col}: H[{a}, {b}]")

    def _write(
        self,
        tile: Tile,
        values: npt.NDArray[Any],
        products: str,
        compute_seconds: float,
        attempt: int,
        halvings: int,
    ) -> Receipt:
        """Put all chunks of a tile, then its receipt; runs on the writer's thread."""
        start = time.perf_counter()
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        putting = [self._putters.submit(self._write_chunk, i, j, values, rows, cols) for i, j in self.plan.chunks(tile)]
        written = self._all_of(putting)
        receipt = Receipt(
            tile=tile.id,
            run=self.manifest.digest,
            chunks=tuple(put for chunk in written for put in chunk.puts),
            max_abs=max(chunk.largest for chunk in written),
            norm=sum(chunk.squares for chunk in written) ** 0.5,
            asymmetry=max(chunk.asymmetry for chunk in written),
            compute_seconds=compute_seconds,
            write_seconds=time.perf_counter() - start,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            attempt=attempt,
            halvings=halvings,
            products=products,
            host=platform.node(),
            pid=os.getpid(),
            device=str(self._placed.device),
            finished=time.time(),
        )
        self._output.put(receipt_name(tile.id), receipt.to_bytes())
        return receipt

    def _all_of(self, putting: "list[Future[_Written]]") -> "list[_Written]":
        """Wait for all chunks of a tile, or for the first that fails; then no put is left that goes on."""
        ended, _ = wait(putting, return_when=FIRST_EXCEPTION)
        if failed := [chunk for chunk in ended if chunk.exception()]:
            self._output.give_up()  # the others may be waiting, for minutes, for what nobody needs any more
            for chunk in putting:
                chunk.cancel()
            wait(putting)
            failed[0].result()
        return [chunk.result() for chunk in putting]

    def _write_chunk(self, i: int, j: int, values: npt.NDArray[Any], rows: range, cols: range) -> "_Written":
        """Put a chunk of a tile's values, and measure it; runs on the putters' threads."""
        span_i, span_j = self.plan.span(range(i, i + 1)), self.plan.span(range(j, j + 1))
        chunk = _view(values, rows, cols, span_i, span_j).astype(self.manifest.store_dtype)
        asymmetry = 0.0
        if i == j:
            asymmetry = self._asymmetry(chunk, span_i)
            chunk = np.triu(chunk) + np.triu(chunk, 1).T
        return _Written(
            self._store.write_chunk(i, j, chunk) + (self._files.write_chunk(i, j, chunk) if self._files else []),
            float(np.abs(chunk).max()),
            float(np.vdot(chunk, chunk)) * (1 if i == j else 2),
            asymmetry,
        )

    def _asymmetry(self, chunk: npt.NDArray[Any], span: range) -> float:
        """Compare entries of a diagonal chunk on both sides of the diagonal, as the engine computed them."""
        worst = 0.0
        for _, segment in self.layout.segments(span):
            square = _view(chunk, span, span, segment, segment)
            scale = float(np.abs(square).max())
            if scale > 0:
                worst = max(worst, float(np.abs(square - square.T).max()) / scale)
        return worst


@dataclass(frozen=True)
class _Written:
    """What was put of a chunk, its largest entry, the sum of squares with its mirror image, and its asymmetry."""

    puts: list[StoredObject]
    largest: float
    squares: float
    asymmetry: float


class _Buffers:
    """Memory of tiles, used again: fresh pages cost more than what is computed in them.

    Args:
        dtype: of the run.
        device: of the engines.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._host = [torch.empty(0, dtype=dtype) for _ in range(BUFFERED_TILES)]
        self._on_device = torch.empty(0, dtype=dtype, device=device)

    def take(self, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """Give a tile of any content, and one on the device: the same where that is a CPU."""
        self._host[0] = _at_least(self._host[0], rows * cols)
        host = self._host[0][: rows * cols].view(rows, cols)
        if self._device.type == "cpu":
            return host, host
        self._on_device = _at_least(self._on_device, rows * cols)
        return host, self._on_device[: rows * cols].view(rows, cols)

    def turn(self) -> None:
        """Leave the tile that was given last to the writer, and give another one's memory from now on."""
        self._host.reverse()


def _at_least(buffer: Tensor, size: int) -> Tensor:
    """Give a buffer of at least so many entries."""
    if len(buffer) >= size:
        return buffer
    if buffer.device.type != "cpu":
        return buffer.new_empty(size)
    # NumPy asks the system for large pages, torch does not: filling these is several times faster.
    return torch.from_numpy(np.empty(size, torch.empty(0, dtype=buffer.dtype).numpy().dtype))


def _view(out: Any, rows: range, cols: range, some_rows: range, some_cols: range) -> Any:
    """Give the part of a tile's values at some of its rows and columns (flat indices)."""
    return out[
        some_rows.start - rows.start : some_rows.stop - rows.start,
        some_cols.start - cols.start : some_cols.stop - cols.start,
    ]
