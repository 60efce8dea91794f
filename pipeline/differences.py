"""Derivatives by differences: a value counts where neighbouring steps agree on it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

# In the order in which they are tried, as lengths in parameter space. At the kinks of a ReLU only small steps agree,
# with single-precision casts inside a model only large ones.
STEPS = (1e-3, 2.5e-4, 6e-5, 1.5e-5, 4e-6, 1e-6, 2.5e-7, 6e-8, 5e-2, 2.5e-2, 1.2e-2)
AGREED = 1e-7  # relative gap at which no further step is tried


@dataclass(frozen=True)
class Differences:
    """A derivative by differences, in pieces.

    Attributes:
        values: of each piece.
        gap: how far neighbouring steps are apart, relative to the piece's scale, in the worst piece.
    """

    values: list[Vector]
    gap: float


def agreeing(pieces: Callable[[float], list[Vector]], scales: Callable[[list[Vector]], list[float]]) -> Differences:
    """Try steps until three neighbours agree; two may agree by accident where there is noise.

    Args:
        pieces: the derivative by one step, cut into pieces that are judged apart.
        scales: of the pieces of a derivative; a gap counts relative to its piece's.

    Returns:
        The values at the middle one of the three steps that agree best. Whether that is enough is the caller's to say.
    """
    tried: dict[float, list[Vector]] = {}
    best = Differences([], float("inf"))
    for step in STEPS:
        tried[step] = pieces(step)
        steps = sorted(tried)
        for window in zip(steps, steps[1:], steps[2:], strict=False):
            middle = tried[window[1]]
            gap = _gap([tried[s] for s in window], scales(middle))
            if gap < best.gap or not best.values:
                best = Differences(middle, gap)
        if best.gap <= AGREED:
            break
    return best


def fourth_order(function: Callable[[float], Vector], step: float) -> Vector:
    """Differentiate at 0 by central differences: f'(0) + O(step^4).

    Args:
        function: f(t).
        step: h of the nodes -2h, -h, h, 2h.

    Returns:
        The derivative, in the shape of the function's values.
    """
    near, far = function(step) - function(-step), function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def _gap(window: list[list[Vector]], scales: list[float]) -> float:
    """Give the largest step from one derivative to the next, over all pieces; infinite where one is NaN."""
    pairs = [(a, b, s) for d, e in pairwise(window) for a, b, s in zip(d, e, scales, strict=True)]
    gaps = [np.abs(a - b).max(initial=0.0) / scale for a, b, scale in pairs]
    return float(np.nan_to_num(gaps, nan=np.inf).max())
