"""One pass over a finished store: every chunk read back and checked, and multiplied with vectors on the way.

Parquet files beside the array are read back too, and compared with its chunks.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.errors import IncompleteError
from pipeline.planning.tiling import Tile
from pipeline.results.hessian import StoredHessian
from pipeline.storage.chunk_codec import Matrix
from pipeline.storage.output import PARQUET
from pipeline.storage.parquet_store import ParquetFiles, file_key
from pipeline.storage.read_ahead import ahead
from pipeline.storage.receipts import Receipt, is_own, read_receipt
from pipeline.storage.tile_products import StoredProducts, check_vectors
from pipeline.storage.zarr_store import StoredObject, chunk_key

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
        faults: what is wrong, one line a chunk or a tile.
        products: H V'.  # shape: (k, P)
    """

    def __init__(self, hessian: StoredHessian, vectors: Vector, *, parquet: bool = False) -> None:
        self._files = _Files(hessian) if parquet else None
        self.faults: list[str] = self._files.foreign() if self._files else []
        self.chunks = self.files = 0
        self.products = np.zeros_like(vectors)
        self._hessian, self._store = hessian, hessian.store
        manifest, tiles = hessian.manifest, hessian.manifest.plan.tiles()
        receipts = ahead(partial(read_receipt, hessian.output, manifest), tiles)
        found = self._chunks([key for tile in tiles for key in manifest.plan.chunks(tile)])
        of_run = check_vectors(manifest.digest, hessian.shape[0])
        for tile, receipt in zip(tiles, receipts, strict=True):
            if self._files:
                self._files.expect(receipt)
            products = self._products(tile, found, vectors, of_run)
            if products is not None and receipt is not None and is_own(manifest, tile, receipt):
                fault = products.fault_of(receipt.products)
                self.faults += [f"tile {tile.id}: {fault}"] if fault else []

    def _products(
        self, tile: Tile, found: Iterator[Vector | None], vectors: Vector, of_run: Vector
    ) -> StoredProducts | None:
        """Multiply a tile with both kinds of vectors; None where a chunk is at fault."""
        plan, is_whole = self._hessian.manifest.plan, True
        products = StoredProducts(of_run, plan.span(tile.rows), plan.span(tile.cols))
        for i, j in plan.chunks(tile):
            chunk, rows, cols = next(found), plan.span(range(i, i + 1)), plan.span(range(j, j + 1))
            if chunk is None:
                is_whole = False
                continue
            self._multiply(chunk, rows, cols, vectors)
            products.add(chunk, rows, cols)
        return products if is_whole else None

    def _chunks(self, selected: list[tuple[int, int]]) -> Iterator[npt.NDArray[np.float64] | None]:
        """Read chunks and their mirror images, and compare them; None for those that are at fault."""
        images = self._hessian.manifest.images
        keys = [key for i, j in selected for key in images(i, j)]
        found = zip(keys, self._store.read_chunks(keys), strict=True)
        for i, j in selected:
            chunk = self._noted(*next(found))
            if i == j and chunk is not None and not np.array_equal(chunk, chunk.T):
                self.faults.append(f"{chunk_key(i, j)} is not symmetric")
            if len(images(i, j)) > 1:
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
        self._add(vectors, cols, rows, chunk.T)
        if rows != cols:
            self._add(vectors, rows, cols, chunk)

    def _add(self, vectors: Vector, where: range, to: range, factor: npt.NDArray[np.float64]) -> None:
        """Multiply the vectors that are not zero there."""
        part = vectors[:, where.start : where.stop]
        active = part.any(1)
        self.products[active, to.start : to.stop] += part[active] @ factor


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
