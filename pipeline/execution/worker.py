"""The worker: where engines and the store meet. Computes tiles on the calling thread, writes them on one other."""

import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import grad

from pipeline.engines.registry import Part, add_batch
from pipeline.errors import FingerprintError, HessianError, NotFiniteError, ProblemError, TileError
from pipeline.execution.way_out import Chunk, Leaving, OnHost, WayOut, at_least, part_of
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.manifest import Manifest
from pipeline.planning.memory import BUFFERED_TILES
from pipeline.planning.tiling import Tile
from pipeline.problem.contexts import exact_kernels, is_deterministic, ordered_sums
from pipeline.problem.problem import Problem
from pipeline.problem.read_once import ReadOnce
from pipeline.storage.chunk_formats import formats_of, store_chunk
from pipeline.storage.output import Output
from pipeline.storage.receipts import Receipt, receipt_name
from pipeline.storage.tile_products import TileProducts, check_vectors
from pipeline.storage.zarr_store import StoredObject

BAND = {"cpu": 64, "cuda": 1024}  # rows, which stay in a CPU's cache from one operation to the next
NOTHING = np.zeros((0, 0))
FEW_ROWS = 1 / 16  # of those before: what is computed below the diagonal then costs less than another pass

_Written = tuple[Chunk, list[StoredObject]]  # what is known of a chunk, without its entries, and what was put


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
        self._buffers = _Buffers(self._placed.dtype, self._placed.device)
        self._way_out: WayOut | None = None
        if self._placed.device.type == "cuda":
            self._placed = replace(self._placed, counts=ReadOnce())
            whole = manifest.symmetry == "mirrored"
            self._way_out = WayOut(self.plan, self.layout, self._stored, self._placed.device, is_mirrored=whole)
        self._output, self._formats = output, formats_of(output, manifest)
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
            leaving = self._leaving(tile)
        except ProblemError as error:  # of the user's code, which preflight saw work: it may do so again
            raise TileError(f"tile {tile.id}: {error}", tile.id) from error
        seconds = time.perf_counter() - start
        receipts = self.flush()
        self._pending = tile.id, self._writer.submit(self._write, tile, leaving, seconds, attempt, self._halvings)
        self._turn()
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
        out, _ = self._computed(tile)
        return out.cpu().numpy()

    def _leaving(self, tile: Tile) -> Leaving:
        """Compute a tile, and start it on its way to the store."""
        out, products = self._computed(tile)
        if self._way_out is not None:
            return self._way_out.send(tile, out, products)
        return OnHost(self.plan, self.layout, tile, out.numpy(), products, self.manifest.store_dtype)

    def _turn(self) -> None:
        """Leave the tile that was computed last to the writer."""
        if self._way_out is not None:
            self._way_out.turn()  # the device's memory is free once chunks are made
        else:
            self._buffers.turn()

    def _computed(self, tile: Tile) -> tuple[Tensor, TileProducts]:
        """Compute a tile, and its products, where engines do."""
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        out, counts = self._buffers.take(len(rows), len(cols)), self._placed.counts
        while True:
            self._add_all(tile, out)
            products = self._finish(tile, out)
            is_finite = products.right.isfinite().all()
            exceeded = torch.zeros_like(is_finite) if counts is None else counts.exceeded(out)
            may_stay, is_wrong = torch.stack((is_finite, exceeded)).tolist()  # all of a tile that a device is asked
            if counts is not None and is_wrong:
                counts.give_up()
                continue
            if not may_stay:
                self._refuse(out, rows, cols)
            return out, products

    def _add_all(self, tile: Tile, out: Tensor) -> None:
        """Add all micro-batches to a tile that holds anything."""
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        for some_rows, some_cols in self._bands(tile):
            part_of(out, rows, cols, some_rows, some_cols).zero_()
        with (
            exact_kernels(self._placed.problem.model),
            ordered_sums(deterministic=is_deterministic(asked=self.manifest.deterministic)),
        ):
            for engine, segments in self._segments(rows).items():
                found = [(some, range(max(cols.start, some.start), cols.stop)) for some in segments]
                parts = [Part(some, right, part_of(out, rows, cols, some, right)) for some, right in found if right]
                if parts:  # not all below the diagonal
                    self._add(engine, parts)

    def _segments(self, rows: range) -> dict[str, list[range]]:
        """Cut rows at parameter borders, by engine; by units a bias goes with its weight, and shares what it takes."""
        found: list[tuple[range, str]] = []
        for parameter, segment in self.layout.segments(rows):
            engine = self.manifest.engines[parameter.name]
            joined = TRAITS[engine].by_units and bool(found) and found[-1][1] == engine
            if joined and len(segment) <= FEW_ROWS * len(found[-1][0]):
                found[-1] = range(found[-1][0].start, segment.stop), engine
            else:
                found.append((segment, engine))
        by_engine: dict[str, list[range]] = {}
        for segment, engine in found:
            by_engine.setdefault(engine, []).append(segment)
        return by_engine

    def _require_writer(self) -> None:
        """Raise what went wrong with the tile before as soon as it is known: what is computed now would be lost."""
        if self._pending is not None and self._pending[1].done() and self._pending[1].exception():
            self.flush()

    def _add(self, engine: str, parts: Sequence[Part]) -> None:
        """Add all micro-batches; where the device runs out of memory, from then on by smaller groups."""
        while True:
            sizes = self._sizes[engine]
            try:
                for batch in self._placed.batches(sizes.microbatch):
                    self._require_writer()
                    add_batch(engine, self._placed, sizes.row_group, batch, parts)
                return
            except torch.OutOfMemoryError:
                smaller = sizes.halved(self._placed.problem.is_cuttable)
                if smaller is None:
                    raise
                self._sizes[engine] = smaller
                self._halvings += 1
            for part in parts:
                part.out.zero_()

    def _bands(self, tile: Tile) -> Iterator[tuple[range, range]]:
        """Yield a few rows at a time, with the columns of their chunks that are not below the diagonal."""
        cols, band = self.plan.span(tile.cols), BAND[self._placed.device.type]
        for row in tile.rows:
            here = self.plan.span(range(row, row + 1))
            for start in range(here.start, here.stop, band):
                yield range(start, min(start + band, here.stop)), range(max(here.start, cols.start), cols.stop)

    def _finish(self, tile: Tile, out: Tensor) -> TileProducts:
        """Divide a tile by the total weight, add the L2 term, and take its products, of what is going to be stored."""
        rows, cols = self.plan.span(tile.rows), self.plan.span(tile.cols)
        products = TileProducts(torch, self._vectors, rows, cols)
        for some_rows, some_cols in self._bands(tile):  # one pass, while a band is in the cache
            part = part_of(out, rows, cols, some_rows, some_cols)
            part.div_(self._weight)
            part.diagonal(some_rows.start - some_cols.start).add_(self._l2)
            for left in self.plan.stored_columns(tile, some_rows.start // self.plan.chunk):
                kept = part_of(out, rows, cols, some_rows, left)
                products.add(kept.to(self._stored).double(), some_rows, left)
        return products

    def _refuse(self, out: Tensor, rows: range, cols: range) -> None:
        """Refuse NaN and infinities, naming the block."""
        for row in rows:  # one by one: a mask of all of a tile is memory that is not planned
            right = range(max(row, cols.start), cols.stop)
            finite = part_of(out, rows, cols, range(row, row + 1), right).to(self._stored).isfinite()
            if not bool(finite.all()):
                col = right.start + int(finite.byte().argmin())
                a, b = (next(self.layout.segments(range(k, k + 1)))[0].name for k in (row, col))
                raise NotFiniteError(f"entries are NaN or infinite, the first at row {row}, column {col}: H[{a}, {b}]")

    def _write(self, tile: Tile, leaving: Leaving, compute_seconds: float, attempt: int, halvings: int) -> Receipt:
        """Put all chunks of a tile, then its receipt; runs on the writer's thread."""
        start = time.perf_counter()
        leaving.wait()
        putting = [self._putters.submit(self._write_chunk, i, j, leaving) for i, j in self.plan.chunks(tile)]
        written = self._all_of(putting)
        receipt = Receipt(
            tile=tile.id,
            run=self.manifest.digest,
            chunks=tuple(put for _, puts in written for put in puts),
            max_abs=max(chunk.largest for chunk, _ in written),
            norm=sum(chunk.squares for chunk, _ in written) ** 0.5,
            asymmetry=max(chunk.asymmetry for chunk, _ in written),
            compute_seconds=compute_seconds,
            write_seconds=time.perf_counter() - start,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            attempt=attempt,
            halvings=halvings,
            products=leaving.products(),
            host=platform.node(),
            pid=os.getpid(),
            device=str(self._placed.device),
            finished=time.time(),
        )
        self._output.put(receipt_name(tile.id), receipt.to_bytes())
        return receipt

    def _all_of(self, putting: list[Future[_Written]]) -> list[_Written]:
        """Wait for all chunks of a tile, or for the first that fails; then no put is left that goes on."""
        ended, _ = wait(putting, return_when=FIRST_EXCEPTION)
        if failed := [chunk for chunk in ended if chunk.exception()]:
            self._output.give_up()  # the others may be waiting, for minutes, for what nobody needs any more
            for chunk in putting:
                chunk.cancel()
            wait(putting)
            failed[0].result()
        return [chunk.result() for chunk in putting]

    def _write_chunk(self, i: int, j: int, leaving: Leaving) -> _Written:
        """Put a chunk of a tile; runs on the putters' threads."""
        chunk = leaving.chunk(i, j)
        puts = store_chunk(self._formats.values(), self.manifest, i, j, chunk.entries, chunk.mirror)
        return replace(chunk, entries=NOTHING, mirror=None), puts


class _Buffers:
    """Memory of tiles, used again: fresh pages cost more than what is computed in them.

    Args:
        dtype: of the run.
        device: of the engines.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        count = BUFFERED_TILES if device.type == "cpu" else 1
        self._kept = [torch.empty(0, dtype=dtype, device=device) for _ in range(count)]

    def take(self, rows: int, cols: int) -> Tensor:
        """Return a tile of any content."""
        self._kept[0] = at_least(self._kept[0], rows * cols)
        return self._kept[0][: rows * cols].view(rows, cols)

    def turn(self) -> None:
        """Leave the tile that was given last to the writer, and give another one's memory from now on."""
        self._kept.reverse()
