"""Two or more Hessians of the same parameters, held against the first: other weights, other types, other losses."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg

from pipeline.analysis.hessian import Hessian
from pipeline.analysis.one_pass import Totals
from pipeline.analysis.view import Piece
from pipeline.errors import IncompleteError, SpecError
from pipeline.progress import Reporter

SUBSPACE = 10  # eigenvectors, the largest in absolute value
VECTORS_TOLERANCE = 1e-6

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """How far one Hessian is from the first.

    Attributes:
        url: of it.
        loss: of it.
        trace: of it.
        norm: Frobenius norm of it.
        distance: Frobenius norm of the difference.
        cosine: of the angle between the two matrices, as vectors.
        blocks: Frobenius norm of each block of the difference.  # shape: (parameters, parameters)
        relative: the same, in units of the first one's block; NaN where that is zero.  # shape: as `blocks`
        eigenvalues: the largest in absolute value, descending in it.  # shape: (k,)
        angles: principal angles between their vectors' space and the first one's, in degrees, ascending.  # shape: (k,)
    """

    url: str
    loss: float
    trace: float
    norm: float
    distance: float
    cosine: float
    blocks: Vector
    relative: Vector
    eigenvalues: Vector
    angles: Vector

    @property
    def overlap(self) -> float:
        """What the two spaces share: the mean of the squared cosines, 1 for the same, k / P for random ones."""
        return float(np.square(np.cos(np.radians(self.angles))).mean())


@dataclass(frozen=True)
class Comparison:
    """Hessians held against the first.

    Attributes:
        names: of the parameters.
        differences: of each from the first, itself included.
    """

    names: tuple[str, ...]
    differences: tuple[Difference, ...]

    def moved(self) -> list[tuple[str, list[float]]]:
        """Return how far each parameter's own block moved, relative to the first, the furthest first.

        Returns:
            Names, and a number for each Hessian but the first; NaN where the first one's block is zero.
        """
        found = [(n, [float(d.relative[k, k]) for d in self.differences[1:]]) for k, n in enumerate(self.names)]
        return sorted(found, key=lambda row: -np.nan_to_num(max(row[1], default=0.0)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; None where there is no number."""
        return {
            "parameters": list(self.names),
            "hessians": [
                {
                    "url": d.url,
                    "loss": d.loss,
                    "trace": d.trace,
                    "norm": d.norm,
                    "distance": d.distance,
                    "cosine": d.cosine,
                    "overlap": d.overlap,
                    "angles": d.angles.tolist(),
                    "eigenvalues": d.eigenvalues.tolist(),
                    "blocks": d.blocks.tolist(),
                    "moved": {n: _or_none(d.relative[k, k]) for k, n in enumerate(self.names)},
                }
                for d in self.differences
            ],
        }


def compare(hessians: Sequence[Hessian]) -> Comparison:
    """Hold Hessians against the first: one read of both for each, and the iterations that find outermost eigenvectors.

    Args:
        hessians: at least two, complete, of the same parameters.

    Returns:
        Distances by block, and how far the top eigenspaces agree.

    Raises:
        SpecError: there is only one, or parameters differ.
        IncompleteError: one does not hold all of H.
    """
    if len(hessians) < 2:
        raise SpecError(f"compare: got {len(hessians)} Hessian, expected two or more")
    first = hessians[0]
    for other in hessians:
        _require_comparable(first, other)
    k = min(SUBSPACE, first.shape[0])
    pairs = [other.eigsh(k, "LM", tol=VECTORS_TOLERANCE) for other in hessians]
    found = (_difference(first, other, pairs[0][1], pair) for other, pair in zip(hessians, pairs, strict=True))
    return Comparison(first.parameters.names, tuple(found))


def _require_comparable(first: Hessian, other: Hessian) -> None:
    """Refuse what cannot be subtracted."""
    if not other.is_complete:
        raise IncompleteError(f"{other.url} does not hold all of H: the run selected blocks={other.manifest.blocks!r}")
    mine, theirs = first.parameters.to_json(), other.parameters.to_json()
    if mine != theirs:
        differing = next(b or a for a, b in zip_longest(mine, theirs) if a != b)
        raise SpecError(
            f"compare: {other.url} is of other parameters than {first.url} (`{differing['name']}`, "
            f"{differing['shape']}), expected the same names and shapes"
        )


def _difference(first: Hessian, other: Hessian, U: Vector, pair: tuple[Vector, Vector]) -> Difference:
    totals, product = Totals(first.parameters), first.norm() ** 2
    if other is not first:
        product = 0.0
        for mine, theirs in _both(first, other):
            a, b = mine.values.astype(np.float64), theirs.astype(np.float64)
            product += (1 if mine.is_diagonal else 2) * float(np.vdot(a, b))
            totals.add(totals.sums_of(Piece(mine.rows, mine.cols, a - b)))
    own = _blocks(first)
    blocks = np.sqrt(totals.blocks)
    w, V = pair
    norms = first.norm() * other.norm()
    return Difference(
        other.url,
        other.loss,
        other.trace(),
        other.norm(),
        float(np.sqrt(totals.squares.sum())),
        min(product / norms, 1.0) if norms else float("nan"),
        blocks,
        np.divide(blocks, own, out=np.full_like(blocks, np.nan), where=own > 0),
        w[np.argsort(-np.abs(w))],
        np.degrees(np.sort(scipy.linalg.subspace_angles(U, V))),
    )


def _both(first: Hessian, other: Hessian) -> Iterator[tuple[Piece, npt.NDArray[Any]]]:
    """Read two matrices side by side, whatever chunks the second is stored in."""
    other = copy(other)
    other.report = Reporter()  # one bar is enough
    if first.manifest.chunk == other.manifest.chunk:
        for a, b in zip(first.pieces(), other.pieces(), strict=True):
            yield a, b.values
        return
    for piece in first.pieces():
        rows, cols = (np.arange(place.start, place.stop) for place in (piece.rows, piece.cols))
        yield piece, other.entries(rows, cols)


def _blocks(hessian: Hessian) -> Vector:
    """Return the Frobenius norm of each block.  # shape: (parameters, parameters)."""
    norms, names = hessian.block_norms(), hessian.parameters.names
    return np.array([[norms[a, b] for b in names] for a in names])


def _or_none(value: float) -> float | None:
    """Return what JSON has for a number, or for none."""
    return float(value) if np.isfinite(value) else None
