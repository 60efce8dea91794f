"""Products with a Hessian: the store is read once, however many vectors there are.

The thread that has read a chunk multiplies it, on both sides of the diagonal, while it lies in its cache; the products
are added in the order of chunks, so that their last bits do not hang on threads. What did not pay, of 16 columns, 1 MiB
a chunk and files in the system's cache: mapping files into memory (94 % of the CPU time, and a file that is cut off
meanwhile kills the process), reading into memory used before (the same; for what Blosc decodes it is 40 %), transposed
operands and products (the same), two readers for four.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from pipeline.analysis.devices import chosen, placed
from pipeline.analysis.view import Matrix, MatrixView, Multiply, Piece
from pipeline.errors import BlockError
from pipeline.planning.memory import available_bytes
from pipeline.storage.read_ahead import Room

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

DEVICE_CHUNKS = 16  # on a GPU at a time: a few threads' own, in the type of the product
SHARE_HELD = 0.5  # of free memory: what an iteration may take to hold H, in place of reading it at every step


class Products(MatrixView):
    """Of a Hessian: products. H is symmetric, so rows and columns, H and its adjoint are one."""

    def __matmul__(self, vectors: npt.ArrayLike) -> Matrix:
        """Multiply with one vector or the columns of a matrix.

        Exact up to rounding. One read of the upper triangle, 2 P^2 k operations; memory for the operand, the product
        and a few chunks.

        Args:
            vectors: # shape: (P,) or (P, k)

        Returns:
            The product, in the wider type of the two.  # shape: as `vectors`

        Raises:
            BlockError: the shape does not fit.
            IncompleteError: not all of H was computed.
        """
        return self.multiply(vectors)

    def multiply(self, vectors: npt.ArrayLike, device: str | None = None) -> Matrix:
        """Multiply as `H @ vectors` does, on a device.

        Args:
            vectors: # shape: (P,) or (P, k)
            device: of torch, to which chunks are sent as they are read; a GPU where there is one when None.

        Returns:
            The product, in the wider type of the two.  # shape: as `vectors`

        Raises:
            BlockError: the shape does not fit.
            IncompleteError: not all of H was computed.
        """
        v = np.asarray(vectors)
        if v.ndim not in {1, 2} or len(v) != self.shape[0]:
            raise BlockError(f"got an operand of shape {v.shape}, expected ({self.shape[0]},) or ({self.shape[0]}, k)")
        kind = np.result_type(self.dtype, v.dtype)
        on = chosen(device, DEVICE_CHUNKS * self.manifest.chunk**2 * kind.itemsize + 2 * v.size * kind.itemsize)
        product: Matrix = np.zeros(v.shape, kind)
        if on is None:
            self._add(v.astype(kind, copy=False), product, self._caster(kind))
            return product
        operand = placed(v, kind, on)
        there = operand.new_zeros(operand.shape)
        self._add(operand, there, lambda values: placed(values, kind, on))
        product[...] = there.cpu().numpy()
        return product

    def _caster(self, kind: np.dtype[Any]) -> Callable[[Matrix], Matrix]:
        """Return what puts entries into a type."""
        if kind == self.dtype:
            return lambda values: values
        room = Room((self.manifest.chunk,) * 2, kind)

        def cast(values: Matrix) -> Matrix:
            there = room.values.reshape(-1)[: values.size].reshape(values.shape)
            there[...] = values
            return there

        return cast

    def _add(self, v: Any, product: Any, ready: Callable[[Matrix], Any]) -> None:
        """Add H v: arrays of NumPy or tensors of torch, whichever `ready` makes of a chunk's entries."""

        def parts(piece: Piece) -> tuple[slice, slice, Any, Any]:
            values = ready(piece.values)
            right = values @ v[piece.cols]
            return piece.rows, piece.cols, right, None if piece.is_diagonal else values.T @ v[piece.rows]

        with threadpool_limits(1):  # of BLAS, in each of the threads that read
            for rows, cols, right, down in self.of_pieces(parts):
                product[rows] += right
                if down is not None:
                    product[cols] += down

    def __rmatmul__(self, vectors: npt.ArrayLike) -> Matrix:
        """Multiply one vector, or the rows of a matrix, with H; see `H @ v`.  # shape: (P,) or (k, P)."""
        v = np.asarray(vectors)
        if v.ndim not in {1, 2}:
            raise BlockError(f"got an operand of shape {v.shape}, expected ({self.shape[0]},) or (k, {self.shape[0]})")
        return (self @ v.T).T

    def matvec(self, v: npt.ArrayLike) -> Matrix:
        """Multiply with a vector; SciPy's iterative solvers take what has this for an operator.

        Args:
            v: # shape: (P,) or (P, 1)

        Returns:
            H v.
        """
        return self @ v

    rmatvec = matmat = rmatmat = matvec

    def as_linear_operator(self) -> "LinearOperator":
        """Return H to SciPy: each product reads the store once, block vectors too; its adjoint is itself.

        Returns:
            A `scipy.sparse.linalg.LinearOperator`.
        """
        from scipy.sparse.linalg import LinearOperator

        return LinearOperator(
            self.shape, self.matvec, rmatvec=self.matvec, matmat=self.matvec, rmatmat=self.matvec, dtype=self.dtype
        )

    def quadratic_form(self, vectors: npt.ArrayLike) -> Any:
        """Return v' H v, the curvature of L along v, or V' H V of several; one read of the store.

        Args:
            vectors: # shape: (P,) or (P, k)

        Returns:
            A number, or  # shape: (k, k)
        """
        v = np.asarray(vectors)
        return v.T @ (self @ v)

    def multiplier(self, device: str | None = None) -> Multiply:
        """Return X -> H X for an iteration, in float64: of the matrix in memory where it fits well, else of the store.

        Args:
            device: of torch, to hold it; a GPU where there is one, and it fits there, when None.

        Returns:
            A function.  # shape: (P, k) -> (P, k)
        """
        needed = 8 * self.shape[0] ** 2
        if needed > SHARE_HELD * available_bytes():
            return self.__matmul__
        full = self.to_numpy(np.float64)
        if (device := chosen(device, needed)) is None:
            return lambda vectors: full @ vectors
        there = placed(full, full.dtype, device)
        return lambda vectors: np.asarray((there @ placed(vectors, full.dtype, device)).cpu())
