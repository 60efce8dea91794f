"""Cholesky's factor of a matrix larger than memory, in a scratch folder on a local disk.

Left-looking, a panel of columns at a time (Golub and Van Loan, Matrix Computations, 4.2.8): what is left of a block of
rows is its entries less the products of the panels before, read again from the disk. dask computes the blocks of a
panel in threads and stores each at once. `dask.array.linalg.cholesky`, one graph for all, keeps its blocks in memory
though each is stored: 98 MiB at its peak, of a matrix of 128; this one 36, where 32 were free.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.linalg
import zarr
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from pipeline.analysis.lanczos import Vector
from pipeline.errors import MemoryRefusedError, OutputError, SpecError, human_bytes
from pipeline.planning.memory import available_bytes
from pipeline.progress import Reporter
from pipeline.storage.chunk_codec import zarr_codecs

SHARE_OF_PANEL = 0.5  # of free memory
FEWEST = 32  # rows of a block
_F8 = 8  # bytes
_EPS = float(np.finfo(float).eps)

Entries = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[Any]]


class NotDefiniteError(ArithmeticError):
    """A pivot is not positive, or is so by rounding alone."""


class DiskFactor:
    """L with L L' = A + damping I, A given by its entries; to be used in a `with` statement, which removes it.

    P^3 / 3 operations. The factor is written once, 4 P (P + B) bytes, and read P / (3 w) times, w columns being a
    panel: 8 P w bytes of memory, up to half of what is free. A is read once; more often where w is less than B.

    Args:
        entries: (rows, columns) -> A[rows, columns]; called by several threads.
        size: P.
        side: B, rows of a block, of A as it is stored.
        damping: added to the diagonal.
        scratch: a folder on a local disk; the system's for temporary files when None.
        report: is told of each panel.

    Attributes:
        logdet: log det (A + damping I).

    Raises:
        SpecError: dask is not installed.
        MemoryRefusedError: not even a narrow panel fits into memory.
        OutputError: there is no room on the disk.
        NotDefiniteError: there is no such factor.
    """

    def __init__(
        self,
        entries: Entries,
        size: int,
        side: int,
        damping: float,
        scratch: str | Path | None = None,
        report: Reporter | None = None,
    ) -> None:
        try:
            import dask.array
        except ImportError:
            raise SpecError("dask is not installed: python3 -m pip install 'dask[array]'") from None
        self._dask: Any = dask.array
        self._entries, self._damping, self._report = entries, damping, report or Reporter()
        self._size, (self._side, self._width) = size, _sizes(size, side)
        self._folder = _scratch(size, self._side, scratch)
        self._factor = zarr.create_array(
            os.path.join(self._folder.name, "factor.zarr"),
            shape=(size, size),
            chunks=(self._side, self._side),
            dtype="float64",
            compressors=zarr_codecs("none"),
        )
        self.logdet = 0.0
        try:
            with self._panels("panels factorised") as starts:
                for start in starts:
                    self._add_panel(start, min(start + self._width, size))
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def solve(self, b: Vector) -> Vector:
        """Solve (A + damping I) x = b: two reads of the factor.

        Args:
            b: # shape: (P, k)

        Returns:
            x.  # shape: (P, k)
        """
        x, starts = b.copy(), range(0, self._size, self._width)
        self._forward(x, 0)
        for start in reversed(starts):
            here, below, corner, panel = self._panel(start)
            x[here] -= self._computed(panel.T @ x[below])
            x[here] = scipy.linalg.solve_triangular(corner, x[here], lower=True, trans=1)
        return x

    def inverse_diagonal(self) -> Vector:
        """Return the diagonal of (A + damping I)^-1: sums of squares of the columns of L^-1.

        P^3 / 3 operations, w / 3 columns at a time: the factor is read P / w times.

        Returns:
            # shape: (P,)
        """
        found, most = np.empty(self._size), max(1, self._width // 3)
        with self._panels("panels inverted") as starts:
            for top in starts:
                stop = min(top + self._width, self._size)
                for first in range(top, stop, most):
                    count = min(most, stop - first)
                    y = np.zeros((self._size - top, count))
                    y[first - top + np.arange(count), np.arange(count)] = 1.0
                    self._forward(y, top)
                    found[first : first + count] = np.einsum("ij,ij->j", y, y)
        return found

    def _forward(self, x: Vector, top: int) -> None:
        """Solve L x = b in place, where b is zero above a panel.  # shape: (P - top, k)."""
        for start in range(top, self._size, self._width):
            _, _, corner, panel = self._panel(start)
            here, below = slice(start - top, start - top + len(corner)), slice(start - top + len(corner), None)
            x[here] = scipy.linalg.solve_triangular(corner, x[here], lower=True)
            x[below] -= self._computed(panel @ x[here])

    @contextmanager
    def _panels(self, unit: str) -> Iterator[Iterator[int]]:
        """Give the first columns of all panels, and report each that is done."""
        starts = range(0, self._size, self._width)

        def counted(report: Reporter) -> Iterator[int]:
            for start in starts:
                yield start
                report.advance(_F8 * self._width * (self._size - start))

        with self._report.tiles(len(starts), 0, unit) as report:
            yield counted(report)

    def _panel(self, start: int) -> tuple[slice, slice, Vector, Any]:
        """Return a panel's rows and those below, its square, and what is below as a dask array."""
        stop = min(start + self._width, self._size)
        here, below = slice(start, stop), slice(stop, self._size)
        lazy = self._dask.from_array(self._factor, (self._side, self._width))
        return here, below, np.asarray(self._factor[here, here]), lazy[below, here]

    def _computed(self, lazy: Any) -> Vector:
        with threadpool_limits(1):  # of BLAS, in each of dask's
            return np.asarray(lazy.compute(scheduler="threads"))

    def _add_panel(self, start: int, stop: int) -> None:
        """Factorise columns `start` to `stop`, and write them."""
        cols, before = np.arange(start, stop), np.asarray(self._factor[start:stop, :start])
        square = self._remaining(cols, cols, before)
        rounding = self._size * _EPS * np.abs(square.diagonal() + np.einsum("ij,ij->i", before, before))  # of A's
        corner, info = lapack.dpotrf(square, lower=1, overwrite_a=1)
        pivots = np.square(corner.diagonal())
        if info != 0 or (pivots <= rounding).any():
            raise NotDefiniteError(f"a pivot of columns {start} to {stop - 1} is not positive")
        self.logdet += float(np.log(pivots).sum())
        self._factor[start:stop, start:stop] = corner
        if stop == self._size:
            return

        def block(block_info: Any) -> Vector:
            (first, last), _ = block_info[None]["array-location"]
            rest = self._remaining(np.arange(stop + first, stop + last), cols, before)
            return np.asarray(scipy.linalg.solve_triangular(corner, rest.T, lower=True, overwrite_b=True).T)

        heights = tuple(min(self._side, self._size - row) for row in range(stop, self._size, self._side))
        panel = self._dask.map_blocks(block, chunks=(heights, (stop - start,)), dtype=np.float64, meta=np.empty((0, 0)))
        region = (slice(stop, self._size), slice(start, stop))
        with threadpool_limits(1):
            self._dask.store(panel, self._factor, regions=region, lock=False, scheduler="threads")

    def _remaining(self, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], before: Vector) -> Vector:
        """Return A + damping I less the products of the panels before.  # shape: (rows, cols)."""
        left = self._entries(rows, cols).astype(np.float64)
        left[rows[:, None] == cols] += self._damping
        for start in range(0, cols[0], self._side):
            some = slice(start, start + self._side)
            left -= np.asarray(self._factor[rows[0] : rows[-1] + 1, some]) @ before[:, some].T
        return left


def _sizes(size: int, most: int) -> tuple[int, int]:
    """Return rows of a block, and columns of a panel: as many blocks as memory allows.

    Args:
        size: P.
        most: rows of a block; they are halved where not even a panel of one block fits.

    Returns:
        Both.
    """
    free, threads = SHARE_OF_PANEL * available_bytes(), os.cpu_count() or 1

    def needed(width: int, side: int) -> int:
        """The panels before, in its rows; its square, thrice; and what each thread makes of a block of rows."""
        return _F8 * width * (size + 3 * width + 4 * threads * side)

    side = most
    while needed(side, side) > free:
        if side <= FEWEST:
            raise MemoryRefusedError(
                f"a panel of {side:,} columns of P = {size:,} needs {human_bytes(needed(side, side))}, "
                f"{human_bytes(free)} are free for it: take solve(b, method='minres')"
            )
        side = -(-side // 2)
    return side, max(width for width in range(side, size + side, side) if needed(width, side) <= free)


def _scratch(size: int, side: int, folder: str | Path | None) -> "tempfile.TemporaryDirectory[str]":
    """Make a folder, if there is room for the factor."""
    blocks = -(-size // side)
    needed = _F8 * side**2 * (blocks * (blocks + 1) // 2)
    place = Path(tempfile.gettempdir() if folder is None else folder)
    place.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(place).free):
        raise OutputError(
            f"scratch folder {place}: Cholesky's factor needs {human_bytes(needed)}, {human_bytes(free)} are free: "
            "give `scratch`, a folder on a disk with more room"
        )
    return tempfile.TemporaryDirectory(prefix="hessian-cholesky-", dir=place)
