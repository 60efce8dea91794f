"""Autograd against differences: the gradient against the loss's, double backward against the gradient's."""

import numpy as np
import torch

from pipeline.culprit import wrong_module
from pipeline.differences import agreeing, fourth_order
from pipeline.errors import ProblemError
from pipeline.layout import Parameter
from pipeline.problem import PlacedProblem
from pipeline.reference import Vector, gradient_sum, hessian_vector_products, moved

TOLERANCE = 1e-6  # relative, where steps agree to a tenth of it; else ten times their gap
INCONCLUSIVE = 1e-4  # relative gap between steps beyond which they prove nothing
LOSS_ROUNDING = 1e-4  # of the loss, in units of the tolerance: its last bits over a step
GRADIENT_ROUNDING = 1e-5  # of the gradient, likewise
SMALL = 1e-2  # share of the largest block's entry that counts in every block: zero blocks carry its rounding


def derivative_errors(placed: PlacedProblem, parameter: Parameter, vector: Vector) -> tuple[float, float] | None:
    """Compare autograd with differences along a dense random direction on one parameter.

    Where autograd disagrees with the loss (masked lookups of `padding_idx`, straight-through estimators) or double
    backward with the gradient, no engine helps.

    Args:
        placed: the problem on a few samples, in float64.
        parameter: which.
        vector: the direction, zero elsewhere.  # shape: (P,)

    Returns:
        The relative errors of the loss's slope and of H v, the latter by its worst row parameter; None where no three
        steps of the differences agree.

    Raises:
        ProblemError: they contradict each other; the message names parameters and module.
    """
    at = _loss_and_gradient(placed)
    loss, gradient = float(at[0]), at[1:]
    own = gradient[parameter.place]
    steepness = float(np.linalg.norm(own)) / parameter.size**0.5 + LOSS_ROUNDING * abs(loss)

    def scales(parts: list[Vector]) -> list[float]:
        sizes = [float(np.abs(part).max(initial=0.0)) for part in parts]
        least = SMALL * max(sizes[1:]) + GRADIENT_ROUNDING * float(np.abs(gradient).max())
        return [sizes[0] + steepness or 1.0, *(size + least or 1.0 for size in sizes[1:])]

    def line(t: float) -> Vector:
        return _loss_and_gradient(moved(placed, t * vector))

    found = agreeing(lambda step: _parts(placed, fourth_order(line, step)), scales)
    product = hessian_vector_products(placed, vector[None], 1.0, None)[0]
    truth = _parts(placed, np.concatenate([[float(gradient @ vector)], product]))
    errors = [
        float(np.abs(a - b).max(initial=0.0)) / scale
        for a, b, scale in zip(truth, found.values, scales(found.values), strict=True)
    ]
    if found.gap > INCONCLUSIVE:
        return None
    if not max(errors) <= max(TOLERANCE, 10 * found.gap):
        _refuse(placed, parameter, errors, float(truth[0][0]), float(found.values[0][0]))
    return errors[0], max(errors[1:])


def _loss_and_gradient(placed: PlacedProblem) -> Vector:
    """Give the un-normalised loss, and its gradient behind it.  # shape: (1 + P,)."""
    total = torch.zeros(1 + placed.layout.size, dtype=placed.dtype, device=placed.device)
    with placed.own_parameters() as own:
        for batch in placed.batches(None):
            value, _ = placed.problem.loss_sum(None, batch)
            total[1:] += gradient_sum(value, own)
            total[0] += value.detach()
    return total.cpu().numpy()


def _parts(placed: PlacedProblem, joined: Vector) -> list[Vector]:
    """Cut the derivative of loss and gradient into slope and row parameters."""
    return [joined[:1], *(joined[1 + p.span.start : 1 + p.span.stop] for p in placed.layout)]


def _refuse(placed: PlacedProblem, parameter: Parameter, errors: list[float], slope: float, change: float) -> None:
    """Say what contradicts what."""
    remedy = f"Change the operation, or leave `{parameter.name}` out with params"
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    if errors[0] > TOLERANCE or worst == 0:
        raise ProblemError(
            f"loss: its gradient with respect to `{parameter.name}` is {slope:.6g} along a direction in which the "
            f"loss itself changes by {change:.6g}: autograd does not differentiate this loss"
            f"{wrong_module(placed, order=1)}. Lookups at padding_idx, straight-through estimators, .detach() and "
            f"custom backward functions do this. {remedy}"
        )
    row = list(placed.layout)[worst - 1]
    raise ProblemError(
        f"loss: its second derivatives H[{row.name}, {parameter.name}] by double backward are off by "
        f"{errors[worst]:.1e} from differences of the gradient{wrong_module(placed, order=2)}. No engine can help. "
        f"{remedy}"
    )
