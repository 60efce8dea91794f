"""One pass over a finished store: every chunk read back and checked, and multiplied with vectors on the way.

Parquet files beside the array are read back too, and compared with its chunks.
"""

import numpy as np
import numpy.typing as npt

from pipeline.errors import IncompleteError
from pipeline.handle import Hessian
from pipeline.output import PARQUET
from pipeline.parquet import ParquetFiles, file_key
from pipeline.receipts import read_receipt
from pipeline.store import Matrix, chunk_key, tile_keys

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
        for i, j in np.argwhere(plan.selected):
            chunk = self._checked(int(i), int(j))
            if chunk is None:
                continue
            rows, cols = plan.span(range(i, i + 1)), plan.span(range(j, j + 1))
            self._multiply(chunk, rows, cols, vectors)
            self._measure(chunk, rows, cols)
            maximum = max(maximum, float(np.abs(chunk).max()))
        for p in hessian.parameters:
            if not plan.covers(p.span, p.span):
                self.largest[p.name] = maximum

    def _checked(self, i: int, j: int) -> npt.NDArray[np.float64] | None:
        """Read a chunk and its mirror image."""
        chunk = self._read(i, j)
        if i != j and self._hessian.manifest.symmetry == "mirrored":
            mirror = self._read(j, i)
            if chunk is not None and mirror is not None and not np.array_equal(chunk, mirror.T):
                self.faults.append(f"{chunk_key(j, i)} is not the mirror image of {chunk_key(i, j)}")
        if i == j and chunk is not None and not np.array_equal(chunk, chunk.T):
            self.faults.append(f"{chunk_key(i, j)} is not symmetric")
        return chunk

    def _read(self, i: int, j: int) -> npt.NDArray[np.float64] | None:
        self.chunks += 1
        try:
            chunk = self._store.read_chunk(i, j)
        except IncompleteError as error:
            self.faults.append(str(error))
            return None
        if self._files:
            self.files += 1
            self.faults += self._files.faults(i, j, chunk)
        return chunk.astype(np.float64)

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
