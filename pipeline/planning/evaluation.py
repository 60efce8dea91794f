"""What a loss evaluates to at the weights."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class LossAndGradient:
    """A loss over the whole data set, L2 term included.

    Attributes:
        loss: L.
        gradient: dL / dtheta.  # shape: (P,)
        weight: what un-normalised sums are divided by; 1 for a sum.
    """

    loss: float
    gradient: npt.NDArray[np.float64]
    weight: float
