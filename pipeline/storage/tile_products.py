"""Products of a tile with a few vectors, taken where it was computed: what its stored bytes are compared with later.

Between an engine and the store entries are copied, mirrored, cast, encoded and sent. A bit that flips on the way,
before any checksum of an object is taken, changes the products of its row and of its column (algorithm-based fault
tolerance: Huang and Abraham, 1984). They lie in the tile's receipt.
"""

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float64]

COUNT = 2  # vectors: what cancels along one does not along the other
FLOAT64 = np.finfo(np.float64)
LAST_BITS = 64  # of float64, times the sum of the terms' sizes: what summing in another order changes


def check_vectors(run: str, size: int) -> Vectors:
    """Return the vectors of a run: of both signs, between 0.5 and 1.5, so that every entry counts with its own weight.

    Args:
        run: digest of the manifest.
        size: P.

    Returns:
        The vectors, the same in every process and version.  # shape: (P, COUNT)
    """
    raw = np.random.Philox(key=int(run, 16)).random_raw(size * COUNT)
    signs = np.where(raw & np.uint64(1), 1.0, -1.0)
    return np.asarray(signs * (0.5 + (raw >> np.uint64(11)) * 2.0**-53)).reshape(size, COUNT)


class TileProducts:
    """U V and (U - diagonal)' V, with U the entries of a tile at or right of the diagonal of H.

    Args:
        xp: numpy or torch, whichever the entries are of.
        vectors: of the run; float64.  # shape: (P, COUNT)
        rows: of the tile, flat indices.
        cols: likewise.

    Attributes:
        right: U V.  # shape: (rows, COUNT)
        down: (U - diagonal)' V.  # shape: (cols, COUNT)
    """

    def __init__(self, xp: Any, vectors: Any, rows: range, cols: range) -> None:
        self._xp, self._vectors, self._rows, self._cols = xp, vectors, rows, cols
        self.right = xp.zeros_like(vectors[rows.start : rows.stop])
        self.down = xp.zeros_like(vectors[cols.start : cols.stop])

    def add(self, part: Any, rows: range, cols: range) -> None:
        """Add some of the tile's entries.

        Args:
            part: their values, float64; those left of the diagonal mean nothing.  # shape: (rows, cols)
            rows: flat indices.
            cols: flat indices.
        """
        v, first = self._vectors, rows.start - cols.start
        crossed = min(max(rows.stop - cols.start, 0), len(cols))  # columns that the diagonal may cross
        middle = cols.start + crossed
        upper, beyond = self._xp.triu(part[:, :crossed], first), part[:, crossed:]
        here = slice(rows.start - self._rows.start, rows.stop - self._rows.start)
        start, cut, stop = (c - self._cols.start for c in (cols.start, middle, cols.stop))
        self.right[here] += upper @ v[cols.start : middle] + beyond @ v[middle : cols.stop]
        self.down[start:cut] += self._xp.triu(upper, first + 1).T @ v[rows.start : rows.stop]
        self.down[cut:stop] += beyond.T @ v[rows.start : rows.stop]

    def to_text(self) -> str:
        """Write both as text, for a receipt."""
        both = [values if self._xp is np else values.cpu().numpy() for values in (self.right, self.down)]
        return as_text(np.concatenate(both))


def as_text(both: Vectors) -> str:
    """Write products as text: `right`, then `down`."""
    return base64.b64encode(both.astype("<f8").tobytes()).decode()


def from_text(text: str) -> Vectors:
    """Read what `to_text` wrote: `right`, then `down`.

    Args:
        text: of a receipt.

    Returns:
        The products.  # shape: (rows + cols, COUNT)

    Raises:
        ValueError: it is something else.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), "<f8").reshape(-1, COUNT)


class StoredProducts(TileProducts):
    """The same of stored entries, with what rounding may come to.

    Args:
        vectors: of the run.  # shape: (P, COUNT)
        rows: of the tile, flat indices.
        cols: likewise.
    """

    def __init__(self, vectors: Vectors, rows: range, cols: range) -> None:
        super().__init__(np, vectors, rows, cols)
        self._sizes = np.zeros(len(rows)), np.zeros(len(cols))  # not squares: these leave float64's range

    def add(self, part: Any, rows: range, cols: range) -> None:
        """Add some of the tile's entries; see `TileProducts.add`."""
        super().add(part, rows, cols)
        of_rows, of_cols = self._sizes
        sizes = np.abs(part)
        of_rows[rows.start - self._rows.start : rows.stop - self._rows.start] += sizes.sum(1)
        of_cols[cols.start - self._cols.start : cols.stop - self._cols.start] += sizes.sum(0)

    @classmethod
    def of(
        cls, rows: range, cols: range, right: Vectors, down: Vectors, sizes: tuple[Vectors, Vectors]
    ) -> "StoredProducts":
        """Take products of entries right of the diagonal that were multiplied elsewhere.

        Args:
            rows: of the entries U, flat indices.
            cols: likewise.
            right: U V.  # shape: (rows, COUNT)
            down: U' V.  # shape: (cols, COUNT)
            sizes: sums of absolute values by row, and by column.

        Returns:
            The products.
        """
        made = cls(np.zeros((0, COUNT)), rows, cols)
        made.right, made.down, made._sizes = right, down, sizes
        return made

    def include(self, part: "StoredProducts") -> None:
        """Add those of a part of the tile.

        Args:
            part: of consecutive rows and columns of it.
        """
        rows = slice(part._rows.start - self._rows.start, part._rows.stop - self._rows.start)
        cols = slice(part._cols.start - self._cols.start, part._cols.stop - self._cols.start)
        self.right[rows] += part.right
        self.down[cols] += part.down
        for sizes, more, where in zip(self._sizes, part._sizes, (rows, cols), strict=True):
            sizes[where] += more

    def fault_of(self, text: str) -> str | None:
        """Return where stored entries are not those that were computed.

        Args:
            text: products of the tile as its receipt has them.

        Returns:
            A clause naming the row or column that is furthest off; None where there is none, or nothing to compare.
        """
        if not text:
            return None
        found = np.concatenate([self.right, self.down])
        try:
            expected = from_text(text)
        except ValueError:
            expected = np.zeros((0, COUNT))
        if found.shape != expected.shape:
            return "its receipt holds no products of its shape"
        rounding = LAST_BITS * FLOAT64.eps * np.concatenate(self._sizes) + FLOAT64.tiny
        gaps = np.abs(found - expected).max(1)
        if (np.isfinite(gaps) & (gaps <= rounding)).all():  # what is infinite has rounding of its own size
            return None
        worst = int(np.argmax(np.nan_to_num(gaps - rounding, nan=np.inf)))
        is_row = worst < len(self._rows)
        index = self._rows[worst] if is_row else self._cols[worst - len(self._rows)]
        return f"its stored entries are not those that were computed: {'row' if is_row else 'column'} {index} is off"
