"""Derivatives by differences: a value counts where two neighbouring steps agree on it."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

# In the order in which they are tried, as lengths in parameter space. At the kinks of a ReLU only small steps agree,
# with single-precision casts inside a model only large ones.
STEPS = (1e-3, 2.5e-4, 6e-5, 1.5e-5, 4e-6, 1e-6, 2.5e-7, 6e-8, 1e-2, 4e-2)
AGREED = 1e-7  # relative gap between two steps at which no further one is tried


@dataclass
class Differences:
    """A derivative by differences, piece by piece.

    Attributes:
        values: of each piece, at the step that agrees best with a neighbour.
        gaps: how far these two are apart, relative to the piece's scale.
    """

    values: list[Vector]
    gaps: list[float]


def agreeing(pieces: Callable[[float], list[Vector]], scale: Callable[[list[Vector]], list[float]]) -> Differences:
    """Try steps until two neighbours agree on every piece.

    Args:
        pieces: the derivative by one step, cut into pieces that are judged apart.
        scale: of each piece, given a derivative; a gap counts relative to it.

    Returns:
        The best values. Whether their gaps are small enough is the caller's to say.
    """
    tried: dict[float, list[Vector]] = {}
    best = Differences([], [])
    for step in STEPS:
        tried[step] = pieces(step)
        for near, far in pairwise(sorted(tried)):
            if step in {near, far}:
                _improve(best, tried[near], tried[far], scale(tried[near]))
        if best.gaps and max(best.gaps) <= AGREED:
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


def _improve(best: Differences, near: list[Vector], far: list[Vector], scales: list[float]) -> None:
    """Take over the pieces on which two steps agree better than any two before."""
    if not best.gaps:
        best.values, best.gaps = list(near), [float("inf")] * len(near)
    for k, (a, b, scale) in enumerate(zip(near, far, scales, strict=True)):
        gap = float(np.abs(a - b).max(initial=0.0)) / scale
        if gap < best.gaps[k]:
            best.values[k], best.gaps[k] = a, gap
