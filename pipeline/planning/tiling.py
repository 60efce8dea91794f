"""The plan: which chunks are stored, and which rectangles of chunks are computed together.

Chunks are numbered (i, j) from the top left. Only chunks with i <= j are computed; the rest is their mirror image.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import SpecError
from pipeline.planning.parameters import ParameterLayout
from pipeline.spec import BlockSelection

MOST_ENTRIES = 2**31 - 1  # of a chunk in Parquet: where its lists begin is counted in 32 bits
MOST_SIDE = 8192  # chunks on a side of the grid: which are selected takes a byte each, several times
MOST_TILES = 500_000  # each is an object, with a receipt
MAX_CHUNK = 2048  # 16 MiB in float32: large enough for one request, small enough to lose
MIN_CHUNK = 256  # smaller objects take more seconds to put and read than their bytes do
SMALL_CHUNK = 512  # of a large matrix, for many workers: 1 MiB in float32, of which a store takes as many as it must
CHUNKS_PER_SIDE = 16  # of a small matrix: some sixteen row bands to share among workers


@dataclass(frozen=True)
class Tile:
    """The rectangle of chunks that one task computes: chunk rows x chunk columns."""

    rows: range
    cols: range

    @property
    def id(self) -> str:
        """Name, unique in its plan and independent of other tiles."""
        return f"r{self.rows.start}-{self.rows.stop}_c{self.cols.start}-{self.cols.stop}"


@dataclass(frozen=True, eq=False)
class TilingPlan:
    """The chunk grid of a P x P matrix and the tiles that cover its selected upper triangle.

    Attributes:
        size: P.
        chunk: B, side of a chunk.
        tile_shape: most chunk rows and chunk columns of a tile.
        selected: chunks to compute.  # shape: (n, n), bool, upper triangular, n = ceil(P / B)
    """

    size: int
    chunk: int
    tile_shape: tuple[int, int]
    selected: npt.NDArray[np.bool_]

    @property
    def side(self) -> int:
        """Chunks on a side of the grid."""
        return math.ceil(self.size / self.chunk)

    def span(self, chunks: range) -> range:
        """Return the flat indices that consecutive chunks cover; the last chunk may be ragged."""
        return range(chunks.start * self.chunk, min(chunks.stop * self.chunk, self.size))

    def shape(self, tile: Tile) -> tuple[int, int]:
        """Return the rows and columns of a tile in entries."""
        return len(self.span(tile.rows)), len(self.span(tile.cols))

    def chunks(self, tile: Tile) -> list[tuple[int, int]]:
        """List the chunks that a tile leaves in the store, mirrors not counted."""
        return [(i, j) for i in tile.rows for j in tile.cols if self.selected[i, j]]

    def stored_columns(self, tile: Tile, row: int) -> list[range]:
        """Return the flat indices of the columns that a tile leaves in one chunk row, chunks that touch joined."""
        runs = _runs(self.selected[row, tile.cols.start : tile.cols.stop])
        return [self.span(range(tile.cols.start + run.start, tile.cols.start + run.stop)) for run in runs]

    def tiles(self) -> list[Tile]:
        """Cover every selected chunk once, top to bottom."""
        width = self.tile_shape[1]
        return [
            Tile(band, range(start, min(start + width, run.stop)))
            for band, run in self._covered()
            for start in range(run.start, run.stop, width)
        ]

    def require_few_tiles(self) -> None:
        """Refuse what cannot be listed, without listing it.

        Raises:
            SpecError: there are too many tiles.
        """
        count = sum(-(-len(run) // self.tile_shape[1]) for _, run in self._covered())
        if count > MOST_TILES:
            raise SpecError(
                f"`tile` got {self.tile_shape}, which makes {count:,} tiles, expected at most {MOST_TILES:,}: take "
                "larger tiles or larger chunks"
            )

    def _covered(self) -> Iterator[tuple[range, range]]:
        """Yield the bands of chunk rows, each with the maximal runs of chunk columns selected in it."""
        height = self.tile_shape[0]
        for band in (range(i, min(i + height, self.side)) for i in range(0, self.side, height)):
            for run in _runs(np.asarray(self.selected[band.start : band.stop].any(axis=0))):
                yield band, run

    def covers(self, rows: range, cols: range) -> bool:
        """Whether every entry of a rectangle (flat indices) is computed, itself or as a mirror image."""
        if not rows or not cols:
            return True
        i, j = (slice(s.start // self.chunk, (s.stop - 1) // self.chunk + 1) for s in (rows, cols))
        return bool((self.selected | self.selected.T)[i, j].all())

    def entries(self) -> int:
        """Count the entries of all selected chunks, mirrors not counted."""
        sides = np.minimum(self.chunk, self.size - self.chunk * np.arange(self.side))
        return int(sides @ self.selected @ sides)


def plan_tiles(layout: ParameterLayout, blocks: BlockSelection, chunk: int, tile_shape: tuple[int, int]) -> TilingPlan:
    """Make the plan of a Hessian.

    Args:
        layout: the parameters.
        blocks: which blocks are wanted. A chunk that meets a wanted block is computed whole.
        chunk: B.
        tile_shape: most chunk rows and chunk columns of a tile.

    Returns:
        The plan.

    Raises:
        BlockError: a block names an unknown parameter.
        SpecError: there would be too many chunks.
    """
    side = math.ceil(layout.size / chunk)
    if side > MOST_SIDE:
        raise SpecError(
            f"`chunk` got {chunk}, which makes {side:,} chunks on a side of {layout.size:,} rows, expected at most "
            f"{MOST_SIDE:,}: take larger chunks, or fewer parameters"
        )
    selected = np.zeros((side, side), dtype=bool)
    for rows, cols in _wanted(layout, blocks):
        if rows and cols:
            i, j = (slice(s.start // chunk, (s.stop - 1) // chunk + 1) for s in (rows, cols))
            selected[i, j] = True
    return TilingPlan(layout.size, chunk, tile_shape, np.triu(selected | selected.T))


def default_chunk(size: int, unit: int = 1, bands: int = 1) -> int:
    """Choose B: near `MAX_CHUNK`, or for a small P the power of two that gives some `CHUNKS_PER_SIDE` row bands.

    Args:
        size: P.
        unit: rows that the factored engine computes together; B is a multiple of it, unless it is longer.
        bands: wanted for a large P, as far as `SMALL_CHUNK` gives them.

    Returns:
        B.
    """
    wanted = max(size / CHUNKS_PER_SIDE, 1)
    chunk = min(MAX_CHUNK, max(MIN_CHUNK, 1 << math.ceil(math.log2(wanted))))
    while chunk > SMALL_CHUNK and size < bands * chunk:
        chunk //= 2
    return round(chunk / unit) * unit if unit <= chunk else chunk


def _wanted(layout: ParameterLayout, blocks: BlockSelection) -> Iterator[tuple[range, range]]:
    """Yield the wanted rectangles in flat indices."""
    if blocks == "all":
        yield range(layout.size), range(layout.size)
        return
    pairs: Iterable[Sequence[str]] = [(n, n) for n in layout.names] if isinstance(blocks, str) else blocks
    for a, b in pairs:
        yield layout[a].span, layout[b].span


def _runs(flags: npt.NDArray[np.bool_]) -> Iterator[range]:
    """Yield the maximal runs of true entries."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield range(int(start), int(stop))


def require_room_in_lists(chunk: int, size: int) -> None:
    """Refuse chunks with more entries than a file's lists can count.

    Args:
        chunk: B.
        size: P.

    Raises:
        SpecError: they have more.
    """
    if min(chunk, size) ** 2 > MOST_ENTRIES:
        raise SpecError(f"`chunk` got {chunk}, expected at most {math.isqrt(MOST_ENTRIES)} where Parquet is written")
