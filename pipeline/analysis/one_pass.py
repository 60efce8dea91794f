"""What one read of the upper triangle tells: diagonal, norms, bounds, the largest entries."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipeline.analysis.view import MatrixView, Piece
from pipeline.errors import BlockError, IncompleteError
from pipeline.planning.parameters import ParameterLayout

Vector = npt.NDArray[np.float64]


class Totals:
    """Sums over the entries of a matrix, in float64, from the pieces of its upper triangle.

    Args:
        layout: the parameters.

    Attributes:
        diagonal: # shape: (P,)
        squares: sums of squares of each row.  # shape: (P,)
        absolute: sums of absolute values of each row.  # shape: (P,)
        blocks: sums of squares of each block.  # shape: (parameters, parameters)
    """

    def __init__(self, layout: ParameterLayout) -> None:
        self.diagonal, self.squares, self.absolute = np.zeros((3, layout.size))
        self.blocks = np.zeros((len(layout), len(layout)))
        self._layout = layout
        self._number = {name: k for k, name in enumerate(layout.names)}

    def sums_of(self, piece: Piece) -> "PieceSums":
        """Sum up a piece: the larger part of the work, in any thread."""
        values = piece.values.astype(np.float64)
        diagonal = values.diagonal().copy() if piece.is_diagonal else None
        absolute = np.abs(values)
        squares = np.square(values, out=values)
        (row_names, row_starts), (col_names, col_starts) = self._segments(piece.rows), self._segments(piece.cols)
        return PieceSums(
            piece.rows,
            piece.cols,
            diagonal,
            (absolute.sum(1), absolute.sum(0)),
            (squares.sum(1), squares.sum(0)),
            (row_names, col_names),
            np.add.reduceat(np.add.reduceat(squares, col_starts, axis=1), row_starts, axis=0),
        )

    def add(self, of: "PieceSums") -> None:
        """Count a piece, and its mirror image."""
        rows, cols = of.parameters
        self.absolute[of.rows] += of.absolute[0]
        self.squares[of.rows] += of.squares[0]
        self.blocks[np.ix_(rows, cols)] += of.blocks
        if of.diagonal is not None:
            self.diagonal[of.rows] = of.diagonal
        else:
            self.absolute[of.cols] += of.absolute[1]
            self.squares[of.cols] += of.squares[1]
            self.blocks[np.ix_(cols, rows)] += of.blocks.T

    def _segments(self, place: slice) -> tuple[list[int], list[int]]:
        """Return the numbers of the parameters met, and where they begin in the piece."""
        met = list(self._layout.segments(range(place.start, place.stop)))
        return [self._number[p.name] for p, _ in met], [span.start - place.start for _, span in met]


@dataclass(frozen=True)
class PieceSums:
    """Of a piece: sums of absolute values and squares, by row and by column; its diagonal, if it lies there.

    Attributes:
        rows: see `Piece`.
        cols: likewise.
        diagonal: None off the diagonal.
        absolute: of rows, and of columns.
        squares: likewise.
        parameters: numbers of those that rows meet, and columns.
        blocks: sums of squares of what lies in each of their blocks.
    """

    rows: slice
    cols: slice
    diagonal: Vector | None
    absolute: tuple[Vector, Vector]
    squares: tuple[Vector, Vector]
    parameters: tuple[list[int], list[int]]
    blocks: Vector


@dataclass(frozen=True)
class Entries:
    """Some entries H[row, col], of the upper triangle.

    Attributes:
        rows: # shape: (k,)
        cols: # shape: (k,)
        values: # shape: (k,)
    """

    rows: npt.NDArray[np.int64]
    cols: npt.NDArray[np.int64]
    values: Vector


class OnePass(MatrixView):
    """Of a Hessian: sums over its entries, exact up to rounding, in float64.

    What needs every entry comes from one read of the upper triangle, whichever is asked for first; the handle keeps the
    sums, O(P), so that all others cost nothing. Nothing is taken from receipts: they hold the norm of a tile as it was
    computed, without its diagonal or blocks, and say nothing of views.
    """

    def scan(self, *others: Callable[[Piece], None]) -> None:
        """Read what there is once, for others beside the sums that are kept.

        Args:
            others: each is called with every piece of the upper triangle.

        Raises:
            IncompleteError: a chunk is missing or damaged.
        """
        totals = Totals(self.parameters)
        for piece in self.pieces(partial=True):
            totals.add(totals.sums_of(piece))
            for add in others:
                add(piece)
        self._totals = totals

    def block_sizes(self) -> Vector:
        """Return the root mean square of the entries of each block.

        Returns:
            By row and column parameter; NaN where a block was not computed.  # shape: (parameters, parameters)
        """
        parameters, norms = tuple(self.parameters), self.block_norms()
        sizes = np.full((len(parameters), len(parameters)), np.nan)
        for i, a in enumerate(parameters):
            for j, b in enumerate(parameters):
                norm = norms.get((a.name, b.name))
                if norm is not None and a.size and b.size:
                    sizes[i, j] = norm / np.sqrt(a.size * b.size)
        return sizes

    def diagonal(self) -> Vector:
        """Return the second derivatives along each parameter: one read of the chunks on the diagonal, or none.

        Returns:
            # shape: (P,)

        Raises:
            IncompleteError: they were not all computed.
        """
        if "_totals" in self.__dict__ and self.has_diagonal:
            return self._totals.diagonal.copy()
        values = np.empty(self.shape[0])
        for rows, found in self.of_pieces(lambda p: (p.rows, p.values.diagonal().copy()), diagonal=True):
            values[rows] = found
        return values

    def trace(self) -> float:
        """Return the sum of the diagonal, and of the eigenvalues; see `diagonal`."""
        return float(self.diagonal().sum())

    def norm(self, ord: Literal["fro", 1, -1] | float | None = None) -> float:  # noqa: A002 (NumPy's name)
        """Return a norm of H, named as `numpy.linalg.norm` names it.

        Args:
            ord: `"fro"` or None: root of the sum of squares. 1 or inf: largest sum of absolute values of a row; -1 or
                -inf: smallest. The spectral ones, 2 and `"nuc"`, are max and sum of `abs(H.eigvalsh())`.

        Returns:
            The norm.

        Raises:
            BlockError: there is no such norm here.
            IncompleteError: not all of H was computed.
        """
        if ord in {None, "fro"}:
            return float(np.sqrt(self._complete_totals().squares.sum()))
        if ord in {1, np.inf}:
            return float(self._complete_totals().absolute.max())
        if ord in {-1, -np.inf}:
            return float(self._complete_totals().absolute.min())
        raise BlockError(f"norm: got ord={ord!r}, expected 'fro', 1, -1, inf or -inf; for 2 and 'nuc' see H.eigvalsh()")

    def row_norms(self, ord: Literal[1, 2] = 2) -> Vector:  # noqa: A002
        """Return the norm of each row, which is that of each column.

        Args:
            ord: 2, Euclidean, or 1, the sum of absolute values.

        Returns:
            # shape: (P,)

        Raises:
            BlockError: there is no such norm here.
            IncompleteError: not all of H was computed.
        """
        if ord not in {1, 2}:
            raise BlockError(f"row_norms: got ord={ord!r}, expected 1 or 2")
        totals = self._complete_totals()
        return np.sqrt(totals.squares) if ord == 2 else totals.absolute.copy()

    def block_norms(self) -> dict[tuple[str, str], float]:
        """Return the Frobenius norm of each block that was computed, by row and column parameter."""
        plan, totals, whole = self.manifest.plan, self._totals, self.manifest.layout
        return {
            (a.name, b.name): float(np.sqrt(totals.blocks[i, j]))
            for i, a in enumerate(self.parameters)
            for j, b in enumerate(self.parameters)
            if plan.covers(whole[a.name].span, whole[b.name].span)
        }

    def gershgorin_bounds(self) -> tuple[float, float]:
        """Return an interval that holds all eigenvalues: those of H_ii -+ sum_(j != i) |H_ij|.

        Returns:
            Its ends.

        Raises:
            IncompleteError: not all of H was computed.
        """
        totals = self._complete_totals()
        radii = totals.absolute - np.abs(totals.diagonal)
        return float((totals.diagonal - radii).min()), float((totals.diagonal + radii).max())

    def extreme_entries(self, k: int = 10) -> Entries:
        """Find the k entries that are largest in absolute value, largest first: one read, and O(k) memory.

        Args:
            k: how many.

        Returns:
            The entries on and above the diagonal.

        Raises:
            IncompleteError: not all of H was computed.
        """
        rows, cols, values = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        for piece in self.pieces():
            found = np.triu(piece.values) if piece.is_diagonal else piece.values
            least = np.abs(values).min() if len(values) == k else 0.0
            i, j = np.nonzero(np.abs(found) > least)
            rows = np.concatenate([rows, i + piece.rows.start])
            cols = np.concatenate([cols, j + piece.cols.start])
            values = np.concatenate([values, found[i, j].astype(np.float64)])
            kept = np.argsort(-np.abs(values), kind="stable")[:k]
            rows, cols, values = rows[kept], cols[kept], values[kept]
        return Entries(rows, cols, values)

    @property
    def has_diagonal(self) -> bool:
        """Whether all of the diagonal was computed."""
        return bool(self.manifest.plan.selected.diagonal()[[band.chunk for band in self._bands]].all())

    @cached_property
    def _totals(self) -> Totals:
        self.scan()
        return self._totals  # which `scan` has set

    def _complete_totals(self) -> Totals:
        if not self.is_complete:
            raise IncompleteError(
                f"{self.url} does not hold all of H: the run selected blocks={self.manifest.blocks!r}; "
                "block_norms() and H.block_diagonal() give what there is"
            )
        return self._totals
