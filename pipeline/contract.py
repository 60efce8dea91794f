"""The contract of a loss: one function of the parameters, the same every time, a sum over samples.

Everything is evaluated in float64 on the module itself, so that the checks hold for what `torch.func` cannot transform.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline.contexts import random_state, unchanged
from pipeline.culprit import (
    coupling_module,
    drawing_module,
    raising_module,
    remembering_module,
    unsteady_module,
    wrong_module,
)
from pipeline.data import Batch, digest, sample_count, take
from pipeline.errors import ProblemError, in_words
from pipeline.problem import PlacedProblem, Problem
from pipeline.reference import gradient_sum, require_finite
from pipeline.samples import two_parts

PASSES = 5  # of the loss: a random branch may be rare
LOSS_TOLERANCE = 1e-9  # relative, in float64


def check_deterministic(placed: PlacedProblem) -> list[str]:
    """Evaluate loss and gradient several times; compare values, random state and buffers.

    Args:
        placed: the problem on a few samples, in float64.

    Returns:
        Buffers that evaluations change, without effect on the loss.

    Raises:
        ProblemError: values differ, or random numbers are drawn; the message names the module.
    """
    with placed.own_parameters() as own:
        before = {name: digest(b) for name, b in placed.problem.model.named_buffers()}
        for batch in placed.batches(None):
            _check_passes(placed, own, batch)
        return [name for name, b in placed.problem.model.named_buffers() if digest(b) != before[name]]


def _check_passes(placed: PlacedProblem, own: dict[str, nn.Parameter], batch: Batch) -> None:
    """Evaluate a batch several times."""
    values, gradients, states = [], [], set()
    for _ in range(PASSES):
        value, _ = placed.problem.loss_sum(None, batch)
        values.append(float(value.detach()))
        gradients.append(gradient_sum(value, own))
        states.add(digest(random_state()))
    if not np.isfinite(values).all():
        raise ProblemError(
            f"loss: got {values[0]} for {sample_count(batch)} samples, expected a finite number; a mean over targets "
            "that are all ignored is NaN: Return (sum, weight)"
        )
    try:
        require_finite(placed, gradients[0])
    except ProblemError as error:
        raise ProblemError(f"{error}{wrong_module(placed, order=1)}") from None
    if len(states) > 1:  # a seed that is set inside leads to the same state after every pass
        raise ProblemError(
            f"loss: not deterministic, random numbers are drawn{drawing_module(placed, batch)}: a Hessian is of one "
            "function. Call model.eval(), or fix what is drawn"
        )
    spread, scale = max(values) - min(values), max(map(abs, values))
    wander = max(float((g - gradients[0]).abs().max()) for g in gradients)
    steady = spread <= LOSS_TOLERANCE * scale and wander <= LOSS_TOLERANCE * max(float(gradients[0].abs().max()), scale)
    if not steady:  # nor where a later gradient is NaN
        raise ProblemError(
            f"loss: not deterministic ({values[0]:.12g}, then {values[1]:.12g}, then {values[2]:.12g}; gradients "
            f"differ by up to {wander:.3g}){unsteady_module(placed, batch)}: a Hessian is of one function. Call "
            "model.eval(), or keep state out of the forward pass"
        )


def check_without_memory(placed: PlacedProblem, elsewhere: PlacedProblem) -> None:
    """Evaluate at one point, with and without an evaluation at another before.

    Args:
        placed: the problem on a few samples, in float64.
        elsewhere: the same with other parameters.

    Raises:
        ProblemError: the model keeps something from one evaluation to the next, such as a cache that is not renewed.
    """
    model = placed.problem.model
    for batch in placed.batches(None):
        with unchanged(model):
            fresh = _numbers_at(elsewhere, batch)
        with unchanged(model):
            _numbers_at(placed, batch)
            used = _numbers_at(elsewhere, batch)
        if abs(fresh[0] - used[0]) > LOSS_TOLERANCE * max(abs(fresh[0]), abs(used[0])):
            raise ProblemError(
                f"loss: {fresh[0]:.12g} at first, {used[0]:.12g} after an evaluation with other parameters"
                f"{remembering_module(placed, batch)}: a Hessian is of a function of the parameters alone. Compute "
                "anew what depends on them"
            )


def _numbers_at(placed: PlacedProblem, batch: Batch) -> tuple[float, float]:
    """Give sum and weight of a batch, evaluated on the module itself."""
    with torch.enable_grad(), placed.own_parameters():
        return _numbers(placed.problem, batch)


def check_separable(all_data: PlacedProblem, few: PlacedProblem, microbatch: int) -> None:
    """Compare the losses of batches with those of their parts: over all data two uneven ones, for a few every sample.

    Args:
        all_data: the problem in float64.
        few: the same on a few samples.
        microbatch: samples at a time, of all data.

    Raises:
        ProblemError: a loss is not the sum, or mean, of its parts' losses.
    """
    with torch.enable_grad(), all_data.own_parameters():  # a loss may differentiate by itself
        for batch in all_data.batches(microbatch):
            _compare(all_data, batch, two_parts(batch))
    with torch.enable_grad(), few.own_parameters():
        for batch in few.batches(None):
            _compare(few, batch, [take(batch, slice(k, k + 1)) for k in range(sample_count(batch))])


def check_reduction(placed: PlacedProblem, microbatch: int) -> None:
    """Compare what a loss of torch adds up to here with what torch makes of it, on all data.

    Args:
        placed: the problem in float64.
        microbatch: samples at a time.

    Raises:
        ProblemError: it is reduced in a way that is not known here.
    """
    problem, given = placed.problem, placed.problem.as_given()
    if given is None:
        return
    with torch.enable_grad(), placed.own_parameters():
        for batch in placed.batches(microbatch):
            total, weight = _numbers(problem, batch)
            here = total / weight if problem.reduction == "mean" and weight else total
            there, _ = _numbers(given, batch)
            if abs(here - there) > LOSS_TOLERANCE * max(abs(here), abs(there)):
                raise ProblemError(
                    f"loss: its terms over {sample_count(batch)} samples have the {problem.reduction} {here:.9g}, "
                    f"torch gives {there:.9g}: how it is reduced is not known here. Pass a callable (output, target) "
                    "that returns (sum, weight)"
                )


def _compare(placed: PlacedProblem, batch: Batch, parts: Sequence[Batch]) -> None:
    """Refuse a batch whose (sum, weight) is not that of its parts."""
    if len(parts) == 1:
        return
    problem = placed.problem
    whole, weight = _numbers(problem, batch)
    try:
        found = [_numbers(problem, part) for part in parts]
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        place = raising_module(problem.model, error)
        raise ProblemError(
            f"loss: {sample_count(batch)} samples can be evaluated, {sample_count(parts[0])} of them cannot "
            f"({in_words(error)}{place}), and micro-batches are of any size: keep dimension 0 (squeeze() drops it), "
            "call model.eval(), or say separable=False (one batch only)"
        ) from error
    sums, weights = (sum(values) for values in zip(*found, strict=True))
    is_mean = problem.reduction == "mean"
    scale = max(abs(whole), *(abs(part) for part, _ in found)) or 1.0
    gap = abs(whole - sums) / scale
    if is_mean:
        gap = max(gap, abs(weight - weights) / (abs(weight) or 1.0))
    if not gap <= LOSS_TOLERANCE:
        coupling = coupling_module(placed, batch, parts[0])
        raise ProblemError(
            f"loss: (sum, weight) of {sample_count(batch)} samples is ({whole:.9g}, {weight:.9g}), of its "
            f"{len(parts)} parts together ({sums:.9g}, {weights:.9g}): it is not a {problem.reduction} over "
            f"samples{coupling}. Return (sum, weight), say reduction={'sum' if is_mean else 'mean'!r} if that is what "
            "it is, call model.eval(), or say separable=False (one batch only) if samples act on each other"
        )


def _numbers(problem: Problem, batch: Batch) -> tuple[float, float]:
    """Give the sum and weight of a batch."""
    total, weight = problem.loss_sum(None, batch)
    return float(total.detach()), float(weight.detach())
