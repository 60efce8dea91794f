"""The entries of a matrix down-sampled to a picture, from its pieces: as little memory as the picture has."""

import math
from copy import copy
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline.analysis.view import Indices, Piece
from pipeline.planning.parameters import ParameterLayout

MOST_BINS = 1024  # on a side


class Raster:
    """Root mean squares of the entries in a grid of rectangles.

    No rectangle lies across the border of a parameter. Where P is larger than the picture a parameter has as many rows
    of it as the root of its size is large, so that a bias is seen beside its weight.

    Args:
        layout: the parameters.
        most: rows of the picture at most.

    Attributes:
        edges: flat indices at which its rows begin, and P.  # shape: (n + 1,)
        starts: its row with which each parameter begins, and n.  # shape: (parameters + 1,)
    """

    def __init__(self, layout: ParameterLayout, most: int = MOST_BINS) -> None:
        self.edges = _edges(layout, most)
        self.starts: Indices = np.searchsorted(self.edges, [*(p.offset for p in layout), layout.size])
        side = len(self.edges) - 1
        self._squares, self._counts = np.zeros((2, side, side))

    def add(self, piece: Piece) -> None:
        """Count a piece, and its mirror image."""
        squares = np.square(piece.values, dtype=np.float64)
        (rows, row_starts, heights), (cols, col_starts, widths) = self._cut(piece.rows), self._cut(piece.cols)
        sums = np.add.reduceat(np.add.reduceat(squares, col_starts, axis=1), row_starts, axis=0)
        counts = np.outer(heights, widths)
        self._squares[rows, cols] += sums
        self._counts[rows, cols] += counts
        if not piece.is_diagonal:
            self._squares[cols, rows] += sums.T
            self._counts[cols, rows] += counts.T

    def values(self) -> npt.NDArray[np.float64]:
        """Return the picture; NaN where nothing was added.  # shape: (n, n)."""
        with np.errstate(invalid="ignore"):
            return np.sqrt(self._squares / self._counts)

    def merged(self, most: int) -> "Raster":
        """Return a smaller picture of the same: about so many rows at most, or one for each parameter."""
        every = -(-len(self._squares) // most)
        firsts = np.unique(np.concatenate([np.arange(a, b, every) for a, b in pairwise(self.starts)]))
        smaller = copy(self)
        smaller.edges = np.append(self.edges[firsts], self.edges[-1])
        smaller.starts = np.searchsorted(smaller.edges, self.edges[self.starts])
        for name in ("_squares", "_counts"):
            sums = np.add.reduceat(np.add.reduceat(getattr(self, name), firsts, axis=1), firsts, axis=0)
            setattr(smaller, name, sums)
        return smaller

    def _cut(self, place: slice) -> tuple[slice, Indices, Indices]:
        """Return the rows of the picture that a place meets, where they begin in it, and how much of each is in it."""
        first = int(np.searchsorted(self.edges, place.start, "right")) - 1
        last = int(np.searchsorted(self.edges, place.stop))
        inner = np.clip(self.edges[first : last + 1], place.start, place.stop) - place.start
        return slice(first, last), inner[:-1], np.diff(inner)


def _edges(layout: ParameterLayout, most: int) -> Indices:
    """Cut P rows into at most so many."""
    if layout.size <= most:
        return np.arange(layout.size + 1)
    filled = [p for p in layout if p.size]
    if 2 * len(filled) > most:
        return np.unique(np.linspace(0, layout.size, most + 1).astype(np.int64))
    low, high = 0.0, math.sqrt(layout.size)
    for _ in range(50):  # halvings: as fine as a float is
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_rows(p.size, middle) for p in filled) <= most else (low, middle)
    cuts = [np.linspace(p.offset, p.span.stop, _rows(p.size, low) + 1).astype(np.int64)[:-1] for p in filled]
    return np.append(np.concatenate(cuts), layout.size)


def _rows(size: int, per_root: float) -> int:
    return min(size, max(1, int(per_root * math.sqrt(size))))
