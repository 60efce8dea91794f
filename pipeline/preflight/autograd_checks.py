"""Autograd against differences: the loss's gradient against the loss's, double backward against the gradient's."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.errors import ProblemError, in_words
from pipeline.planning.parameters import Parameter
from pipeline.preflight.diagnosis import wrong_module
from pipeline.problem.double_backward import Vector, gradient_sum, hessian_vector_products, moved
from pipeline.problem.finite_differences import agreeing, fourth_order
from pipeline.problem.problem import PlacedProblem

TOLERANCE = 1e-6  # relative, where steps agree to a tenth of it; else ten times their gap
CONFIRMED = 1e-9  # relative error of autograd against a single step, which no accident brings about
INCONCLUSIVE = 1e-4  # relative gap between steps beyond which they prove nothing
LOSS_ROUNDING = 1e-4  # of the loss, in units of the tolerance: its last bits over a step
GRADIENT_ROUNDING = 1e-5  # of the gradient, likewise
UNSEEN = 1e-14  # slope of a loss that is zero wherever it is asked: less than it rounds, where its terms are about 1
ALIKE = 1e-2  # of the steepest, parameters whose slopes are compared with it in one
SMALL = 1e-2  # share of the largest block's entry that counts in every block: zero blocks carry its rounding


@dataclass(frozen=True)
class Second:
    """Double backward beside differences of the gradient, along one direction.

    Attributes:
        error: relative, of the worst row parameter; 1 where double backward cannot be taken.
        row: that parameter.
        is_right: whether that is as near as the differences tell.
        reason: what double backward raised; empty where it did not.
    """

    error: float
    row: str
    is_right: bool
    reason: str = ""


def slope_errors(placed: PlacedProblem, each: dict[str, Vector]) -> dict[str, float]:
    """Compare the gradient with differences of the loss along directions, one on each parameter.

    What is right along several at once is right along each: those that are about as steep are taken together, at one
    slope each, and one by one only where that proves nothing or shows an error.

    Args:
        placed: the problem on a few samples, in float64.
        each: directions by parameter, zero elsewhere.  # shape of each: (P,)

    Returns:
        The relative error of the loss's slope, by parameter; none where no three steps of the differences agree.

    Raises:
        ProblemError: they contradict each other; the message names parameter and module.
    """
    loss, gradient = _loss_and_gradient(placed)
    steepness = {name: float(np.linalg.norm(gradient * vector)) for name, vector in each.items()}
    found: dict[str, float] = {}
    for names in _alike(steepness):
        vector = np.sum([each[name] / (steepness[name] or 1.0) for name in names], 0)
        vector /= float(np.linalg.norm(vector)) or 1.0
        error, gap = _slope(placed, vector, loss, gradient)[:2]
        if gap <= INCONCLUSIVE and error <= max(TOLERANCE, 10 * gap):
            found |= dict.fromkeys(names, error)
            continue
        singly = {name: slope_error(placed, placed.layout[name], each[name]) for name in names}
        found |= {name: error for name, error in singly.items() if error is not None}
    return found


def _alike(steepness: dict[str, float]) -> list[list[str]]:
    """Group parameters whose steepnesses are not far apart; those without any are a group."""
    groups: list[list[str]] = []
    for name in sorted(steepness, key=lambda name: -steepness[name]):
        if groups and steepness[name] >= ALIKE * steepness[groups[-1][0]]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def slope_error(placed: PlacedProblem, parameter: Parameter, vector: Vector) -> float | None:
    """Compare the gradient with differences of the loss along a direction on one parameter.

    Where autograd disagrees with the loss (masked lookups of `padding_idx`, straight-through estimators) no engine
    helps.

    Args:
        placed: the problem on a few samples, in float64.
        parameter: which.
        vector: the direction, zero elsewhere.  # shape: (P,)

    Returns:
        The relative error of the loss's slope; None where no three steps of the differences agree.

    Raises:
        ProblemError: they contradict each other; the message names parameter and module.
    """
    error, gap, slope, change = _slope(placed, vector, *_loss_and_gradient(placed))
    if gap > INCONCLUSIVE:
        return None
    if not error <= max(TOLERANCE, 10 * gap):
        raise ProblemError(
            f"loss: its gradient with respect to `{parameter.name}` is {slope:.6g} along a direction in which the "
            f"loss itself changes by {change:.6g}: autograd does not differentiate this loss"
            f"{wrong_module(placed, order=1)}. Lookups at padding_idx, straight-through estimators, .detach(), custom "
            "backward functions, checkpoints with use_reentrant=True and tensors made of parameters before the call do "
            f"this. Change the operation, or leave `{parameter.name}` out with params"
        )
    return error


def _slope(placed: PlacedProblem, vector: Vector, loss: float, gradient: Vector) -> tuple[float, float, float, float]:
    """Return the error of a slope, the gap between the steps that tell, and the slope by the gradient and by them."""
    slope, steepness = float(gradient @ vector), float(np.linalg.norm(gradient * vector))
    least = steepness + LOSS_ROUNDING * abs(loss)

    def error(change: float) -> float:
        return abs(slope - change) / (abs(change) + least or 1.0)

    found = agreeing(
        lambda step: [fourth_order(lambda t: np.array([_loss(moved(placed, t * vector))]), step)],
        lambda parts: [float(np.abs(parts[0]).max()) + least or 1.0],
        is_enough=lambda parts: error(float(parts[0][0])) <= CONFIRMED and loss != 0.0,
    )
    change = float(found.values[0][0])
    if loss == change == 0.0 < steepness < UNSEEN:
        raise ProblemError(
            f"loss: it is 0 to the last bit at these weights and near them, its gradient {steepness:.0e}: what float64 "
            "leaves of a loss that is fitted (a softmax of outputs that are 100 apart, say), of which rounding decides "
            "the second derivatives. Take weights of an earlier step of training"
        )
    return error(change), found.gap, slope, change


def second_error(placed: PlacedProblem, vector: Vector, scales: Vector) -> Second | None:
    """Compare double backward with differences of the gradient along a direction, row parameter by row parameter.

    Args:
        placed: the problem on a few samples, in float64.
        vector: the direction.  # shape: (P,)
        scales: of rows: an error is held against that of its own.  # shape: (P,)

    Returns:
        What was found; None where no three steps of the differences agree.
    """
    sizes, seen, raised = _sizes(placed, scales), [np.inf], ""
    truth: list[Vector] = []
    try:
        product = hessian_vector_products(placed, vector[None], 1.0)[0] / scales
        truth = [product[p.place] for p in placed.layout]
    except (RuntimeError, NotImplementedError) as error:
        raised = in_words(error)

    def errors(parts: list[Vector]) -> list[float]:
        gaps = [np.nan_to_num(np.abs(a - b), nan=np.inf) for a, b in zip(truth, parts, strict=True)]
        return [float(gap.max(initial=0.0)) / size for gap, size in zip(gaps, sizes(parts), strict=True)]

    def is_enough(parts: list[Vector]) -> bool:
        """Confirmed, or right and not getting better: from the kinks of a ReLU on, rounding grows with each step."""
        if raised:
            return False
        seen.append(max(errors(parts)))
        return seen[-1] <= CONFIRMED or min(seen[:-1]) <= min(TOLERANCE, seen[-1])

    found = agreeing(lambda step: _differenced(placed, vector, scales, step), sizes, is_enough=is_enough)
    if found.gap > INCONCLUSIVE:
        return None
    if raised:
        return Second(1.0, placed.layout.names[0], is_right=False, reason=f"raised {raised}")
    worst = max(range(len(truth)), key=(each := errors(found.values)).__getitem__)
    return Second(each[worst], placed.layout.names[worst], is_right=each[worst] <= max(TOLERANCE, 10 * found.gap))


def _differenced(placed: PlacedProblem, vector: Vector, scales: Vector, step: float) -> list[Vector]:
    """Differentiate the scaled gradient along a direction, by one step; give it by row parameter."""
    change = fourth_order(lambda t: _loss_and_gradient(moved(placed, t * vector))[1], step) / scales
    return [change[p.place] for p in placed.layout]


def _sizes(placed: PlacedProblem, scales: Vector) -> Callable[[list[Vector]], list[float]]:
    """Return what the parts of a scaled derivative are held against."""
    rounding = GRADIENT_ROUNDING * float(np.abs(_loss_and_gradient(placed)[1] / scales).max())

    def sizes(parts: list[Vector]) -> list[float]:
        own = [float(np.abs(part).max(initial=0.0)) for part in parts]
        least = SMALL * max(own) + rounding
        return [size + least or 1.0 for size in own]

    return sizes


def _loss(placed: PlacedProblem) -> float:
    """Return the un-normalised loss."""
    with torch.enable_grad(), placed.own_parameters():  # it may differentiate by itself
        return float(sum(float(placed.loss_sum(None, batch)[0].detach()) for batch in placed.batches(None)))


def _loss_and_gradient(placed: PlacedProblem) -> tuple[float, Vector]:
    """Return the un-normalised loss, and its gradient.  # shape: (P,)."""
    total = 0.0
    gradient = torch.zeros(placed.layout.size, dtype=placed.dtype, device=placed.device)
    with torch.enable_grad(), placed.own_parameters() as own:
        for batch in placed.batches(None):
            value, _ = placed.loss_sum(None, batch)
            gradient += gradient_sum(value, own)
            total += float(value.detach())
    return total, gradient.cpu().numpy()
