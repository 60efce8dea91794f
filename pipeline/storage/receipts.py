"""Receipts: the small records that finished tiles leave, and what they say is still missing."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter

from pipeline.errors import IncompleteError
from pipeline.planning.manifest import Manifest
from pipeline.planning.tiling import Tile
from pipeline.storage.chunk_formats import FORMATS
from pipeline.storage.output import PARQUET, RECEIPTS, Output
from pipeline.storage.read_ahead import ahead
from pipeline.storage.records import read_or_none
from pipeline.storage.tile_products import COUNT
from pipeline.storage.zarr_store import StoredObject, stored_sizes

FIXED_BYTES = 16 * 2**10  # of a receipt at most: all but what is listed for each object and each row
OBJECT_BYTES = 200  # likewise, for each object
LAST_MOMENT = 253_402_300_799.0  # seconds since the epoch, of the year 9999
RECEIPT_READERS = 32  # at a time: a run of 1e5 tiles has as many of these small objects

_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True)
class Receipt:
    """What a finished tile leaves behind.

    Attributes:
        tile: its id.
        run: digest of the manifest.
        chunks: the objects put, mirrors included: Zarr chunks, and Parquet files, of a run or of a later export.
        max_abs: largest entry.
        norm: Frobenius norm of the computed upper part.
        asymmetry: max|D - D'| / max|D| over diagonal chunks' squares of one parameter, as the engine left them; always
            zero where that is `factored`, which writes mirror images itself.
        compute_seconds: of the engine.
        write_seconds: of encoding and putting.
        peak_memory_bytes: most resident memory of the worker's process so far.
        attempt: 1 for the first.
        host: where.
        pid: the process.
        device: of the engine.
        finished: seconds since the epoch.
        halvings: of engines' sizes in this worker so far, where memory ran out; they change last bits.
        products: of the tile with vectors of the run, as text; empty in receipts from before there were any.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    tile: str
    run: str
    chunks: tuple[StoredObject, ...]
    max_abs: _Amount
    norm: _Amount
    asymmetry: _Amount
    compute_seconds: _Amount
    write_seconds: _Amount
    peak_memory_bytes: _Count
    attempt: _Count
    host: str
    pid: _Count
    device: str
    finished: Annotated[float, Field(ge=0, le=LAST_MOMENT)]
    halvings: _Count = 0
    products: str = ""

    def to_bytes(self) -> bytes:
        """Write as JSON."""
        return json.dumps(asdict(self)).encode()

    @property
    def bytes(self) -> int:
        """Bytes of all objects."""
        return sum(chunk.bytes for chunk in self.chunks)


_RECEIPT = TypeAdapter(Receipt)


def receipt_name(tile: str) -> str:
    """Return the name of a tile's receipt in the output."""
    return f"{RECEIPTS}/{tile}.json"


def missing_tiles(output: Output, manifest: Manifest) -> list[Tile]:
    """Find the tiles that are not done: without a readable receipt of this run, or without the objects it lists.

    Args:
        output: of the run.
        manifest: of the run.

    Returns:
        The tiles to compute, largest first.
    """
    present, begun = object_sizes(output), begun_tiles(output, manifest)
    receipts = zip(begun, ahead(partial(own_receipt, output, manifest), begun, RECEIPT_READERS), strict=True)
    done = {tile.id for tile, receipt in receipts if receipt and _is_whole(manifest, tile, receipt, present)}
    return largest_first(manifest, [tile for tile in manifest.plan.tiles() if tile.id not in done])


def begun_tiles(output: Output, manifest: Manifest) -> list[Tile]:
    """List the tiles that have a receipt, whatever it says."""
    names = output.sizes(RECEIPTS)
    return [tile for tile in manifest.plan.tiles() if f"{tile.id}.json" in names]


def largest_first(manifest: Manifest, tiles: Sequence[Tile]) -> list[Tile]:
    """Sort tiles by their entries."""
    return sorted(tiles, key=lambda tile: -math.prod(manifest.plan.shape(tile)))


def read_receipt(output: Output, manifest: Manifest, tile: Tile) -> Receipt | None:
    """Read a tile's receipt; None where there is none or it is damaged."""
    return read_or_none(output, receipt_name(tile.id), _RECEIPT, _most_bytes(manifest, tile))


def _most_bytes(manifest: Manifest, tile: Tile) -> int:
    """Return the bytes that a tile's receipt can have, by what it lists."""
    objects = 4 * len(manifest.plan.chunks(tile))  # mirrored, and in two formats
    products = 8 * COUNT * sum(manifest.plan.shape(tile))
    return FIXED_BYTES + OBJECT_BYTES * objects + 4 * products // 3


def own_receipt(output: Output, manifest: Manifest, tile: Tile) -> Receipt | None:
    """Read a tile's receipt; None where there is none, it is damaged, or it is of another tile or run."""
    receipt = read_receipt(output, manifest, tile)
    return receipt if receipt and is_own(manifest, tile, receipt) else None


def is_own(manifest: Manifest, tile: Tile, receipt: Receipt) -> bool:
    """Whether a receipt is of this tile of this run."""
    return (receipt.tile, receipt.run) == (tile.id, manifest.digest)


def object_sizes(output: Output) -> dict[str, int]:
    """List the chunks that are there in any format, by key, with their sizes in bytes."""
    chunks = {key: size for key, size in stored_sizes(output).items() if key.startswith("c/")}
    return chunks | output.sizes(PARQUET)


def record_files(output: Output, manifest: Manifest, tile: Tile, files: Sequence[StoredObject]) -> None:
    """Put the Parquet files that an export wrote into their tile's receipt.

    Args:
        output: of the run.
        manifest: of the run.
        tile: of its plan.
        files: all of that tile.

    Raises:
        IncompleteError: there is no such receipt.
    """
    receipt = read_receipt(output, manifest, tile)
    if receipt is None:
        raise IncompleteError(f"output {output.url}: tile {tile.id} has no receipt; run the same job again")
    if not set(files) <= set(receipt.chunks):
        keys = {file.key for file in files}
        others = tuple(chunk for chunk in receipt.chunks if chunk.key not in keys)
        output.put(receipt_name(tile.id), replace(receipt, chunks=(*others, *files)).to_bytes())


def _is_whole(manifest: Manifest, tile: Tile, receipt: Receipt, present: Mapping[str, int]) -> bool:
    """Whether a tile's receipt lists what the run is to leave of it, and that is there in full size."""
    listed = {chunk.key: chunk.bytes for chunk in receipt.chunks}
    needed = {FORMATS[name].key(*place) for name in manifest.formats for place in manifest.places(tile)}
    return all(key in listed and present.get(key) == listed[key] for key in needed)
