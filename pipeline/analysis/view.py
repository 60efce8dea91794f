"""The rows and columns of chosen parameters, read chunk by chunk: what every method of a `Hessian` stands on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import BlockError, IncompleteError, MemoryRefusedError, human_bytes, nearest
from pipeline.planning.manifest import Manifest
from pipeline.planning.memory import available_bytes
from pipeline.planning.parameters import ParameterLayout, choose
from pipeline.progress import Reporter
from pipeline.results.hessian import StoredHessian
from pipeline.storage.output import Output
from pipeline.storage.read_ahead import Room, ahead
from pipeline.storage.zarr_store import compact

Matrix = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Result = TypeVar("Result")
Multiply = Callable[[Matrix], Matrix]  # X -> H X


@dataclass(frozen=True)
class Band:
    """What a view has of one row of chunks.

    Attributes:
        chunk: its number.
        place: of its rows in the view; they lie together, since a view keeps the order of the whole.
        inside: of its rows in the chunk.
    """

    chunk: int
    place: slice
    inside: slice | Indices


@dataclass(frozen=True)
class Piece:
    """A stored chunk as far as a view has it: `view[rows, cols]` is `values`; rows are cols on the diagonal."""

    rows: slice
    cols: slice
    values: Matrix

    @property
    def is_diagonal(self) -> bool:
        """Whether it lies on the diagonal, and holds both sides of it."""
        return self.rows == self.cols


class MatrixView(StoredHessian):
    """A stored Hessian, or what it has of some parameters; both symmetries read the same.

    Args:
        output: where it lies.
        manifest: what it is.
        names: of the parameters, in the order of the whole; all when None.

    Attributes:
        report: told about each pass over the store; silent unless replaced.
    """

    def __init__(self, output: Output, manifest: Manifest, names: Sequence[str] | None = None) -> None:
        super().__init__(output, manifest)
        whole, self.report = manifest.layout, Reporter()
        self._is_whole = names is None or len(names) == len(whole)
        chosen = list(whole) if names is None else [whole[name] for name in names]
        self.parameters = ParameterLayout.of([(p.name, p.shape) for p in chosen])
        self._flat = np.concatenate([np.arange(p.span.start, p.span.stop) for p in chosen] or [np.arange(0)])
        self._bands = _bands(self._flat, manifest.chunk)

    def __repr__(self) -> str:
        P, of = self.shape[0], "" if self._is_whole else f" of {len(self.manifest.layout)}"
        return f"<Hessian {P:,} x {P:,}, {self.dtype}, {len(self.parameters)}{of} parameters, at {self.url}>"

    @property
    def gradient(self) -> npt.NDArray[np.float64]:
        """DL / dtheta with respect to these parameters, in float64.  # shape: (P,)."""
        return np.take(super().gradient, self._flat)

    def select(self, *globs: str) -> Self:
        """Return the Hessian with respect to some of the parameters, by globs of their names: a view, nothing is read.

        Args:
            globs: of names; `!glob` takes out.

        Returns:
            The sub-matrix, in the order of this one.

        Raises:
            BlockError: a glob matches nothing, or nothing is left.
        """
        names = self._choose(globs)
        if not names:
            raise BlockError(f"select: {list(globs)} leave no parameter, expected at least one")
        return self._view(names)

    def block_diagonal(self) -> Iterator[Self]:
        """Return the view of each parameter by itself, in order; nothing is read."""
        for name in self.parameters.names:
            yield self._view([name])

    def pieces(self, *, diagonal: bool = False, partial: bool = False) -> Iterator[Piece]:
        """Read the upper triangle once, chunk by chunk, several of them ahead.

        Args:
            diagonal: reads the chunks on the diagonal alone.
            partial: leaves out what was not computed.

        Returns:
            Pieces, row by row.

        Raises:
            IncompleteError: a chunk was not computed, is missing or damaged.
        """
        return self.of_pieces(_kept, diagonal=diagonal, partial=partial)

    def of_pieces(
        self, function: Callable[[Piece], Result], *, diagonal: bool = False, partial: bool = False
    ) -> Iterator[Result]:
        """Read the upper triangle once, and call a function with each piece in the thread that has read it.

        Args:
            function: of a piece, whose values lie there only until it returns; called by several threads at a time.
            diagonal: see `pieces`.
            partial: likewise.

        Yields:
            What it returns, row by row.

        Raises:
            IncompleteError: see `pieces`.
        """
        pairs = [
            (a, b)
            for k, a in enumerate(self._bands)
            for b in self._bands[k : k + 1 if diagonal else None]
            if not partial or self.manifest.plan.selected[a.chunk, b.chunk]
        ]
        if not partial:
            self._require_computed(pairs)

        room = Room((self.store.chunk,) * 2, self.dtype)

        def read(pair: tuple[Band, Band]) -> tuple[int, Result]:
            a, b = pair
            try:
                chunk = self.store.read_chunk(a.chunk, b.chunk, out=room.values)
            except IncompleteError as fault:
                raise IncompleteError(f"{self.url}: {fault}") from None
            return chunk.nbytes, function(Piece(a.place, b.place, _within(chunk, a.inside, b.inside)))

        with self.report.tiles(len(pairs), 0, "chunks"):
            for read_bytes, result in ahead(read, pairs):
                yield result
                self.report.advance(read_bytes)

    @property
    def is_complete(self) -> bool:
        """Whether all of it was computed, itself or as a mirror image."""
        chunks = [band.chunk for band in self._bands]
        selected = self.manifest.plan.selected
        return bool((selected | selected.T)[np.ix_(chunks, chunks)].all())

    def to_numpy(self, dtype: npt.DTypeLike | None = None) -> Matrix:
        """Read all of it: one pass over the store, P^2 entries of memory.

        Args:
            dtype: of the array; the stored type when None.

        Returns:
            H.  # shape: (P, P)

        Raises:
            MemoryRefusedError: it does not fit into memory.
            IncompleteError: not all of it was computed.
        """
        kind = self.dtype if dtype is None else np.dtype(dtype)
        self.require_memory(self.shape[0] ** 2 * kind.itemsize, "H", "read blocks, or use H @ v, which streams")
        full = np.empty(self.shape, kind)

        def place(piece: Piece) -> None:
            full[piece.rows, piece.cols] = piece.values
            if not piece.is_diagonal:
                full[piece.cols, piece.rows] = piece.values.T

        for _ in self.of_pieces(place):
            pass
        return full

    def require_memory(self, needed_bytes: int, what: str, remedy: str) -> None:
        """Refuse what does not fit.

        Args:
            needed_bytes: by the whole of it.
            what: for the error.
            remedy: what the error says to do.

        Raises:
            MemoryRefusedError: less is free.
        """
        free = available_bytes()
        if needed_bytes > free:
            raise MemoryRefusedError(
                f"{what} of P = {self.shape[0]:,} needs {human_bytes(needed_bytes)}, {human_bytes(free)} are free: "
                f"{remedy}"
            )

    def entries(self, rows: Indices, cols: Indices) -> Matrix:
        """Read rows x columns, by number, from the upper triangle of chunks, transposed where they lie below it.

        Args:
            rows: numbers.  # shape: (m,)
            cols: numbers.  # shape: (n,)

        Returns:
            The entries.  # shape: (m, n)

        Raises:
            IncompleteError: they were not computed.
        """
        rows, cols = self._flat[rows], self._flat[cols]
        values = np.empty((len(rows), len(cols)), self.dtype)
        chunk_rows, chunk_cols = rows // self.manifest.chunk, cols // self.manifest.chunk
        for i in np.unique(chunk_rows):
            here, above = chunk_rows == i, chunk_cols >= i
            if above.any():
                values[np.ix_(here, above)] = self.store.read(compact(rows[here]), compact(cols[above]))
            if not above.all():
                values[np.ix_(here, ~above)] = self.store.read(compact(cols[~above]), compact(rows[here])).T
        if missing := int(np.isnan(values).sum()):  # what was computed is never NaN
            raise IncompleteError(
                f"{missing:,} of {values.size:,} entries asked for are not in {self.url}: the run "
                f"selected blocks={self.manifest.blocks!r}, or is not finished"
            )
        return values

    def _view(self, names: Sequence[str]) -> Self:
        view = type(self)(self.output, self.manifest, names)
        view.report = self.report
        return view

    def _choose(self, globs: Sequence[str]) -> tuple[str, ...]:
        names = self.parameters.names
        return choose(names, globs, lambda g: BlockError(f"`{g}` matches no parameter{nearest(g.strip('!'), names)}"))

    def _require_computed(self, pairs: Sequence[tuple[Band, Band]]) -> None:
        selected = self.manifest.plan.selected
        missing = sum(not selected[a.chunk, b.chunk] for a, b in pairs)
        if missing:
            raise IncompleteError(
                f"{self.url} does not hold all of H: {missing:,} of {len(pairs):,} chunks asked for are not there, the "
                f"run selected blocks={self.manifest.blocks!r}; take H.select(...) or H.block_diagonal() of what is"
            )


def _bands(flat: Indices, chunk: int) -> list[Band]:
    """Cut the rows of a view where chunks end."""
    numbers, starts = np.unique(flat // chunk, return_index=True)
    stops = np.append(starts, len(flat))[1:]
    return [
        Band(int(i), slice(int(start), int(stop)), compact(flat[start:stop] - i * chunk))
        for i, start, stop in zip(numbers, starts, stops, strict=True)
    ]


def _kept(piece: Piece) -> Piece:
    """Copy what another chunk will lie in."""
    return Piece(piece.rows, piece.cols, piece.values.copy())


def _within(chunk: Matrix, rows: slice | Indices, cols: slice | Indices) -> Matrix:
    """Take rows x columns, copied only where they do not lie together."""
    return chunk[rows][:, cols]
