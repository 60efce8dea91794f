"""Scales of rows and columns: what an entry of H is held against, besides the largest of its block.

Features have sizes of their own, and so have the rows and columns that they make: an entry may be wrong by all of
itself and pass where its block holds others that are 1e8 times larger. With s such that the rows of H_ij / (s_i s_j)
are of one length, errors are judged in those coordinates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.planning.parameters import ParameterLayout

Vector = npt.NDArray[np.float64]
Products = Callable[[Vector], Vector]  # from vectors, one a row, to H times them  # shape: (k, P) to (k, P)

SWEEPS = 4  # each halves the exponents of what is left: ranges of 1e8 come to 3
LEAST = 1e-9  # of the largest scale: rows below are zeros, or rounding
TINY = 2e-7  # of the largest scale: below, last bits of float64 are no longer small
STEEPEST = 1e-3  # of the largest scale, in directions of differences: along smaller ones they would go too far
FLOORED = 1e-2  # of the largest scale, in directions that measure rounding: zeros would be blown up by it
# Directions along which rounding is measured, in each of several ways: what a row has of a single sample, that the
# network is all but sure of, is rounded in one way ten times as much as in another.
MEASURED = 2
NOTHING_ELSE = {"float64": 1e-9, "float32": 1e-6}  # relative rounding, above which a row is hardly anything but that
LITTLE = 0.5  # of that, rounding that is let pass in any case
NOISE = 16  # times the rounding that is measured excuses as much,
DROWNED = {"float64": 1e-9, "float32": 4e-5}  # rounding over its scale, above which a row is held against larger ones
LAST_BITS = 64  # of the largest entry, in float64: below, two right ways to sum differ
MOST_NOISE = {"float64": 1e-4, "float32": 5e-4}  # but never more than this, in scaled coordinates: low precision
# inside a model is no excuse, a model that float32 is little enough for is one


@dataclass(frozen=True)
class Yardstick:
    """What errors of products with H are held against, row by row.

    Attributes:
        scales: s, positive.  # shape: (P,)
        rounding: that is let pass, of a product with a direction of `directions`, over s.  # shape: (P,)
        equilibrated: s before those of zeros were raised.  # shape: (P,)
    """

    scales: Vector
    rounding: Vector
    equilibrated: Vector

    def directions(self, random: np.random.Generator, count: int) -> Vector:
        """Draw directions in the scaled coordinates; see `directions`.  # shape: (count, P)."""
        return np.stack([directions(random, self.scales) for _ in range(count)])

    def errors(self, found: Vector, truth: Vector, tolerance: float) -> Vector:
        """Hold products against the truth.

        Args:
            found: products.  # shape: (k, P)
            truth: likewise.
            tolerance: that they are going to be held against; rounding is let pass beside it.

        Returns:
            Errors over their scales, infinite where a product is no number.  # shape: (k, P)
        """
        scaled = np.abs(found - truth) / self.scales / np.maximum(1.0, self.rounding / tolerance)
        return np.asarray(np.nan_to_num(scaled, nan=np.inf))


def yardstick(
    layout: ParameterLayout,
    multiply: Products,
    others: Sequence[Products],
    dtype: str,
    random: np.random.Generator,
    most_noise: float | None = None,
    equilibrated: Vector | None = None,
) -> Yardstick:
    """Find the scales of rows and columns, and the rounding that is no error.

    Zeros (a bias before a normalisation) carry the rounding of larger entries: their scales are raised to where it is
    below a few last bits, as far as that is no more than the largest of all.

    Args:
        layout: of rows and columns.
        multiply: by H.
        others: the same, rounded otherwise, as the run does.
        dtype: of the run, "float32" or "float64".
        random: generator of directions.
        most_noise: rounding that is excused at most, over its scale; `MOST_NOISE` when None.
        equilibrated: of another measure of the same H, where there is one.

    Returns:
        The yardstick.
    """
    least, last_bit = NOTHING_ELSE[dtype], float(np.finfo(dtype).eps)
    if equilibrated is None:
        equilibrated = equilibrate(lambda v: multiply(v[None])[0], layout.size, random)
    scales, largest = equilibrated, equilibrated.max(initial=0.0)

    def rounding(widths: Vector) -> Vector:
        along = np.stack([directions(random, widths) for _ in range(MEASURED)])
        truth = multiply(along)
        return np.asarray(np.max([np.abs(other(along) - truth).max(0) for other in others], axis=0))

    found = rounding(_floored(scales, FLOORED))
    zeros = (found > 10 * least * scales) | (scales < TINY * largest)
    found = _pooled(layout, found, scales, zeros)
    scales = np.maximum(scales, np.minimum(found / least, largest))
    # Zeros against zeros carry last bits of what cancels there, over the product of two small scales.
    least_of_all = largest * min(1.0, (last_bit / least) ** 0.5)
    scales[zeros] = np.maximum(scales[zeros], least_of_all)
    # Along directions of these scales, whose rounding of small columns shows in all rows.
    again = _pooled(layout, rounding(scales), scales, zeros)
    drowned = again > DROWNED[dtype] * scales
    if drowned.any():  # by last bits of larger rows: to be held against these like zeros
        zeros |= drowned
        scales[zeros] = np.maximum(scales[zeros], least_of_all)
        again = _pooled(layout, rounding(scales), scales, zeros)
    measured = NOISE * np.maximum(np.maximum(found, again) / scales, LITTLE * least)
    if dtype == "float64":
        lengths = float(np.linalg.norm(1 / scales)) * largest**2
        measured = np.maximum(measured, LAST_BITS * last_bit * lengths / scales)
    most = MOST_NOISE[dtype] if most_noise is None else most_noise
    return Yardstick(scales, np.minimum(measured, most), equilibrated)


def _pooled(layout: ParameterLayout, rounding: Vector, scales: Vector, zeros: npt.NDArray[np.bool_]) -> Vector:
    """Take no row for finer than most of its parameter are: one may be exact by chance."""
    pooled = rounding.copy()
    for p in layout:
        own, noisy, size = pooled[p.place], zeros[p.place], scales[p.place]
        if not noisy.all():
            own[~noisy] = np.maximum(own[~noisy], size[~noisy] * np.median((own / size)[~noisy]))
        own[noisy] = own[noisy].max(initial=0.0)
    return pooled


def equilibrate(multiply: Callable[[Vector], Vector], size: int, random: np.random.Generator) -> Vector:
    """Estimate s such that the rows of H_ij / (s_i s_j) have length one, from products with H alone.

    s is the fixed point of s_i = |(H S^-1 u)_i|, u random, approached by geometric means; after Bradley and Murray,
    "Matrix-free approximate equilibration" (2011).

    Args:
        multiply: from a vector to H times it.  # shape: (P,) to (P,)
        size: P.
        random: generator of directions.

    Returns:
        The scales, all positive.  # shape: (P,)
    """
    scales = np.ones(size)
    for _ in range(SWEEPS):
        scales = _floored(np.sqrt(scales * np.abs(multiply(directions(random, scales)))), LEAST)
    return scales


def directions(random: np.random.Generator, scales: Vector) -> Vector:
    """Draw a direction in which each entry has its own weight: between 0.5 and 1.5 in the scaled coordinates.

    Continuous, so that errors of a pattern do not cancel, as they may under signs; away from zero, so that none is
    missed.

    Args:
        random: generator.
        scales: of columns.  # shape: (P,)

    Returns:
        The direction.  # shape: (P,)
    """
    return random.choice((-1.0, 1.0), len(scales)) * random.uniform(0.5, 1.5, len(scales)) / scales


def _floored(scales: Vector, share: float) -> Vector:
    """Keep scales from being less than a share of the largest; all are 1 where all are 0."""
    largest = float(scales.max(initial=0.0))
    return np.maximum(scales, share * largest) if largest > 0 and np.isfinite(largest) else np.ones_like(scales)
