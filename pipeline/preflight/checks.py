"""Checks on the real model before any work is spent: is there one well-defined Hessian, and which engine gets it right?

Numbers are judged, not module names: on a few samples, in float64 and in the run's own type, with the parameters moved
a little off their values, since a zero-initialised layer hides errors. The chain of proof, link by link: differences of
the loss - its gradient - differences of the gradient - plain double backward - each engine.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.engines.cost import PROBE_SAMPLES
from pipeline.engines.registry import ENGINES, applications
from pipeline.errors import HessianError, ProblemError
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.parameters import Parameter
from pipeline.planning.verdict import ParameterVerdict, PreflightVerdict
from pipeline.preflight.autograd_checks import Second, second_error, slope_errors
from pipeline.preflight.diagnosis import wrong_module
from pipeline.preflight.engine_trial import DIFFERENCES, Trial
from pipeline.preflight.loss_checks import (
    check_deterministic,
    check_reduction,
    check_separable,
    check_weight,
    check_without_memory,
    custom_functions,
    reads_outside,
)
from pipeline.preflight.trial_point import SHIFTS, TrialPoint, representative, uneven_parts
from pipeline.problem.batches import Batch
from pipeline.problem.contexts import applied_contexts, exact_kernels, unchanged
from pipeline.problem.double_backward import (
    Vector,
    hessian_vector_products,
    jittered,
)
from pipeline.problem.explain import explained
from pipeline.problem.problem import PlacedProblem, Problem
from pipeline.problem.scales import STEEPEST, Products, Yardstick, directions, yardstick


def preflight(
    problem: Problem, candidates: Sequence[str], dtype: torch.dtype, device: str, microbatch: int
) -> PreflightVerdict:
    """Check that a problem has one Hessian, and choose the first engine that gets it right for each parameter.

    Args:
        problem: as given by the user.
        candidates: names of engines, fastest first.
        dtype: of the run.
        device: of the run.
        microbatch: samples at a time, where all data are looked at.

    Returns:
        The engine by parameter, with all that was seen.

    Raises:
        ProblemError: the loss is not deterministic, not a sum over samples, or not what autograd differentiates; or no
            candidate gets a parameter right. The message names parameter, module and what each candidate did.
    """
    start = time.monotonic()
    with exact_kernels(problem.model), unchanged(*problem.modules), _explained(problem):
        few = representative(problem)
        buffers = _check_loss(problem, few, dtype, device, microbatch)
        whole = few.batches
        few = uneven_parts(few)
        _require_finite(few.place(torch.float64, device))
        outside = reads_outside(few.place(torch.float64, device))
        found = _check_autograd(few, whole, dtype, device)
        reason = found.wrong
        if reason:
            reason += custom_functions(found.point.exact)
            _require_differences(reason, candidates, found.point.exact)
        known = applications(problem.place(dtype, device), PROBE_SAMPLES)
        allowed = _allowed(candidates, outside, reason)
        trial = Trial(found.point, known, found.yardstick, allowed, by_differences=bool(reason))
        chosen = {p.name: trial.choose(p, found.errors[p.name][1]) for p in problem.layout}
        asymmetry = trial.asymmetry()
    notes = {
        name: f"passed over: the loss reads `{outside[0]}` itself, past what torch.func swaps in"
        for name in candidates
        if outside and TRAITS[name].functional
    }
    return PreflightVerdict(
        samples=few.sample_count,
        contexts=applied_contexts(problem.model, torch.device(device))
        + [f"{wrapper} taken off" for wrapper in problem.unwrapped]
        + [f"{name} written out" for name in sorted(problem.written_out or ())]
        + [f"buffer {name} restored" for name in buffers]
        + [f"rows by differences of the gradient, right to {DIFFERENCES:.0e}: double backward {reason}"] * bool(reason),
        parameters={
            name: ParameterVerdict(right[0], next(iter(right[1:]), None), *found.errors[name], notes | tried)
            for name, (right, tried) in chosen.items()
        },
        asymmetry=asymmetry,
        seconds=time.monotonic() - start,
    )


def _check_loss(problem: Problem, few: Problem, dtype: torch.dtype, device: str, microbatch: int) -> list[str]:
    """Check that the loss is one function, and a sum over samples.

    Args:
        problem: on all data.
        few: on a few samples.
        dtype: of the run.
        device: of the run.
        microbatch: samples at a time, of all data.

    Returns:
        The buffers that evaluating it changes, and that are restored.
    """
    placed = few.place(torch.float64, device)
    with unchanged(*problem.modules):
        buffers = check_deterministic(placed)
    check_without_memory(placed, TrialPoint(few, few.batches, 0, dtype, device).exact)
    check_weight(placed)
    all_data = problem.place(torch.float64, device)
    check_reduction(all_data, microbatch)
    if problem.separable:
        check_separable(all_data, placed, microbatch)
    return buffers


@contextmanager
def _explained(problem: Problem) -> Iterator[None]:
    """Turn what a model or a loss raises into an error of ours."""
    try:
        yield
    except (HessianError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        doing = "differentiated in preflight, in float64 and in the run's type"
        raise ProblemError(explained(error, problem.model, doing)) from error


def _allowed(candidates: Sequence[str], outside: Sequence[str], reason: str) -> list[str]:
    """Leave out engines of which it is known that they are wrong, or not needed."""
    if reason:
        return [name for name in ENGINES if TRAITS[name].by_differences]
    asked = [name for name in candidates if not TRAITS[name].by_differences or len(candidates) == 1]
    allowed = [name for name in asked if not outside or not TRAITS[name].functional]
    if not allowed:
        raise ProblemError(
            f"engine {asked[0]}: the loss reads `{outside[0]}` itself, past what torch.func swaps in (a penalty of a "
            "tensor taken out of the model, say): read it from the model inside the loss, or take engine=rows"
        )
    return allowed


def _require_finite(placed: PlacedProblem) -> None:
    """Refuse second derivatives that are not finite at the weights themselves; whether there are any is asked later."""
    everywhere = np.random.default_rng(0).standard_normal((1, placed.layout.size))
    try:
        product = hessian_vector_products(placed, everywhere, 1.0)[0]
    except (RuntimeError, NotImplementedError):
        return
    for p in placed.layout:
        if not np.isfinite(product[p.place]).all():
            raise ProblemError(
                f"loss: its second derivatives with respect to `{p.name}` are NaN or infinite at these weights: look "
                "for sqrt, norm, log or a division at zero, and for torch.where over a branch that is not finite"
            )


def _require_differences(reason: str, candidates: Sequence[str], placed: PlacedProblem) -> None:
    """Refuse an engine that was asked for where only differences of the gradient can be right."""
    if not any(TRAITS[name].by_differences for name in candidates):
        raise ProblemError(
            f"loss: double backward {reason}{wrong_module(placed, order=2)}, so that engine={candidates[0]} cannot be "
            "right. Take engine=differences (slow, right to 1e-7 or so), change the operation, or leave the parameters "
            "before it out with params"
        )


@dataclass(frozen=True)
class _Autograd:
    """What differences say of autograd.

    Attributes:
        errors: of the gradient and of double backward, by parameter.
        point: at which the last of them were found.
        yardstick: what errors are held against there.
        wrong: where double backward is wrong, and by how much; empty where it is right.
    """

    errors: dict[str, tuple[float, float]]
    point: TrialPoint
    yardstick: Yardstick
    wrong: str


def _check_autograd(few: Problem, whole: tuple[Batch, ...], dtype: torch.dtype, device: str) -> _Autograd:
    """Compare the gradient with differences of the loss, and double backward with differences of the gradient."""
    found = _Comparison(few)
    for attempt in range(len(SHIFTS)):
        point, random = TrialPoint(few, whole, attempt, dtype, device), np.random.default_rng(attempt)
        measure = _yardstick(point, random)
        found.compare(point, measure.scales, random)
        if found.is_complete:
            break
    found.require_all()
    errors = {name: (found.slopes[name], found.seconds[name]) for name in found.slopes}
    return _Autograd(errors, point, measure, found.wrong)


class _Comparison:
    """What differences have shown so far, at one point after the other.

    Args:
        few: the problem on a few samples.
    """

    def __init__(self, few: Problem) -> None:
        self._few = few
        self.slopes: dict[str, float] = {p.name: 0.0 for p in few.layout if not p.size}
        self.seconds: dict[str, float] = dict(self.slopes)
        self._doubts: dict[str, tuple[float, str]] = {}
        self.wrong = ""

    @property
    def is_complete(self) -> bool:
        """Whether all that is to be compared was."""
        return len(self.slopes) == len(self.seconds) == len(self._few.layout)

    def compare(self, point: TrialPoint, scales: Vector, random: np.random.Generator) -> None:
        """Compare at a point what was not compared before."""
        each = {p.name: _direction(self._few, p, scales, random) for p in self._few.layout if p.size}
        self.slopes |= slope_errors(point.exact, {name: each[name] for name in each if name not in self.slopes})
        # All parameters together first: what is right along a direction on all of them is right along each.
        together = second_error(point.exact, _unit(np.sum(list(each.values()), 0)), scales)
        if together is not None and (together.is_right or together.reason):
            self.wrong = together.reason
            self.seconds |= {name: together.error for name in each if name not in self.seconds}
        for name, vector in each.items():
            if name not in self.seconds and (found := second_error(point.exact, vector, scales)) is not None:
                self._note(name, found, point)

    def _note(self, name: str, found: Second, point: TrialPoint) -> None:
        """Take a comparison for what it is; for wrong the second time only: steps may agree on something else."""
        if found.is_right or name in self._doubts:
            self.seconds[name] = found.error
        if not found.is_right:
            text = (
                f"is off by {found.error:.1e} in H[{found.row}, {name}] from differences of the gradient"
                f"{wrong_module(point.exact, order=2)}"
            )
            if name in self._doubts:
                self.wrong = self.wrong or text
            self._doubts[name] = found.error, text

    def require_all(self) -> None:
        """Let doubts stand that no other point has removed, and refuse what was compared nowhere."""
        for name, (error, text) in self._doubts.items():
            if name not in self.seconds:
                self.seconds[name], self.wrong = error, self.wrong or text
        missing = [p.name for p in self._few.layout if p.name not in self.slopes or p.name not in self.seconds]
        if missing:
            raise ProblemError(
                f"loss: no three steps of differences agree along `{missing[0]}` at its weights and at two points "
                "nearby, so that nothing proves its derivatives: it jumps or bends too often (rounding, quantization, "
                f"lower precision inside?). Change the operation, or leave `{missing[0]}` out with params"
            )


def _yardstick(point: TrialPoint, random: np.random.Generator) -> Yardstick:
    """Find what errors are held against at a point."""
    exact = point.exact
    others = [jittered(point.in_run), jittered(exact, 1) if point.in_run is exact else point.in_run]

    def multiplier(placed: PlacedProblem) -> Products:
        return lambda vectors: hessian_vector_products(placed, vectors, 1.0)

    try:
        return yardstick(
            exact.layout, multiplier(exact), [multiplier(other) for other in others], point.type_name, random
        )
    except (RuntimeError, NotImplementedError):  # there is no double backward: of one size, then
        one = np.ones(exact.layout.size)
        return Yardstick(one, np.zeros(exact.layout.size), one)


def _direction(problem: Problem, p: Parameter, scales: Vector, random: np.random.Generator) -> Vector:
    """Draw a direction of length one on one parameter.  # shape: (P,)."""
    vector = np.zeros(problem.layout.size)
    own = scales[p.place]
    vector[p.place] = directions(random, np.maximum(own, STEEPEST * own.max()))
    return _unit(vector)


def _unit(vector: Vector) -> Vector:
    return vector / (float(np.linalg.norm(vector)) or 1.0)
