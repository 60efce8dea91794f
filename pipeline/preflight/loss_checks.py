"""The contract of a loss: one function of the parameters, the same every time, a sum over samples.

Everything is evaluated in float64 on the module itself, so that the checks hold for what `torch.func` cannot transform.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from pipeline.errors import ProblemError
from pipeline.preflight.diagnosis import (
    coupling_module,
    drawing_module,
    remembering_module,
    unsteady_module,
    wrong_module,
)
from pipeline.preflight.trial_point import two_parts
from pipeline.problem.batches import Batch, digest, is_cuttable, nan_report, sample_count, take
from pipeline.problem.contexts import random_digest, unchanged
from pipeline.problem.double_backward import gradient_sum, require_finite
from pipeline.problem.problem import PlacedProblem
from pipeline.problem.written_out import REMEDIES

PASSES = 5  # of the loss: a random branch may be rare
LOSS_TOLERANCE = 1e-9  # relative, in float64
ELSEWHERE = 6  # times, parameters' entries in another order, or of other sign, at which a weight is the same


def check_deterministic(placed: PlacedProblem) -> list[str]:
    """Evaluate loss and gradient several times; compare values, random state and buffers.

    Args:
        placed: the problem on a few samples, in float64.

    Returns:
        Buffers that evaluations change, without effect on the loss.

    Raises:
        ProblemError: values differ, or random numbers are drawn; the message names the module.
    """
    placed = replace(placed, problem=placed.problem.remembering())
    with placed.own_parameters() as own:
        values = {name: digest(p) for name, p in placed.problem.model.named_parameters()}
        before = {name: digest(b) for name, b in placed.problem.model.named_buffers()}
        for batch in placed.batches(None):
            _check_passes(placed, own, batch)
        if changed := [n for n, p in placed.problem.model.named_parameters() if digest(p) != values.get(n)]:
            raise ProblemError(
                f"loss: evaluating it changes the parameter `{changed[0]}` itself (an embedding's max_norm does): a "
                "Hessian is of a function that leaves its parameters as they are. Apply the change to what is computed "
                "from it, or leave it out of the model"
            )
        return [name for name, b in placed.problem.model.named_buffers() if digest(b) != before.get(name)]


def _check_passes(placed: PlacedProblem, own: dict[str, nn.Parameter], batch: Batch) -> None:
    """Evaluate a batch several times."""
    values, gradients, states = [], [], set()
    for _ in range(PASSES):
        value, _ = placed.loss_sum(None, batch)
        values.append(float(value.detach()))
        gradients.append(gradient_sum(value, own))
        states.add(random_digest())
    if not np.isfinite(values).all():
        raise ProblemError(_not_finite(batch, values[0]))
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


def _not_finite(batch: Batch, value: float) -> str:
    """Return the error that a loss is not a number, and where the data are not."""
    return (
        f"loss: got {value} for {sample_count(batch)} samples, expected a finite number; {nan_report((batch,))}a mean "
        "over targets that are all ignored is NaN: Return (sum, weight)"
    )


def check_without_memory(placed: PlacedProblem, elsewhere: PlacedProblem) -> None:
    """Evaluate at one point, with and without an evaluation at another before.

    Args:
        placed: the problem on a few samples, in float64.
        elsewhere: the same with other parameters.

    Raises:
        ProblemError: the model keeps something from one evaluation to the next, such as a cache that is not renewed.
    """
    modules = placed.problem.modules
    placed, elsewhere = (replace(each, problem=each.problem.remembering()) for each in (placed, elsewhere))
    for batch in placed.batches(None):
        with unchanged(*modules):
            fresh = _numbers_at(elsewhere, batch)
        with unchanged(*modules):
            _numbers_at(placed, batch)
            used = _numbers_at(elsewhere, batch)
        if abs(fresh[0] - used[0]) > LOSS_TOLERANCE * max(abs(fresh[0]), abs(used[0])):
            raise ProblemError(
                f"loss: {fresh[0]:.12g} at first, {used[0]:.12g} after an evaluation with other parameters"
                f"{remembering_module(placed, batch)}: a Hessian is of a function of the parameters alone. Compute "
                "anew what depends on them"
            )


def _numbers_at(placed: PlacedProblem, batch: Batch) -> tuple[float, float]:
    """Return sum and weight of a batch, evaluated on the module itself."""
    with torch.enable_grad(), placed.own_parameters():
        return _numbers(placed, batch)


def check_weight(placed: PlacedProblem) -> None:
    """Evaluate the weight of each batch at other parameters, of which it knows nothing.

    Args:
        placed: the problem on a few samples, in float64.

    Raises:
        ProblemError: it follows them: what stands beside the loss is something else, an accuracy say.
    """
    if placed.problem.reduction != "mean" or placed.problem.as_given() is not None:
        return
    generator = torch.Generator().manual_seed(0)

    def mixed(p: Tensor, sign: int) -> Tensor:  # as large as before: what is iterated goes on to converge
        return sign * p.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)

    points = [placed.at({name: mixed(p, (-1) ** k) for name, p in placed.parameters.items()}) for k in range(ELSEWHERE)]
    for batch in placed.batches(None):
        weight = _numbers_at(placed, batch)[1]
        for point in points:
            try:
                other = _numbers_at(point, batch)[1]
            except ProblemError:  # anything may come of other parameters
                continue
            if abs(other - weight) > LOSS_TOLERANCE * abs(weight):
                raise ProblemError(
                    f"loss: it gives a pair, whose second number changes with the parameters ({weight:.6g}, then "
                    f"{other:.6g}; an accuracy?): it has to be the total weight of the samples, by which the first, "
                    "their sum, is divided. Return (sum, weight), or the loss alone"
                )


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
            if is_cuttable(batch):
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
            total, weight = _numbers(placed, batch)
            here = total / weight if problem.reduction == "mean" and weight else total
            there, _ = _numbers(replace(placed, problem=given), batch)
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
    whole, weight = _numbers(placed, batch)
    try:
        found = [_numbers(placed, part) for part in parts]
    except ProblemError as error:
        raise ProblemError(
            f"{error}; {sample_count(batch)} samples can be evaluated, {sample_count(parts[0])} of them cannot, and "
            "micro-batches are of any size: keep dimension 0 (squeeze() drops it), call model.eval(), or say "
            "separable=False (one batch only)"
        ) from error
    if not np.isfinite([whole, *(total for total, _ in found)]).all():
        raise ProblemError(_not_finite(batch, next(t for t in (whole, *(t for t, _ in found)) if not np.isfinite(t))))
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


def _numbers(placed: PlacedProblem, batch: Batch) -> tuple[float, float]:
    """Return the sum and weight of a batch, evaluated on the module itself."""
    total, weight = placed.loss_sum(None, batch)
    return float(total.detach()), float(weight.detach())


def reads_outside(placed: PlacedProblem) -> list[str]:
    """Name selected parameters that reach the loss past what is swapped in for them, by the graph that autograd made.

    A loss may hold a parameter itself, or what was made of it before: no size tells, as a penalty may be small.

    Args:
        placed: the problem on a few samples.

    Returns:
        Their names; of a model that nothing can be swapped into, none.

    Raises:
        ProblemError: what the loss reads was made of them before the call, and does not follow them.
    """
    names = {id(p): name for name, p in placed.problem.model.named_parameters() if name in set(placed.layout.names)}
    for batch in placed.batches(None):
        with torch.enable_grad(), placed.own_parameters():
            began = _now()
            total, _ = placed.loss_sum(None, batch)
        if made := [names[id(leaf)] for leaf, since in _leaves(total) if since < began and id(leaf) in names]:
            raise ProblemError(
                f"loss: reads a tensor that was made of `{made[0]}` before the call (a view or a concatenation of it, "
                "say), which does not follow the parameter: make it inside the loss, from the model's own"
            )
    found: set[str] = set()
    with torch.enable_grad(), unchanged(*placed.problem.modules):
        for parameter in placed.problem.model.parameters():
            parameter.requires_grad_(id(parameter) in names)
        swapped = {name: t.detach().clone().requires_grad_() for name, t in placed.parameters.items()}
        for batch in placed.batches(None):
            try:
                total, _ = placed.loss_sum(swapped, batch)
            except ProblemError:
                return []
            found |= {names[id(leaf)] for leaf, _ in _leaves(total) if id(leaf) in names}
    return sorted(found)


def custom_functions(placed: PlacedProblem) -> str:
    """Name the functions with a backward of their own in a loss, as in " (`Kernel` has a backward of its own)"."""
    names: list[str] = []
    with torch.enable_grad(), placed.own_parameters():
        for batch in placed.batches(None):
            nodes, _ = _graph(placed.loss_sum(None, batch)[0])
            names += [type(n).__name__.removesuffix("Backward") for n in nodes if isinstance(n, BackwardCFunction)]
    if not names:
        return ""
    advice = next((f": {advice}" for part, advice in REMEDIES.items() if part in names[0]), "")
    return f" (`{names[0]}` has a backward of its own{advice})"


def _now() -> int:
    """Return the number that the next node of autograd's graph would have."""
    node = torch.zeros((), requires_grad=True).exp().grad_fn
    return int(node._sequence_nr()) if node else 0


def _leaves(value: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield the leaves of a value's graph, each with the number of the earliest node on some way to it."""
    nodes, since = _graph(value)
    for node in nodes:
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf, since[node]


def _graph(value: Tensor) -> tuple[list[Any], dict[Any, int]]:
    """Return the nodes of a value's graph, and the number of the earliest node above each."""
    first = value.grad_fn
    since: dict[Any, int] = {first: sys.maxsize} if first is not None else {}
    waiting = list(since)
    while waiting:
        node = waiting.pop()
        own = min(since[node], _number(node))
        for before, _ in node.next_functions:
            if before is not None and own < since.get(before, sys.maxsize + 1):
                since[before] = own
                waiting.append(before)
    return list(since), since


def _number(node: Any) -> int:
    """Return when a node was made; leaves have no time."""
    return sys.maxsize if getattr(node, "variable", None) is not None else int(node._sequence_nr())
