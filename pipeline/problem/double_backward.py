"""Plain autograd on the module itself, in float64: what runs are judged by. Shares nothing with the engines.

The module's own parameters are used, without torch.func; the graph is freed after every batch.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd import grad

from pipeline.errors import ProblemError
from pipeline.planning.evaluation import LossAndGradient
from pipeline.problem.batches import dense
from pipeline.problem.contexts import exact_kernels, unchanged
from pipeline.problem.finite_differences import STEPS, Differences, agreeing, fourth_order
from pipeline.problem.problem import PlacedProblem, Problem

Vector = npt.NDArray[np.float64]

FEWEST_SAMPLES, MOST_SAMPLES = 32, 1024
SMALL = 1e-2  # share of the largest piece's entry that counts in every piece


def reference_samples(microbatch: int | None) -> int:
    """Return how many samples to evaluate at a time, here and wherever a loss is evaluated over all data.

    Args:
        microbatch: of the run, as far as it is known; an engine holds each of its samples for many rows.

    Returns:
        The number.
    """
    return min(max(microbatch or MOST_SAMPLES, FEWEST_SAMPLES), MOST_SAMPLES)


def loss_and_gradient(placed: PlacedProblem, microbatch: int | None = None) -> LossAndGradient:
    """Evaluate loss and gradient over all data.

    Args:
        placed: the problem, usually in float64.
        microbatch: samples at a time.

    Returns:
        Loss, gradient and total weight.

    Raises:
        ProblemError: the loss is not finite, does not depend on any selected parameter through differentiable
            operations, has no positive weight, or has a weight that depends on the parameters.
    """
    problem = placed.problem
    total, weight = 0.0, 0.0
    gradient = torch.zeros(problem.layout.size, dtype=placed.dtype, device=placed.device)
    with torch.enable_grad(), placed.own_parameters() as own:
        for batch in placed.batches(microbatch):
            value, batch_weight = placed.loss_sum(None, batch)
            if batch_weight.requires_grad:
                raise ProblemError("loss: the weight depends on the parameters; only the sum may")
            gradient += gradient_sum(value, own)
            total += float(value.detach())
            weight += float(batch_weight)
    weight = weight if problem.reduction == "mean" else 1.0
    if not weight > 0:
        raise ProblemError(f"loss: the weights of all batches sum to {weight}, expected a positive number")
    theta = _flat(tuple(placed.parameters.values()))
    loss = total / weight + 0.5 * problem.l2 * float(theta @ theta)
    if not np.isfinite(loss):
        raise ProblemError(f"loss: got {loss} over the data, expected a finite number")
    require_finite(placed, gradient)
    return LossAndGradient(loss, _numpy(gradient / weight + problem.l2 * theta), weight)


def evaluate(problem: Problem, microbatch: int) -> LossAndGradient:
    """Evaluate loss and gradient in float64, and the fingerprint's total weight; see `loss_and_gradient`."""
    with exact_kernels(problem.model), unchanged(*problem.modules):
        return loss_and_gradient(problem.place(torch.float64), microbatch)


def gradient_sum(value: Tensor, own: dict[str, nn.Parameter]) -> Tensor:
    """Differentiate an un-normalised loss with respect to the module's own parameters.

    Args:
        value: the loss.
        own: the selected parameters, by name.

    Returns:
        The gradient.  # shape: (P,)

    Raises:
        ProblemError: the loss does not depend on them.
    """
    if not value.requires_grad:
        raise ProblemError(
            "loss: does not depend on the selected parameters through differentiable operations; "
            "look for .detach(), .item(), torch.no_grad() or integer results on the way"
        )
    return _flat(grad(value, list(own.values()), materialize_grads=True))


def require_finite(placed: PlacedProblem, gradient: Tensor) -> None:
    """Refuse a gradient that is not finite, naming the parameter.

    Args:
        placed: the problem.
        gradient: of its loss.  # shape: (P,)

    Raises:
        ProblemError: an entry is NaN or infinite.
    """
    for p in placed.layout:
        if not bool(gradient[p.place].isfinite().all()):
            raise ProblemError(
                f"loss: its gradient with respect to `{p.name}` is NaN or infinite: look for sqrt, norm, log or a "
                "division at zero, and for torch.where over a branch that is not finite"
            )


def hessian_vector_products(
    placed: PlacedProblem, vectors: Vector, weight: float, microbatch: int | None = None
) -> Vector:
    """Multiply H with vectors by plain double backward.

    Args:
        placed: the problem, usually in float64.
        vectors: one a row.  # shape: (k, P)
        weight: the total weight, as `loss_and_gradient` gives it.
        microbatch: samples at a time.

    Returns:
        The products.  # shape: (k, P)
    """
    directions = torch.from_numpy(vectors).to(placed.device, placed.dtype)
    products = torch.zeros_like(directions)
    with torch.enable_grad(), placed.own_parameters() as own:
        theta = list(own.values())
        for batch in placed.batches(microbatch):
            value, _ = placed.loss_sum(None, batch)
            gradient = grad(value, theta, create_graph=True, materialize_grads=True)
            flat = _flat(gradient)
            if not flat.requires_grad:
                continue
            for k, direction in enumerate(directions):
                products[k] += _flat(grad(flat @ direction, theta, retain_graph=True, materialize_grads=True))
    return _numpy(products / weight + placed.problem.l2 * directions)


def differenced_products(
    placed: PlacedProblem, vectors: Vector, scales: Vector, microbatch: int | None, largest: float = max(STEPS)
) -> tuple[Vector, Vector]:
    """Multiply H with vectors by central differences of the gradient.

        H v = (8 (g(+h) - g(-h)) - (g(+2h) - g(-2h))) / 12 h,        g(t) = dL / dtheta at theta + t v

    The steps are those that agree best, row parameter by row parameter: see `differences.agreeing`.

    Args:
        placed: the problem, usually in float64.
        vectors: one a row.  # shape: (k, P)
        scales: of rows, in which steps are to agree.  # shape: (P,)
        microbatch: samples at a time.
        largest: step that is tried.

    Returns:
        The products, exact up to rounding (gradient's last bit over h) and O(h^4), and how far steps that are next to
        each other are apart, relative to the largest of a row parameter's scaled entries.  # shapes: (k, P), (k, rows)
    """
    products, gaps = np.zeros_like(vectors), np.zeros((len(vectors), len(placed.layout)))
    for k, vector in enumerate(vectors):
        found = _differenced(placed, vector / max(float(np.linalg.norm(vector)), 1e-300), scales, microbatch, largest)
        products[k] = np.concatenate(found.values) * scales * np.linalg.norm(vector)
        gaps[k] = found.gaps
    return products, gaps


def _differenced(
    placed: PlacedProblem, vector: Vector, scales: Vector, microbatch: int | None, largest: float
) -> Differences:
    """Differentiate the scaled gradient along a direction of length one."""

    def scaled_gradient(t: float) -> Vector:
        return loss_and_gradient(moved(placed, t * vector), microbatch).gradient / scales

    return agreeing(lambda step: by_parameter(placed, fourth_order(scaled_gradient, step)), own_sizes, largest)


def by_parameter(placed: PlacedProblem, vector: Vector) -> list[Vector]:
    """Cut a vector at parameter borders.  # shape: (P,)."""
    return [vector[p.place] for p in placed.layout]


def own_sizes(pieces: list[Vector]) -> list[float]:
    """Hold each piece against its own largest entry, or a share of the largest of all, whose rounding it carries."""
    sizes = [float(np.abs(piece).max(initial=0.0)) for piece in pieces]
    return [size + SMALL * max(sizes) or 1.0 for size in sizes]


def jittered(placed: PlacedProblem, seed: int = 0) -> PlacedProblem:
    """Return a problem of which some selected weights are moved by their last bit: what that changes is rounding.

    Args:
        placed: the problem.
        seed: of which.

    Returns:
        The problem, moved.
    """
    generator = torch.Generator().manual_seed(seed)
    last_bit = torch.finfo(placed.dtype).eps
    parameters = {
        name: t * (1 + last_bit * (torch.rand(t.shape, generator=generator) > 0.5).to(t))
        for name, t in placed.parameters.items()
    }
    return placed.at(parameters)


def moved(placed: PlacedProblem, shift: Vector) -> PlacedProblem:
    """Return a problem whose selected parameters are shifted.  # shape of shift: (P,)."""
    flat = torch.from_numpy(np.ascontiguousarray(shift)).to(placed.device, placed.dtype)
    parameters = {p.name: placed.parameters[p.name] + flat[p.place].reshape(p.shape) for p in placed.layout}
    return placed.at(parameters)


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([dense(t).reshape(-1) for t in tensors])


def _numpy(tensor: Tensor) -> Vector:
    return tensor.detach().to("cpu", torch.float64).numpy()
