"""A Hessian as an array, as far as it can be one: indices, names, and what NumPy does with it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from numpy.lib.mixins import NDArrayOperatorsMixin

from pipeline.analysis.products import Products
from pipeline.analysis.view import Indices, Matrix
from pipeline.errors import BlockError

if TYPE_CHECKING:
    from torch import Tensor

_GLOB = "*?["


class ArrayView(Products, NDArrayOperatorsMixin):
    """Of a Hessian: what arrays have. Arithmetic other than products reads all of it, where that fits into memory."""

    ndim = 2
    # Products stream; the mixin's would come by way of NumPy.
    __matmul__ = Products.__matmul__
    __rmatmul__ = Products.__rmatmul__

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """P^2."""
        return self.shape[0] ** 2

    @property
    def nbytes(self) -> int:
        """Bytes of all entries in the stored type."""
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> Self:  # noqa: N802 (NumPy's name)
        """Itself: H is symmetric."""
        return self

    def __iter__(self) -> Iterator[Matrix]:
        for band in self._bands:
            yield from self[band.place]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Matrix:
        """Read all of it, as `to_numpy`; refused with numbers where it does not fit."""
        if copy is False:
            raise ValueError("H lies in a store: an array of it is always a copy")
        return self.to_numpy(dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Stream products with arrays; read all of H for any other function of NumPy."""
        if ufunc is np.matmul and method == "__call__" and not options:
            left, right = inputs
            return left @ right if isinstance(left, ArrayView) else self.__rmatmul__(left)
        if any(isinstance(out, ArrayView) for out in options.get("out", ())):
            raise ValueError("H lies in a store, and is not written into: write H = H + ... for a new array")
        dense = [np.asarray(x) if isinstance(x, ArrayView) else x for x in inputs]
        return getattr(ufunc, method)(*dense, **options)

    def __getitem__(self, key: Any) -> Matrix:
        """Read blocks, rows and columns.

        The rows, and the columns, are those of an int, a slice, an integer or boolean vector, a parameter's name, or a
        glob of names; taken orthogonally, and all columns where only rows are given. A name gives axes of the
        parameter's shape, as `torch.func.hessian` does; an int none; all else one.

        Args:
            key: rows, or (rows, columns).

        Returns:
            The entries: for names a and b of shape a.shape + b.shape.

        Raises:
            BlockError: there are no such rows and columns.
            IncompleteError: they were not computed.
        """
        keys = key if isinstance(key, tuple) else (key,)
        if not 1 <= len(keys) <= 2:
            raise BlockError(f"got {len(keys)} indices in {key!r}, expected rows, or rows and columns")
        (rows, row_shape), (cols, col_shape) = (self._axis(k) for k in (*keys, slice(None))[:2])
        return self.entries(rows, cols).reshape(row_shape + col_shape)[()]

    def unflatten(self, vectors: npt.ArrayLike) -> dict[str, Matrix]:
        """Take a vector over all parameters apart, by parameter.

        Args:
            vectors: # shape: (P,), or (P, k) for several

        Returns:
            By name, in the parameter's shape.  # shape: p.shape, or p.shape + (k,)

        Raises:
            BlockError: the length is not P.
        """
        v = np.asarray(vectors)
        if v.ndim == 0 or len(v) != self.shape[0]:
            raise BlockError(f"unflatten: got shape {v.shape}, expected ({self.shape[0]},) or ({self.shape[0]}, k)")
        return {p.name: v[p.place].reshape(p.shape + v.shape[1:]) for p in self.parameters}

    def to_dict(self) -> "dict[str, dict[str, Tensor]]":
        """Read all blocks as torch tensors, nested by row and column parameter as `torch.func.hessian` gives them."""
        import torch

        full = torch.from_numpy(self.to_numpy())
        return {
            a.name: {b.name: full[a.place, b.place].reshape(a.shape + b.shape) for b in self.parameters}
            for a in self.parameters
        }

    def _axis(self, key: Any) -> tuple[Indices, tuple[int, ...]]:
        """Return the numbers that an index stands for, and the shape they have in the answer."""
        if isinstance(key, str):
            return self._named(key)
        P = self.shape[0]
        if isinstance(key, slice) or key is Ellipsis:
            numbers = np.arange(P)[key]
            return numbers, numbers.shape
        index = np.asarray(key)
        if index.dtype == bool and index.shape == (P,):
            index = np.flatnonzero(index)
        if index.ndim > 1 or not (np.issubdtype(index.dtype, np.integer) or index.size == 0):
            raise BlockError(
                f"got the index {key!r}, expected an int, a slice, a vector of integers or of P booleans, a "
                "parameter's name or a glob"
            )
        flat = index.reshape(-1).astype(np.int64)
        if ((flat < -P) | (flat >= P)).any():
            raise BlockError(f"index out of range: got {key!r} for {P} rows and columns")
        return np.where(flat < 0, flat + P, flat), index.shape

    def _named(self, key: str) -> tuple[Indices, tuple[int, ...]]:
        """Return the numbers of a parameter, or of all that a glob matches."""
        if key in self.parameters.names or not any(c in key for c in _GLOB):
            p = self.parameters[key]
            return np.arange(p.span.start, p.span.stop), p.shape
        numbers = np.concatenate([self._named(name)[0] for name in self._choose([key])])
        return numbers, numbers.shape
