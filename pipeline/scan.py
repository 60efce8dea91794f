"""One pass over a finished store: every chunk read back and checked, and multiplied with vectors on the way.

Parquet files beside the array are read back too, and compared with its chunks.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline.chunks import Matrix
from pipeline.errors import IncompleteError
from pipeline.handle import Hessian
from pipeline.output import PARQUET
from pipeline.parquet import ParquetFiles, file_key
from pipeline.receipts import read_receipt
from pipeline.store import chunk_key, tile_keys

Vector = npt.NDArray[np.float64]


class Scan:
    """One pass over the store: every chunk checked, and products with vectors on the way.

    Args:
        hessian: what to read.
        vectors: what to multiply with.  # shape: (k, P)
        parquet: whether Parquet files are there to be checked.

    Attributes:
        chunks: read, mirrors included.
        files: Parquet files read, mirrors included.
        faults: what is wrong, one line a chunk.
        products: H V'.  # shape: (k, P)
        largest: max|H_aa| by parameter; max|H| where that block was not computed.
    """

    def __init__(self, hessian: Hessian, vectors: Vector, *, parquet: bool = False) -> None:
        self._files = _Files(hessian) if parquet else None
        self.faults: list[str] = self._files.foreign() if self._files else []
        self.chunks = self.files = 0
        self.products = np.zeros_like(vectors)
        self.largest = {p.name: 0.0 for p in hessian.parameters}
        self._hessian, self._store = hessian, hessian.store
        plan, maximum = hessian.manifest.plan, 0.0
        selected = [(int(i), int(j)) for i, j in np.argwhere(plan.selected)]
        for (i, j), chunk in zip(selected, self._chunks(selected), strict=True):
            if chunk is None:
                continue
            rows, cols = plan.span(range(i, i + 1)), plan.span(range(j, j + 1))
            self._multiply(chunk, rows, cols, vectors)
            self._measure(chunk, rows, cols)
            maximum = max(maximum, float(np.abs(chunk).max()))
        for p in hessian.parameters:
            if not plan.covers(p.span, p.span):
                self.largest[p.name] = maximum

    def _chunks(self, selected: list[tuple[int, int]]) -> Iterator[npt.NDArray[np.float64] | None]:
        """Read chunks and their mirror images, and compare them; None for those that are at fault."""
        mirrored = self._hessian.manifest.symmetry == "mirrored"
        keys = [key for i, j in selected for key in ([(i, j), (j, i)] if mirrored and i != j else [(i, j)])]
        found = zip(keys, self._store.read_chunks(keys), strict=True)
        for i, j in selected:
            chunk = self._noted(*next(found))
            if i == j and chunk is not None and not np.array_equal(chunk, chunk.T):
                self.faults.append(f"{chunk_key(i, j)} is not symmetric")
            if i != j and mirrored:
                mirror = self._noted(*next(found))
                if chunk is not None and mirror is not None and not np.array_equal(chunk, mirror.T):
                    self.faults.append(f"{chunk_key(j, i)} is not the mirror image of {chunk_key(i, j)}")
            yield None if chunk is None else chunk.astype(np.float64)

    def _noted(self, key: tuple[int, int], found: Matrix | IncompleteError) -> Matrix | None:
        """Count a chunk, and note what is wrong with it."""
        self.chunks += 1
        if isinstance(found, IncompleteError):
            self.faults.append(str(found))
            return None
        if self._files:
            self.files += 1
            self.faults += self._files.faults(*key, found)
        return found

    def _multiply(self, chunk: npt.NDArray[np.float64], rows: range, cols: range, vectors: Vector) -> None:
        self.products[:, rows.start : rows.stop] += vectors[:, cols.start : cols.stop] @ chunk.T
        if rows != cols:
            self.products[:, cols.start : cols.stop] += vectors[:, rows.start : rows.stop] @ chunk

    def _measure(self, chunk: npt.NDArray[np.float64], rows: range, cols: range) -> None:
        """Note the largest entries of diagonal blocks."""
        for p, r in self._hessian.parameters.segments(rows):
            c = range(max(cols.start, p.offset), min(cols.stop, p.span.stop))
            if c:
                part = chunk[r.start - rows.start : r.stop - rows.start, c.start - cols.start : c.stop - cols.start]
                self.largest[p.name] = max(self.largest[p.name], float(np.abs(part).max()))


class _Files:
    """The Parquet files that a run or an export left, and what its receipts say of them."""

    def __init__(self, hessian: Hessian) -> None:
        self._output, self._manifest = hessian.output, hessian.manifest
        self._stored = ParquetFiles(hessian.output, hessian.manifest)
        self._checksums: dict[str, int] = {}
        for tile in hessian.manifest.plan.tiles():
            receipt = read_receipt(hessian.output, tile)
            self._checksums |= {chunk.key: chunk.crc32c for chunk in receipt.chunks} if receipt else {}

    def foreign(self) -> list[str]:
        """Name files that are not of this Hessian: readers of the folder would take them for parts of it."""
        tiles = self._manifest.plan.tiles()
        ours = {key for tile in tiles for key in tile_keys(self._manifest, tile, file_key)}
        return [f"{PARQUET}/{key} is not of this Hessian" for key in sorted(self._output.sizes(PARQUET).keys() - ours)]

    def faults(self, i: int, j: int, chunk: Matrix) -> list[str]:
        """Compare the file of a chunk with the Zarr chunk."""
        key = file_key(i, j)
        if key not in self._checksums:
            return [f"{PARQUET}/{key} is in no receipt"]
        try:
            found = self._stored.read_chunk(i, j, self._checksums[key])
        except IncompleteError as error:
            return [str(error)]
        differing = int((found != chunk).sum())
        return [f"{PARQUET}/{key} differs from {chunk_key(i, j)} in {differing} entries"] if differing else []
