"""Reading: a finished Hessian as an object that knows its blocks, wherever it lies."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from pipeline.errors import BlockError, IncompleteError, MemoryRefusedError, OutputError, mebibytes
from pipeline.planning.manifest import Manifest
from pipeline.planning.memory import (
    available_bytes,
)
from pipeline.planning.parameters import ParameterLayout
from pipeline.storage.output import VERIFY, Output
from pipeline.storage.run_files import is_finished, read_manifest, read_proof
from pipeline.storage.zarr_store import MatrixStore, compact

if TYPE_CHECKING:
    from torch import Tensor

Matrix = npt.NDArray[Any]
_Axis = tuple[npt.NDArray[np.int64], bool]  # flat indices, and whether the axis is dropped


class Hessian:
    """The Hessian in an output. Nothing is read before it is asked for, and both symmetries read the same.

    Args:
        output: where it lies.
        manifest: what it is.

    Attributes:
        manifest: what was computed, and how.
        parameters: names, shapes and offsets, in the order of rows and columns.
        output: where it lies.
        store: the matrix as it is stored.
    """

    def __init__(self, output: Output, manifest: Manifest) -> None:
        self.manifest = manifest
        self.parameters: ParameterLayout = manifest.layout
        self.output = output
        self.store = MatrixStore(output, manifest)

    def __repr__(self) -> str:
        P = self.parameters.size
        return f"<Hessian {P:,} x {P:,}, {self.dtype}, {len(self.parameters)} parameters, at {self.output.url}>"

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.output.url

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.parameters.size, self.parameters.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type."""
        return np.dtype(self.manifest.store_dtype)

    @property
    def loss(self) -> float:
        """L, in float64."""
        return self.manifest.fingerprint.loss

    @property
    def gradient(self) -> npt.NDArray[np.float64]:
        """DL / dtheta, in float64.  # shape: (P,)."""
        return MatrixStore.gradient(self.output, self.manifest)

    def __getitem__(self, key: tuple[Any, Any]) -> Matrix:
        """Read a block, or rows and columns.

        Args:
            key: two parameter names; or two of int, slice, integer array, boolean array, taken orthogonally.

        Returns:
            For names a and b an array of shape a.shape + b.shape, as `torch.func.hessian` gives. Else a matrix, less
            the axes given as int.

        Raises:
            BlockError: there are no such rows and columns.
            IncompleteError: they were not computed.
        """
        if not isinstance(key, tuple) or len(key) != 2:
            raise BlockError(f"got {key!r}, expected two parameter names, or rows and columns")
        if isinstance(key[0], str) and isinstance(key[1], str):
            a, b = self.parameters[key[0]], self.parameters[key[1]]
            return self._entries(_indices(a.span), _indices(b.span)).reshape(a.shape + b.shape)
        (rows, drop_row), (cols, drop_col) = self._axis(key[0]), self._axis(key[1])
        values = self._entries(rows, cols)
        return values[0 if drop_row else slice(None), 0 if drop_col else slice(None)]

    def __matmul__(self, vectors: npt.ArrayLike) -> Matrix:
        """Multiply with one vector or the columns of a matrix, reading the upper triangle once.

        Args:
            vectors: # shape: (P,) or (P, k)

        Returns:
            The product, in the wider type of the two.  # shape: as `vectors`

        Raises:
            BlockError: the shape does not fit.
            IncompleteError: not all of H was computed.
        """
        v = np.asarray(vectors)
        if v.ndim not in {1, 2} or len(v) != self.shape[0]:
            raise BlockError(f"got an operand of shape {v.shape}, expected ({self.shape[0]},) or ({self.shape[0]}, k)")
        product = np.zeros(v.shape, np.result_type(self.dtype, v.dtype))
        plan, everything = self.manifest.plan, range(self.shape[0])
        if not plan.covers(everything, everything):
            raise IncompleteError(
                f"{self.url} does not hold all of H: the run selected blocks={self.manifest.blocks!r}"
            )
        keys = [(i, j) for i in range(plan.side) for j in range(i, plan.side)]
        # One thread multiplies, which is enough, while others read: more would only stand in their way.
        with threadpool_limits(1):
            for (i, j), chunk in zip(keys, self.store.read_chunks(keys), strict=True):
                if isinstance(chunk, IncompleteError):
                    raise chunk
                rows, cols = (plan.span(range(k, k + 1)) for k in (i, j))
                product[rows.start : rows.stop] += chunk @ v[cols.start : cols.stop]
                if i != j:
                    product[cols.start : cols.stop] += chunk.T @ v[rows.start : rows.stop]
        return product

    def to_numpy(self) -> Matrix:
        """Read the whole matrix.

        Returns:
            H.  # shape: (P, P)

        Raises:
            MemoryRefusedError: it does not fit into memory.
            IncompleteError: not all of H was computed.
        """
        P = self.shape[0]
        needed, free = P * P * self.dtype.itemsize, available_bytes()
        if needed > free:
            raise MemoryRefusedError(
                f"H needs {mebibytes(needed)}, {mebibytes(free)} are free: read blocks, or use H @ v, which streams"
            )
        full = np.empty(self.shape, self.dtype)
        for rows in self._bands():
            full[rows, rows.start :] = self._checked(self.store.read(rows, slice(rows.start, None)))
            full[rows.stop :, rows] = full[rows, rows.stop :].T
        return full

    def to_dict(self) -> "dict[str, dict[str, Tensor]]":
        """Read all blocks as torch tensors, nested by row and column parameter as `torch.func.hessian` gives them."""
        import torch

        full = torch.from_numpy(self.to_numpy())
        return {
            a.name: {
                b.name: full[a.span.start : a.span.stop, b.span.start : b.span.stop].reshape(a.shape + b.shape)
                for b in self.parameters
            }
            for a in self.parameters
        }

    def _bands(self) -> list[slice]:
        """Give the rows of each row of chunks."""
        B, P = self.manifest.chunk, self.shape[0]
        return [slice(start, min(start + B, P)) for start in range(0, P, B)]

    def _entries(self, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64]) -> Matrix:
        """Read rows x columns from the upper triangle of chunks, transposed where they lie below it."""
        values = np.empty((len(rows), len(cols)), self.dtype)
        chunk_rows, chunk_cols = rows // self.manifest.chunk, cols // self.manifest.chunk
        for i in np.unique(chunk_rows):
            here, above = chunk_rows == i, chunk_cols >= i
            if above.any():
                values[np.ix_(here, above)] = self.store.read(compact(rows[here]), compact(cols[above]))
            if not above.all():
                values[np.ix_(here, ~above)] = self.store.read(compact(cols[~above]), compact(rows[here])).T
        return self._checked(values)

    def _checked(self, values: Matrix) -> Matrix:
        """Refuse entries that were not computed; those that were are never NaN."""
        if np.isnan(values).any():
            raise IncompleteError(
                f"{np.isnan(values).sum():,} of {values.size:,} entries asked for are not in {self.url}: the run "
                f"selected blocks={self.manifest.blocks!r}, or is not finished"
            )
        return values

    def _axis(self, key: Any) -> _Axis:
        """Turn one index into flat indices."""
        P = self.shape[0]
        if isinstance(key, slice):
            return np.arange(P)[key], False
        index = np.asarray(key)
        if index.dtype == bool and index.shape == (P,):
            return np.flatnonzero(index), False
        if index.ndim > 1 or not (np.issubdtype(index.dtype, np.integer) or index.size == 0):
            raise BlockError(f"got the index {key!r}, expected an int, a slice, or a vector of integers or P booleans")
        flat = index.reshape(-1).astype(np.int64)
        if ((flat < -P) | (flat >= P)).any():
            raise BlockError(f"index out of range: got {key!r} for {P} rows and columns")
        return np.where(flat < 0, flat + P, flat), index.ndim == 0


def open_hessian(url: str, endpoint_url: str | None = None, *, unproven: bool = False) -> Hessian:
    """Open a Hessian that was computed.

    Args:
        url: the output of a run, a path or an fsspec URL.
        endpoint_url: of its server, where it is not the cloud's own or the environment's.
        unproven: opens one whose proof failed, too.

    Returns:
        A handle; nothing of the matrix is read yet.

    Raises:
        OutputError: there is none.
        IncompleteError: the run is not finished, or its proof failed.
    """
    output = Output(url, endpoint_url)
    output.check_readable()
    manifest = read_manifest(output)
    if manifest is None:
        raise OutputError(f"output {url}: holds no Hessian (no manifest.json)")
    if is_finished(output):
        return Hessian(output, manifest)
    if read_proof(output) is not False:
        raise IncompleteError(f"output {url}: the run is not finished; run the same job again, it goes on from there")
    if not unproven:
        raise IncompleteError(
            f"output {url}: all is computed, but the proof failed (see its {VERIFY}): open_hessian(url, unproven=True) "
            "opens it all the same, the same job with --check computes anew what is damaged"
        )
    return Hessian(output, manifest)


def _indices(span: range) -> npt.NDArray[np.int64]:
    return np.arange(span.start, span.stop)
