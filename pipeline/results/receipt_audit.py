"""The audit: every object that receipts list, read back and held against them, in an output finished or not."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from pipeline.errors import IncompleteError
from pipeline.planning.manifest import Manifest
from pipeline.planning.tiling import Tile
from pipeline.spec import FormatName
from pipeline.storage.chunk_codec import Matrix
from pipeline.storage.chunk_formats import formats_of
from pipeline.storage.output import Output
from pipeline.storage.read_ahead import ahead
from pipeline.storage.receipts import Receipt, begun_tiles, own_receipt, receipt_name
from pipeline.storage.run_files import is_finished, open_run
from pipeline.storage.tile_products import StoredProducts, check_vectors
from pipeline.storage.zarr_store import StoredObject

SHOWN = 20  # faults, of possibly as many as there are objects
REMEDY = "run the job with --check, which computes again what is not as its receipt says"


@dataclass(frozen=True)
class Audited:
    """What reading back found of a tile.

    Attributes:
        tile: the tile.
        objects: looked at, mirrors included.
        faults: one line for each object that is not what its receipt says, or for the receipt itself.
    """

    tile: Tile
    objects: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Object:
    """An object that a tile is to leave, and what its receipt says of it; None where that does not list it."""

    tile: Tile
    format: FormatName
    place: tuple[int, int]
    key: str
    expected: StoredObject | None
    products: str


@dataclass(frozen=True)
class _Read:
    """What came of reading an object, or the receipt of a tile."""

    tile: Tile
    fault: str | None
    found: _Object | None = None
    values: Matrix | None = None


class _Auditor:
    """Reads the objects of one output."""

    def __init__(self, output: Output, manifest: Manifest) -> None:
        self._output, self._manifest = output, manifest
        self._formats = formats_of(output, manifest)
        self._vectors = check_vectors(manifest.digest, manifest.layout.size)

    def objects(self, tiles: Sequence[Tile]) -> Iterator[_Object | _Read]:
        """Yield all objects of tiles, one tile after the other; of one without a receipt, that."""
        for tile, receipt in zip(tiles, ahead(self._receipt, tiles), strict=True):
            if receipt is None:
                yield _Read(tile, f"{receipt_name(tile.id)} is missing, damaged or of another run")
            else:
                yield from self._listed(tile, receipt)

    def read(self, found: _Object | _Read) -> _Read:
        """Read one object."""
        if isinstance(found, _Read):
            return found
        try:
            return _Read(found.tile, None, found, self._values(found))
        except IncompleteError as fault:
            return _Read(found.tile, str(fault), found)

    def examine(self, tile: Tile, parts: Iterable[_Read]) -> Audited:
        """Hold all objects of a tile against their checksums, and against the products that were taken of it."""
        plan, objects, faults = self._manifest.plan, 0, []
        products: dict[tuple[FormatName, bool], StoredProducts] = {}
        text = ""
        for part in parts:
            if part.fault is not None:
                faults.append(part.fault)
            if part.found is None:
                continue
            objects, text = objects + 1, part.found.products
            i, j = part.found.place
            if part.values is not None:
                spans = [plan.span(range(k, k + 1)) for k in sorted((i, j))]
                values = (part.values if i <= j else part.values.T).astype(np.float64)
                for mirror in {i > j} if i != j else {False, True}:
                    kind = part.found.format, mirror
                    if kind not in products:
                        products[kind] = StoredProducts(self._vectors, plan.span(tile.rows), plan.span(tile.cols))
                    products[kind].add(values, *spans)
        if not faults:
            kinds = products if self._manifest.symmetry == "mirrored" else [k for k in products if not k[1]]
            faults = [fault for kind in kinds if (fault := products[kind].fault_of(text))]
        return Audited(tile, objects, tuple(faults))

    def _receipt(self, tile: Tile) -> Receipt | None:
        return own_receipt(self._output, self._manifest, tile)

    def _listed(self, tile: Tile, receipt: Receipt) -> Iterator[_Object]:
        listed = {stored.key: stored for stored in receipt.chunks}
        for place in self._manifest.places(tile):
            for name, stored in self._formats.items():
                key = stored.key(*place)
                yield _Object(tile, name, place, key, listed.get(key), receipt.products)

    def _values(self, found: _Object) -> Matrix:
        if found.expected is None:
            raise IncompleteError(f"{found.key} is not listed in {receipt_name(found.tile.id)}")
        return self._formats[found.format].read_chunk(*found.place, found.expected)


def audit(output: Output, manifest: Manifest, tiles: Sequence[Tile]) -> Iterator[Audited]:
    """Read back all objects that finished tiles are to have left, several at a time.

    Each must be there in the size and with the CRC-32C that its receipt says, must decode, and all of a tile must have
    the products that were taken where it was computed. Parquet files that an export added are not looked at: they are
    not of the run.

    Args:
        output: of the run.
        manifest: of the run.
        tiles: those with receipts.

    Yields:
        What was found of each tile, in their order.
    """
    auditor = _Auditor(output, manifest)
    for tile, parts in groupby(ahead(auditor.read, auditor.objects(tiles)), key=lambda part: part.tile):
        yield auditor.examine(tile, parts)


def listed_faults(found: Iterable[Audited]) -> list[str]:
    """Return all faults, one a line; of very many the first ones, and how many there are more."""
    faults = [f"tile {audited.tile.id}: {fault}" for audited in found for fault in audited.faults]
    return faults[:SHOWN] + ([f"and {len(faults) - SHOWN:,} more"] if len(faults) > SHOWN else [])


def audit_output(url: str, endpoint_url: str | None = None) -> list[Audited]:
    """Read back what is there of a run, finished or not.

    Args:
        url: the output.
        endpoint_url: of its server, where it is not the cloud's own.

    Returns:
        What was found of each tile that has a receipt; of a finished run, of each tile.

    Raises:
        OutputError: there is no run.
    """
    output, manifest = open_run(url, endpoint_url)
    finished = is_finished(output)
    return list(audit(output, manifest, manifest.plan.tiles() if finished else begun_tiles(output, manifest)))
