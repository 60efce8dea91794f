"""Receipts: the small records that finished tiles leave, and what they say is still missing."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.manifest import Manifest
from pipeline.output import RECEIPTS, Output
from pipeline.store import StoredObject, stored_sizes, tile_keys
from pipeline.tiling import Tile


@dataclass(frozen=True)
class Receipt:
    """What a finished tile leaves behind.

    Attributes:
        tile: its id.
        chunks: the objects put, mirrors included.
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
    """

    tile: str
    chunks: tuple[StoredObject, ...]
    max_abs: float
    norm: float
    asymmetry: float
    compute_seconds: float
    write_seconds: float
    peak_memory_bytes: int
    attempt: int
    host: str
    pid: int
    device: str
    finished: float
    halvings: int = 0

    def to_bytes(self) -> bytes:
        """Write as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Receipt":
        """Read what `to_bytes` wrote.

        Returns:
            The receipt.

        Raises:
            KeyError: it is not a receipt.
            TypeError: it is not a receipt.
        """
        chunks = tuple(StoredObject(**chunk) for chunk in values["chunks"])
        return cls(**{**values, "chunks": chunks})

    @property
    def bytes(self) -> int:
        """Bytes of all objects."""
        return sum(chunk.bytes for chunk in self.chunks)


def receipt_name(tile: str) -> str:
    """Give the name of a tile's receipt in the output."""
    return f"{RECEIPTS}/{tile}.json"


def missing_tiles(output: Output, manifest: Manifest) -> list[Tile]:
    """Find the tiles that are not done: without a readable receipt, or without the objects it lists.

    Args:
        output: of the run.
        manifest: of the run.

    Returns:
        The tiles to compute, largest first.
    """
    tiling = manifest.plan
    present, receipts = stored_sizes(output), output.sizes(RECEIPTS)
    tiles = tiling.tiles()
    missing = [t for t in tiles if f"{t.id}.json" not in receipts or not _is_whole(output, manifest, t, present)]
    return sorted(missing, key=lambda t: -tiling.shape(t)[0] * tiling.shape(t)[1])


def read_receipt(output: Output, tile: Tile) -> Receipt | None:
    """Read a tile's receipt; None where there is none or it is damaged."""
    data = output.get(receipt_name(tile.id))
    try:
        return None if data is None else Receipt.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError):
        return None


def _is_whole(output: Output, manifest: Manifest, tile: Tile, present: Mapping[str, int]) -> bool:
    """Say whether a tile's receipt lists its chunks and these are there in full size."""
    receipt = read_receipt(output, tile)
    if receipt is None or receipt.tile != tile.id:
        return False
    listed = {chunk.key: chunk.bytes for chunk in receipt.chunks}
    return listed.keys() == tile_keys(manifest, tile) and all(present.get(key) == size for key, size in listed.items())
