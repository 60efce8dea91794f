"""The way of a tile to the store: chunks as they are stored, made on the host, or on a GPU and copied from there.

From a GPU chunks and their mirror images are copied while the next tile is computed: they are made on the device, in
the stored type, one after the other, in a buffer that a stream of its own copies into memory that is pinned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.planning.memory import BUFFERED_TILES
from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.tiling import Tile, TilingPlan
from pipeline.storage.tile_products import TileProducts, as_text

Matrix = npt.NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """A chunk as it is going to be stored.

    Attributes:
        entries: symmetric on the diagonal.  # shape: (B, B), less at the ragged end
        mirror: their transpose, where that lies ready.
        largest: absolute entry.
        squares: the sum of them, with the mirror image's.
        asymmetry: of a chunk on the diagonal, as its engine computed it, relative to the largest of a block.
    """

    entries: Matrix
    mirror: Matrix | None
    largest: float
    squares: float
    asymmetry: float


class Leaving(Protocol):
    """A tile on its way to the store."""

    def wait(self) -> None:
        """Wait until it is on the host; on the writer's thread, before all else."""

    def products(self) -> str:
        """Return its products with the run's vectors, as text."""

    def chunk(self, i: int, j: int) -> Chunk:
        """Return a chunk; on any thread."""


@dataclass(frozen=True)
class OnHost:
    """A tile that was computed on the host.

    Attributes:
        plan: the run's.
        layout: likewise.
        tile: of the plan.
        values: of the tile.  # shape: (rows, cols)
        taken: its products.
        store_dtype: of what is stored.
    """

    plan: TilingPlan
    layout: ParameterLayout
    tile: Tile
    values: Matrix
    taken: TileProducts
    store_dtype: str

    def wait(self) -> None:
        """See `Leaving`."""

    def products(self) -> str:
        """See `Leaving`."""
        return self.taken.to_text()

    def chunk(self, i: int, j: int) -> Chunk:
        """See `Leaving`."""
        rows, cols = self.plan.span(self.tile.rows), self.plan.span(self.tile.cols)
        span_i, span_j = self.plan.span(range(i, i + 1)), self.plan.span(range(j, j + 1))
        chunk = part_of(self.values, rows, cols, span_i, span_j).astype(self.store_dtype)
        asymmetry = 0.0
        if i == j:
            asymmetry = self._asymmetry(chunk, span_i)
            chunk = np.triu(chunk) + np.triu(chunk, 1).T
        squares = float(np.vdot(chunk, chunk)) * (1 if i == j else 2)
        return Chunk(chunk, None, float(np.abs(chunk).max()), squares, asymmetry)

    def _asymmetry(self, chunk: Matrix, span: range) -> float:
        """Compare entries of a diagonal chunk on both sides of the diagonal, as the engine computed them."""
        worst = 0.0
        for _, segment in self.layout.segments(span):
            square = part_of(chunk, span, span, segment, segment)
            scale = float(np.abs(square).max())
            if scale > 0:
                worst = max(worst, float(np.abs(square - square.T).max()) / scale)
        return worst


@dataclass(frozen=True)
class FromDevice:
    """A tile that is being copied to the host.

    Attributes:
        places: of chunks in the values: the first entry, and shape.
        values: chunks, each with its mirror image behind it where the matrix is stored whole.
        numbers: of each chunk its largest entry, squares and asymmetry; then the products.
        copied: when both are there.
        is_mirrored: whether mirror images are among the values.
    """

    places: dict[tuple[int, int], tuple[int, tuple[int, int]]]
    values: Tensor
    numbers: Tensor
    copied: Any
    is_mirrored: bool

    def wait(self) -> None:
        """See `Leaving`."""
        self.copied.synchronize()

    def products(self) -> str:
        """See `Leaving`."""
        return as_text(self.numbers[_STATISTICS * len(self.places) :].numpy())

    def chunk(self, i: int, j: int) -> Chunk:
        """See `Leaving`."""
        start, (height, width) = self.places[i, j]
        size, k = height * width, list(self.places).index((i, j))
        values = self.values[start : start + 2 * size].numpy()
        mirror = values[size : 2 * size].reshape(width, height) if self.is_mirrored and i != j else None
        largest, squares, asymmetry = self.numbers[_STATISTICS * k : _STATISTICS * (k + 1)].tolist()
        return Chunk(values[:size].reshape(height, width), mirror, largest, squares, asymmetry)


_STATISTICS = 3  # of a chunk


class WayOut:
    """The way from a GPU.

    Args:
        plan: the run's.
        layout: likewise.
        dtype: of what is stored.
        device: where tiles are computed.
        is_mirrored: whether the matrix is stored whole.
    """

    def __init__(
        self, plan: TilingPlan, layout: ParameterLayout, dtype: torch.dtype, device: torch.device, *, is_mirrored: bool
    ) -> None:
        self._plan, self._layout, self._is_mirrored = plan, layout, is_mirrored
        self._stream: Any = torch.cuda.Stream(device)
        self._copied: Any = None
        self._sent: Tensor
        self._packed = torch.empty(0, dtype=dtype, device=device)
        self._host = [torch.empty(0, dtype=dtype) for _ in range(BUFFERED_TILES)]
        self._numbers = [torch.empty(0, dtype=torch.float64) for _ in range(BUFFERED_TILES)]

    def send(self, tile: Tile, out: Tensor, products: TileProducts) -> FromDevice:
        """Make a tile's chunks, and begin to copy them.

        Args:
            tile: of the plan.
            out: its values, which may be written over afterwards.  # shape: (rows, cols)
            products: of it.

        Returns:
            What is being copied, valid until the next but one is sent.
        """
        compute = torch.cuda.current_stream(out.device)
        if self._copied is not None:
            compute.wait_event(self._copied)  # what is packed is written over, or given back
        places, size = self._places(tile)
        self._packed = at_least(self._packed, size)
        statistics = [number for key, place in places.items() for number in self._pack(tile, out, key, *place)]
        taken = torch.cat([products.right.flatten(), products.down.flatten()])
        numbers = torch.cat([torch.stack(statistics), taken])
        self._host[0], self._numbers[0] = _pinned(self._host[0], size), _pinned(self._numbers[0], len(numbers))
        values, host_numbers = self._host[0][:size], self._numbers[0][: len(numbers)]
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            values.copy_(self._packed[:size], non_blocking=True)
            host_numbers.copy_(numbers, non_blocking=True)
        self._sent = numbers  # until the stream that computes, on which memory is given out anew, has waited
        self._copied = self._stream.record_event(torch.cuda.Event(blocking=True))
        return FromDevice(places, values, host_numbers, self._copied, self._is_mirrored)

    def turn(self) -> None:
        """Leave what was sent last to the writer, and copy into the other buffer from now on."""
        self._host.reverse()
        self._numbers.reverse()

    def _places(self, tile: Tile) -> tuple[dict[tuple[int, int], tuple[int, tuple[int, int]]], int]:
        """Lay chunks and their mirror images behind each other; give their places, and the entries of all."""
        places, start = {}, 0
        for i, j in self._plan.chunks(tile):
            shape = len(self._plan.span(range(i, i + 1))), len(self._plan.span(range(j, j + 1)))
            places[i, j] = start, shape
            start += shape[0] * shape[1] * (2 if self._is_mirrored and i != j else 1)
        return places, start

    def _pack(
        self, tile: Tile, out: Tensor, key: tuple[int, int], start: int, shape: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Make a chunk as it is going to be stored; gives what is to be known of it, each a number in float64."""
        i, j = key
        size = shape[0] * shape[1]
        rows, cols = self._plan.span(tile.rows), self._plan.span(tile.cols)
        span_i, span_j = self._plan.span(range(i, i + 1)), self._plan.span(range(j, j + 1))
        chunk = self._packed[start : start + size].view(shape)
        chunk.copy_(part_of(out, rows, cols, span_i, span_j))
        asymmetry = chunk.new_zeros((), dtype=torch.float64)
        if i == j:
            asymmetry = self._asymmetry(chunk, span_i)
            chunk.copy_(chunk.triu() + chunk.triu(1).T)
        elif self._is_mirrored:
            self._packed[start + size : start + 2 * size].view(shape[::-1]).copy_(chunk.T)
        yield chunk.abs().max().double()
        yield torch.linalg.vector_norm(chunk, dtype=torch.float64).square() * (1 if i == j else 2)
        yield asymmetry

    def _asymmetry(self, chunk: Tensor, span: range) -> Tensor:
        """Compare entries on both sides of the diagonal; see `OnHost`.  # shape: ()."""
        worst = chunk.new_zeros((), dtype=torch.float64)
        for _, segment in self._layout.segments(span):
            square = part_of(chunk, span, span, segment, segment)
            scale = square.abs().max().double()
            gap = (square - square.T).abs().max() / torch.where(scale > 0, scale, 1)
            worst = torch.maximum(worst, gap)
        return worst


def at_least(buffer: Tensor, size: int) -> Tensor:
    """Return a buffer of at least so many entries."""
    if len(buffer) >= size:
        return buffer
    if buffer.device.type != "cpu":
        return buffer.new_empty(size)
    # NumPy asks the system for large pages, torch does not: filling these is several times faster.
    return torch.from_numpy(np.empty(size, torch.empty(0, dtype=buffer.dtype).numpy().dtype))


def _pinned(buffer: Tensor, size: int) -> Tensor:
    """Return a buffer of at least so many entries, in memory that a device copies into while others compute."""
    return buffer if len(buffer) >= size else torch.empty(size, dtype=buffer.dtype, pin_memory=True)


def part_of(out: Any, rows: range, cols: range, some_rows: range, some_cols: range) -> Any:
    """Return the part of a tile's values at some of its rows and columns (flat indices)."""
    return out[
        some_rows.start - rows.start : some_rows.stop - rows.start,
        some_cols.start - cols.start : some_cols.stop - cols.start,
    ]
