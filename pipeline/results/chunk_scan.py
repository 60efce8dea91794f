"""One pass over a finished store: every chunk read back and checked, and multiplied with vectors on the way.

Parquet files beside the array are read back too, and compared with its chunks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from pipeline.errors import IncompleteError
from pipeline.planning.tiling import Tile
from pipeline.results.hessian import StoredHessian
from pipeline.storage.chunk_codec import Matrix
from pipeline.storage.output import PARQUET
from pipeline.storage.parquet_store import ParquetFiles, file_key
from pipeline.storage.read_ahead import Room, ahead
from pipeline.storage.receipts import Receipt, is_own, read_receipt
from pipeline.storage.tile_products import COUNT, StoredProducts, check_vectors
from pipeline.storage.zarr_store import StoredObject, chunk_key

BAND_BYTES = 2**20  # of rows of a chunk, in float64, that are multiplied while they lie in a cache
COMPARED = 64  # rows, with as many columns: the latter are read all over a chunk

Vector = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]  # of rows  # shape: (P,)


@dataclass(frozen=True)
class _Products:
    """Products of a chunk.

    Attributes:
        right: with vectors of its columns.  # shape: (vectors, rows)
        down: with vectors of its rows; None on the diagonal.  # shape: (vectors, columns)
        own: those that its tile's receipt has.
    """

    right: Vector
    down: Vector | None
    own: StoredProducts


@dataclass(frozen=True)
class _Seen:
    """A chunk and its mirror image, where there is one, read and multiplied.

    Attributes:
        key: of the chunk.
        chunks: read.
        faults: of both.
        found: entries, or what is wrong with them, of both; only where they are to be compared with files.
        products: None where it is at fault.
    """

    key: tuple[int, int]
    chunks: int
    faults: list[str]
    found: dict[tuple[int, int], Matrix | IncompleteError]
    products: _Products | None


class Scan:
    """One pass over the store: every chunk checked, and products with vectors on the way.

    The thread that has read a chunk checks and multiplies it, a band of rows at a time, which lies in its cache; the
    products are added in the order of chunks.

    Args:
        hessian: what to read.
        vectors: what to multiply with.  # shape: (k, P)
        parquet: whether Parquet files are there to be checked.
        only: the rows whose products are wanted: chunks that they do not cross are left out; all when None.

    Attributes:
        chunks: read, mirrors included.
        files: Parquet files read, mirrors included.
        faults: what is wrong, one line a chunk or a tile.
        products: H V', in the rows that are wanted.  # shape: (k, P)
    """

    def __init__(
        self, hessian: StoredHessian, vectors: Vector, *, parquet: bool = False, only: Mask | None = None
    ) -> None:
        self._files = _Files(hessian) if parquet else None
        self.faults: list[str] = self._files.foreign() if self._files else []
        self.chunks = self.files = 0
        self.products = np.zeros_like(vectors)
        self._vectors, self._plan = vectors, hessian.manifest.plan
        self._store, self._images, side = hessian.store, hessian.manifest.images, self._plan.chunk
        self._chunk, self._mirror = (Room((side, side), hessian.dtype) for _ in range(2))
        self._band = Room((max(1, BAND_BYTES // (8 * side)), side), np.float64)
        manifest, tiles = hessian.manifest, self._plan.tiles()
        self._of_run = check_vectors(manifest.digest, hessian.shape[0])
        receipts = ahead(partial(read_receipt, hessian.output, manifest), tiles)
        with threadpool_limits(1):  # of BLAS, in each of the threads that read
            chosen = [[key for key in self._plan.chunks(tile) if self._crosses(key, only)] for tile in tiles]
            seen = ahead(self._see, [key for keys in chosen for key in keys])
            for tile, keys, receipt in zip(tiles, chosen, receipts, strict=True):
                if self._files:
                    self._files.expect(receipt)
                products = self._products(tile, keys, seen)
                if products is not None and receipt is not None and is_own(manifest, tile, receipt):
                    fault = products.fault_of(receipt.products)
                    self.faults += [f"tile {tile.id}: {fault}"] if fault else []

    def _crosses(self, key: tuple[int, int], only: Mask | None) -> bool:
        """Whether some rows, or columns, cross a chunk."""
        return only is None or any(only[span.start : span.stop].any() for span in self._spans(key))

    def _products(self, tile: Tile, keys: list[tuple[int, int]], seen: Iterator[_Seen]) -> StoredProducts | None:
        """Count a tile's chunks and add their products; None where one is at fault or left out."""
        all_of = StoredProducts(self._of_run, self._plan.span(tile.rows), self._plan.span(tile.cols))
        is_whole = len(keys) == len(self._plan.chunks(tile))
        for _ in keys:
            chunk = next(seen)
            self.chunks += chunk.chunks
            self.faults += chunk.faults
            for key, found in chunk.found.items():
                self._compare(key, found)
            if chunk.products is None:
                is_whole = False
                continue
            products, (rows, cols) = chunk.products, self._spans(chunk.key)
            all_of.include(products.own)
            self.products[self._active(cols), rows.start : rows.stop] += products.right
            if products.down is not None:
                self.products[self._active(rows), cols.start : cols.stop] += products.down
        return all_of if is_whole else None

    def _compare(self, key: tuple[int, int], found: Matrix | IncompleteError) -> None:
        """Compare a chunk with its file."""
        if self._files and not isinstance(found, IncompleteError):
            self.files += 1
            self.faults += self._files.faults(*key, found)

    def _see(self, key: tuple[int, int]) -> _Seen:
        """Read a chunk and its mirror image, check and multiply them; on any thread."""
        images = self._images(*key)
        rooms = [None, None] if self._files else [self._chunk.values, self._mirror.values]
        found = {image: self._store.chunk_or_fault(image, room) for image, room in zip(images, rooms, strict=False)}
        faults = [str(each) for each in found.values() if isinstance(each, IncompleteError)]
        chunk = found[images[0]]
        if not faults and not _is_mirrored(key, list(found.values())):
            name = chunk_key(*images[-1])
            of = f"the mirror image of {chunk_key(*key)}" if len(images) > 1 else "symmetric"
            faults.append(f"{name} is not {of}")
        products = None if isinstance(chunk, IncompleteError) else self._multiplied(key, chunk)
        return _Seen(key, len(images), faults, found if self._files else {}, products)

    def _multiplied(self, key: tuple[int, int], chunk: Matrix) -> _Products:
        """Multiply a chunk with both kinds of vectors, a band of rows at a time."""
        rows, cols = self._spans(key)
        of_cols, of_rows = self._vectors_of(cols), self._vectors_of(rows)
        if rows == cols:
            own, right = StoredProducts(self._of_run, rows, cols), np.empty((len(of_cols), len(rows)))
            for here, band in self._bands(chunk):
                right[:, here] = of_cols @ band.T
                own.add(band, rows[here], cols)
            return _Products(right[:-COUNT], None, own)
        right, down = np.empty((len(of_cols), len(rows))), np.zeros((len(of_rows), len(cols)))
        of_each_row, of_each_col = np.empty(len(rows)), np.zeros(len(cols))
        for here, band in self._bands(chunk):
            right[:, here] = of_cols @ band.T
            down += of_rows[:, here] @ band
            sizes = np.abs(band, out=band)
            of_each_row[here] = sizes @ np.ones(len(cols))
            of_each_col += np.ones(len(sizes)) @ sizes
        own = StoredProducts.of(rows, cols, right[-COUNT:].T, down[-COUNT:].T, (of_each_row, of_each_col))
        return _Products(right[:-COUNT], down[:-COUNT], own)

    def _bands(self, chunk: Matrix) -> Iterator[tuple[slice, Vector]]:
        """Yield the rows of a chunk, a few at a time, in float64, to be used before the next."""
        height, width = chunk.shape
        for start in range(0, height, len(self._band.values)):
            here = slice(start, min(start + len(self._band.values), height))
            band = self._band.values[: here.stop - start, :width]
            band[...] = chunk[here]
            yield here, band

    def _vectors_of(self, span: range) -> Vector:
        """Return what is multiplied with some rows or columns: vectors, then the run's.  # shape: (some, len(span))."""
        place = slice(span.start, span.stop)
        return np.concatenate([self._vectors[self._active(span), place], self._of_run[place].T])

    def _spans(self, key: tuple[int, int]) -> tuple[range, range]:
        """Return the rows and columns of a chunk."""
        i, j = key
        return self._plan.span(range(i, i + 1)), self._plan.span(range(j, j + 1))

    def _active(self, where: range) -> npt.NDArray[np.bool_]:
        """Return which vectors are not zero there."""
        return np.asarray(self._vectors[:, where.start : where.stop].any(1))


def _is_mirrored(key: tuple[int, int], images: list[Any]) -> bool:
    """Whether a chunk and its mirror image, or the halves of one on the diagonal, are the same."""
    if len(images) == 1 and key[0] != key[1]:
        return True
    chunk, mirror = images[0], images[-1]
    bands = (slice(start, start + COMPARED) for start in range(0, len(chunk), COMPARED))
    return all(np.array_equal(chunk[here], mirror[:, here].T) for here in bands)


class _Files:
    """The Parquet files that a run or an export left, and what its receipts say of them."""

    def __init__(self, hessian: StoredHessian) -> None:
        self._output, self._manifest = hessian.output, hessian.manifest
        self._stored = ParquetFiles(hessian.output, hessian.manifest)
        self._listed: dict[str, StoredObject] = {}

    def expect(self, receipt: Receipt | None) -> None:
        """Expect the files of a tile from now on, as its receipt lists them."""
        self._listed = {stored.key: stored for stored in receipt.chunks} if receipt else {}

    def foreign(self) -> list[str]:
        """Name files that are not of this Hessian: readers of the folder would take them for parts of it."""
        tiles = self._manifest.plan.tiles()
        ours = {file_key(*place) for tile in tiles for place in self._manifest.places(tile)}
        return [f"{PARQUET}/{key} is not of this Hessian" for key in sorted(self._output.sizes(PARQUET).keys() - ours)]

    def faults(self, i: int, j: int, chunk: Matrix) -> list[str]:
        """Compare the file of a chunk with the Zarr chunk."""
        key = file_key(i, j)
        if key not in self._listed:
            return [f"{PARQUET}/{key} is in no receipt"]
        try:
            found = self._stored.read_chunk(i, j, self._listed[key])
        except IncompleteError as error:
            return [str(error)]
        differing = int((found != chunk).sum())
        return [f"{PARQUET}/{key} differs from {chunk_key(i, j)} in {differing} entries"] if differing else []
