"""How a matrix is cut: the side of chunks, and the shape of tiles, from engines, memory and the number of workers."""

import math
from dataclasses import replace

from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.memory import BUFFERED_TILES, FLOAT_BYTES, PROCESS_BYTES, leaving_bytes, writer_bytes
from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.tiling import TilingPlan, default_chunk, plan_tiles, require_room_in_lists
from pipeline.spec import Settings

TILES_SHARE = 0.5  # of the memory allowed, for tile buffers
TILES_PER_WORKER = 4  # at least: the last ones are shared out well, and one that is lost costs little
MANY_WORKERS = 8  # from which on a few tiles each leave too many idle at the end:
TILES_OF_MANY = 24  # each then, as long as tiles have enough units
UNITS_A_SIDE = 14  # of a factored tile, even if there are fewer tiles: with 6, of 784 inputs, products ran at a third
# Of a tile, where one worker has all of them. On a GPU, 784-128-10 in float32 with 10,000 samples, counted from shapes:
# 6 x 6 chunks take 56 T operations and move 1.2 TB, 11 x 11, four times the bytes, 0.5 TB (roofline.py).
LONE_TILE_BYTES = {"cpu": 2**28, "cuda": 2**32}


def choose_tiling(
    layout: ParameterLayout,
    engines: dict[str, str],
    settings: Settings,
    itemsize: int,
    allowed: int,
    workers: int,
    allowed_device_bytes: int | None = None,
) -> TilingPlan:
    """Choose chunks and tiles.

    Args:
        layout: the parameters.
        engines: by parameter.
        settings: how to compute.
        itemsize: bytes of an entry as it is computed.
        allowed: bytes of a worker.
        workers: how many.
        allowed_device_bytes: of its GPU, beside weights and data; None where it has none.

    Returns:
        The tiling.

    Raises:
        SpecError: a chunk is too large for a list of Parquet, or there are too many chunks or tiles.
    """
    unit, by_units = _unit(layout, engines), _goes_by_units(layout, engines)
    # Tiles of other engines are bands of one chunk row: there are no more of them than that.
    chunk = settings.chunk or default_chunk(layout.size, unit, 1 if by_units else TILES_PER_WORKER * workers)
    if "parquet" in settings.formats:
        require_room_in_lists(chunk, layout.size)
    chunk_bytes = chunk**2 * itemsize
    tiling = plan_tiles(layout, settings.blocks, chunk, (1, 1))
    free = allowed - PROCESS_BYTES - writer_bytes(settings.concurrent_puts * chunk_bytes, settings.formats)
    buffered = chunk_bytes
    if allowed_device_bytes is not None:
        stored = FLOAT_BYTES[settings.store_dtype] if settings.store_dtype else itemsize
        buffered = leaving_bytes(chunk**2, stored, settings.symmetry)
    room = max(1, int(TILES_SHARE * free / (BUFFERED_TILES * buffered)))
    if allowed_device_bytes is not None:
        room = min(room, max(1, int(TILES_SHARE * allowed_device_bytes / (chunk_bytes + buffered))))
    lone_bytes = LONE_TILE_BYTES["cpu" if allowed_device_bytes is None else "cuda"]
    shape = settings.tile or _tile_shape(tiling, unit if by_units else None, chunk_bytes, room, workers, lone_bytes)
    tiling = replace(tiling, tile_shape=shape)
    tiling.require_few_tiles()
    return tiling


def _goes_by_units(layout: ParameterLayout, engines: dict[str, str]) -> bool:
    """Whether most rows are of engines that go by units."""
    return sum(p.size for p in layout if TRAITS[engines[p.name]].by_units) >= layout.size / 2


def _unit(layout: ParameterLayout, engines: dict[str, str]) -> int:
    """Return the rows of one output of the largest layer that goes by units; 1 where there is none."""
    weights = [p for p in layout if TRAITS[engines[p.name]].by_units and len(p.shape) > 1 and p.size]
    largest = max(weights, key=lambda p: p.size, default=None)
    return largest.size // largest.shape[0] if largest else 1


def _tile_shape(
    tiling: TilingPlan, unit: int | None, chunk_bytes: int, room: int, workers: int, lone_bytes: int
) -> tuple[int, int]:
    """Return the chunk rows and columns of a tile.

    Args:
        tiling: with its chunks.
        unit: rows of one, for engines that go by it; None for the others.
        chunk_bytes: of each.
        room: for how many chunks there is memory.
        workers: how many.
        lone_bytes: of a tile, where one worker has all of them.

    Returns:
        The shape.
    """
    chunks = int(tiling.selected.sum())
    whole = chunks == tiling.side * (tiling.side + 1) // 2
    if unit is None or not whole:
        # Other engines pull a row back through the whole network whatever its columns: as wide as memory allows. Where
        # only some blocks are wanted, a higher tile would hold others.
        return 1, min(tiling.side, room)
    # Here what is pulled back, and the operands of products, are made anew for each tile: large squares.
    tiles = TILES_PER_WORKER * workers if workers > 1 else math.ceil(chunks * chunk_bytes / lone_bytes)
    wanted = tiling.side if tiles == 1 else int(tiling.side / math.sqrt(2 * tiles))  # half of the squares are empty
    enough = math.ceil(UNITS_A_SIDE * unit / tiling.chunk)
    if workers >= MANY_WORKERS:
        finer = int(tiling.side / math.sqrt(2 * TILES_OF_MANY * workers))
        wanted = max(finer, min(enough, wanted))
    wanted = max(wanted, min(enough, int(tiling.side / math.sqrt(2 * workers))))
    most = max(1, min(wanted, math.isqrt(room)))
    side = math.ceil(tiling.side / math.ceil(tiling.side / most))  # as many tiles, of one size: the least memory
    return side, side
