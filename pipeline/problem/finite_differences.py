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
        gaps: how far neighbouring steps are apart, relative to the piece's scale.
    """

    values: list[Vector]
    gaps: list[float]

    @property
    def gap(self) -> float:
        """The largest of the gaps."""
        return max(self.gaps, default=0.0)


def agreeing(
    pieces: Callable[[float], list[Vector]],
    scales: Callable[[list[Vector]], list[float]],
    largest: float = max(STEPS),
    is_enough: Callable[[list[Vector]], bool] = lambda _: False,
) -> Differences:
    """Try steps until three neighbours agree; two may agree by accident where there is noise.

    Args:
        pieces: the derivative by one step, in pieces that are judged apart: one may need other steps than another.
        scales: of the pieces of a derivative; a gap counts relative to its piece's.
        largest: step that is tried: far away, steps may agree on something else.
        is_enough: asked of each step's derivative, whether it tells by itself, by what it is held against.

    Returns:
        Of each piece the value at the middle one of the three steps that agree best. Whether that is enough is the
        caller's to say.
    """
    tried: dict[float, list[Vector]] = {}
    best = Differences([], [])
    for step in (s for s in STEPS if s <= largest):
        tried[step] = pieces(step)
        if is_enough(tried[step]):
            return Differences(tried[step], [0.0] * len(tried[step]))
        steps = sorted(tried)
        for window in zip(steps, steps[1:], steps[2:], strict=False):
            middle = tried[window[1]]
            gaps = _gaps([tried[s] for s in window], scales(middle))
            best = _better(best, Differences(middle, gaps)) if best.values else Differences(middle, gaps)
        if best.values and best.gap <= AGREED:
            break
    return best


def _better(one: Differences, other: Differences) -> Differences:
    """Take of each piece the one whose steps agree better."""
    pairs = list(zip(one.values, one.gaps, other.values, other.gaps, strict=True))
    return Differences([v if g <= h else w for v, g, w, h in pairs], [min(g, h) for _, g, _, h in pairs])


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


def _gaps(window: list[list[Vector]], scales: list[float]) -> list[float]:
    """Return the largest step from one derivative to the next, piece by piece; infinite where one is NaN."""
    found = []
    for k, scale in enumerate(scales):
        steps = [np.abs(d[k] - e[k]).max(initial=0.0) / scale for d, e in pairwise(window)]
        found.append(float(np.nan_to_num(steps, nan=np.inf).max()))
    return found
