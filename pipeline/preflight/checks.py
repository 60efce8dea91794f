"""Checks on the real model before any work is spent: is there one well-defined Hessian, and which engine gets it right?

Numbers are judged, not module names: on a few samples, in float64 and in the run's own type, with the parameters moved
a little off their values, since a zero-initialised layer hides errors. The chain of proof, link by link: differences of
the loss - its gradient - differences of the gradient - plain double backward - each engine.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.engines.cost import PROBE_SAMPLES
from pipeline.engines.registry import ENGINES, applications
from pipeline.engines.stages import Application
from pipeline.errors import HessianError, ProblemError, in_words
from pipeline.planning.parameters import Parameter
from pipeline.planning.verdict import ParameterVerdict, PreflightVerdict
from pipeline.preflight.autograd_checks import second_error, slope_error
from pipeline.preflight.diagnosis import wrong_module
from pipeline.preflight.loss_checks import (
    check_deterministic,
    check_reduction,
    check_separable,
    check_without_memory,
    custom_functions,
    reads_outside,
)
from pipeline.preflight.trial_point import representative, uneven_parts
from pipeline.problem.contexts import applied_contexts, exact_kernels, unchanged
from pipeline.problem.double_backward import (
    Vector,
    differenced_products,
    hessian_vector_products,
    jittered,
    loss_and_gradient,
    moved,
)
from pipeline.problem.explain import explained
from pipeline.problem.problem import PlacedProblem, Problem
from pipeline.problem.scales import Products, Yardstick, directions, yardstick

# Of a parameter's root mean square, or of 0.1 where that is smaller. Where differences prove nothing the point is
# moved, nearer to the weights: a shift may leave where the loss is defined (the logarithm of a small parameter).
SHIFTS = (1e-2, 1e-3, 0.0)
ROWS = 32  # of each parameter, given to an engine
UNITS, MOST_ROWS = 2, 256  # of a weight, whole, where they are not more rows than this
ROW_BYTES = 64 * 2**20  # that these may take
DIRECTIONS = 2  # random combinations of these rows, compared with plain double backward
ENGINE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # against plain double backward
ENGINE_ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}  # of the largest product, in blocks that are zero
FUNCTIONAL = {"factored", "jacrev"}  # engines that swap parameters in by torch.func
DIFFERENCES = 1e-5  # block error let pass where differences of the gradient are all there is
STEEPEST = 1e-3  # of a parameter's largest scale: along smaller ones a direction would go too far for its differences
MOST_UNCERTAIN = 1e-5  # block error let pass in float64, where the run is in single precision
NOISE = 8  # times the uncertainty of double backward


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
    with exact_kernels(problem.model), unchanged(problem.model), _explained(problem):
        few = representative(problem)
        placed = few.place(torch.float64, device)
        with unchanged(problem.model):
            buffers = check_deterministic(placed)
        check_without_memory(placed, _Point(few, 0, dtype, device).exact)
        all_data = problem.place(torch.float64, device)
        check_reduction(all_data, microbatch)
        if problem.separable:
            check_separable(all_data, placed, microbatch)
        few = uneven_parts(few)
        _require_finite(few.place(torch.float64, device))
        outside = reads_outside(few.place(torch.float64, device))
        found = _check_autograd(few, dtype, device)
        reason = found.wrong
        if reason:
            reason += custom_functions(found.point.exact)
            _require_differences(reason, candidates, found.point.exact)
        known = applications(problem.place(dtype, device), PROBE_SAMPLES)
        trial = _Trial(found.point, known, found.yardstick, by_differences=bool(reason))
        allowed = _allowed(candidates, outside, reason)
        chosen = {p.name: trial.choose(p, allowed, found.errors[p.name][1]) for p in problem.layout}
        asymmetry = trial.asymmetry()
    notes = {
        name: f"passed over: the loss reads `{outside[0]}` itself, past what torch.func swaps in"
        for name in FUNCTIONAL
        if outside and name in candidates
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
        return ["differences"]
    asked = [name for name in candidates if name != "differences" or len(candidates) == 1]
    if outside and not set(asked) - FUNCTIONAL:
        raise ProblemError(
            f"engine {asked[0]}: the loss reads `{outside[0]}` itself, past what torch.func swaps in (a penalty of a "
            "tensor taken out of the model, say): read it from the model inside the loss, or take engine=rows"
        )
    return [name for name in asked if not outside or name not in FUNCTIONAL]


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
    if "differences" not in candidates:
        raise ProblemError(
            f"loss: double backward {reason}{wrong_module(placed, order=2)}, so that engine={candidates[0]} cannot be "
            "right. Take engine=differences (slow, right to 1e-7 or so), change the operation, or leave the parameters "
            "before it out with params"
        )


class _Point:
    """A problem on a few samples near its weights: the same point in float64 and in the run's type.

    Args:
        few: the problem.
        attempt: which of the shifts.
        dtype: of the run.
        device: of the run.
    """

    def __init__(self, few: Problem, attempt: int, dtype: torch.dtype, device: str) -> None:
        placed, random = few.place(torch.float64, device), np.random.default_rng(attempt)
        shift = np.zeros(few.layout.size)
        for p in few.layout:
            rms = float(placed.parameters[p.name].square().mean().sqrt()) if p.size else 0.0
            shift[p.place] = SHIFTS[attempt] * max(rms, 0.1) * random.standard_normal(p.size)
        parameters = {name: t.to(dtype) for name, t in moved(placed, shift).parameters.items()}
        rounded = {name: t.double() for name, t in parameters.items()}
        self.exact = PlacedProblem(few, rounded, placed.constants, torch.float64, placed.device)
        self.in_run = self.exact
        if dtype != torch.float64:
            self.in_run = PlacedProblem(few, parameters, few.place(dtype, device).constants, dtype, placed.device)

    @property
    def types(self) -> list[PlacedProblem]:
        """The point in float64, and in the run's type where that is another."""
        return [self.exact] if self.in_run is self.exact else [self.exact, self.in_run]


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
    point: _Point
    yardstick: Yardstick
    wrong: str


def _check_autograd(few: Problem, dtype: torch.dtype, device: str) -> _Autograd:
    """Compare the gradient with differences of the loss, and double backward with differences of the gradient."""
    slopes: dict[str, float] = {p.name: 0.0 for p in few.layout if not p.size}
    seconds: dict[str, float] = dict(slopes)
    wrong = ""
    for attempt in range(len(SHIFTS)):
        point, random = _Point(few, attempt, dtype, device), np.random.default_rng(attempt)
        measure = _yardstick(point, random)
        scales = measure.scales
        each = {p.name: _direction(few, p, scales, random) for p in few.layout if p.size}
        for name, vector in each.items():
            if name not in slopes and (error := slope_error(point.exact, few.layout[name], vector)) is not None:
                slopes[name] = error
        # All parameters together first: what is right along a direction on all of them is right along each.
        together = second_error(point.exact, _unit(np.sum(list(each.values()), 0)), scales)
        if together is not None and (together.is_right or together.reason):
            wrong = together.reason
            seconds |= {name: together.error for name in each if name not in seconds}
        for name, vector in each.items():
            if name not in seconds and (found := second_error(point.exact, vector, scales)) is not None:
                seconds[name] = found.error
                if not found.is_right:
                    wrong = wrong or (
                        f"is off by {found.error:.1e} in H[{found.row}, {name}] from differences of the gradient"
                        f"{wrong_module(point.exact, order=2)}"
                    )
        if len(slopes) == len(seconds) == len(few.layout):
            return _Autograd({name: (slopes[name], seconds[name]) for name in slopes}, point, measure, wrong)
    missing = next(p.name for p in few.layout if p.name not in slopes or p.name not in seconds)
    raise ProblemError(
        f"loss: no three steps of differences agree along `{missing}` at its weights and at two points nearby, so that "
        "nothing proves its derivatives: it jumps or bends too often (rounding, quantization, lower precision "
        f"inside?). Change the operation, or leave `{missing}` out with params"
    )


def _yardstick(point: _Point, random: np.random.Generator) -> Yardstick:
    """Find what errors are held against at a point."""
    exact = point.exact
    other = jittered(exact) if point.in_run is exact else point.in_run

    def multiplier(placed: PlacedProblem) -> Products:
        return lambda vectors: hessian_vector_products(placed, vectors, 1.0)

    try:
        return yardstick(exact.layout, multiplier(exact), multiplier(other), _name(point.in_run.dtype), random)
    except (RuntimeError, NotImplementedError):  # there is no double backward: of one size, then
        return Yardstick(np.ones(exact.layout.size), np.zeros(exact.layout.size))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _direction(problem: Problem, p: Parameter, scales: Vector, random: np.random.Generator) -> Vector:
    """Draw a direction of length one on one parameter.  # shape: (P,)."""
    vector = np.zeros(problem.layout.size)
    own = scales[p.place]
    vector[p.place] = directions(random, np.maximum(own, STEEPEST * own.max()))
    return _unit(vector)


def _unit(vector: Vector) -> Vector:
    return vector / (float(np.linalg.norm(vector)) or 1.0)


@dataclass(frozen=True)
class _Error:
    """The largest error of a block, and where."""

    value: float
    dtype: torch.dtype
    row: str
    col: str

    def __str__(self) -> str:
        return f"{self.value:.1e} in H[{self.row}, {self.col}] ({_name(self.dtype)})"


class _Trial:
    """Engines against plain double backward, at one point.

    Args:
        point: few samples at moved weights.
        known: how parameters are applied to a first batch of the run's size, which few samples need not show.
        measure: what errors are held against.
        by_differences: whether products by differences are what engines are held against.
    """

    def __init__(
        self, point: _Point, known: Mapping[str, Application], measure: Yardstick, *, by_differences: bool
    ) -> None:
        self._point, self._layout = point, point.exact.layout
        self._scales, self._rounding = measure.scales, measure.rounding
        self._by_differences = by_differences
        self._random = np.random.default_rng(0)
        active = np.abs(self._truth(measure.directions(self._random, 1))[0]) / self._scales
        self._top = float(active.max())
        self._runs = {p.name: self._pick(p, active[p.place]) for p in self._layout if p.size}
        self._picked = [row for p in self._layout if p.size for row in self._rows(p)]
        self._sides: dict[str, Vector] = {}
        self._known = known

    def _pick(self, p: Parameter, active: Vector) -> list[range]:
        """Choose rows of a parameter, in two runs: around the largest curvature, and anywhere."""
        room = ROW_BYTES // (8 * self._layout.size)
        most = max(2, min(ROWS, room))
        if p.size <= most:
            return [p.span]
        half, last, anywhere = most // 2, p.size - most // 2, int(self._random.integers(p.size - most // 2 + 1))
        start, stop = min(int(active.argmax()), last), min(int(active.argmax()), last) + half
        unit = p.size // p.shape[0]
        if len(p.shape) == 2 and UNITS * unit <= min(
            p.size, room, MOST_ROWS
        ):  # whole: else parts of them are multiplied
            start = min(start // unit * unit, p.size - UNITS * unit)
            stop = start + UNITS * unit
        first, second = sorted([(start, stop), (anywhere, anywhere + half)])
        if second[0] < first[1]:
            return [p.span[first[0] : max(first[1], second[1])]]
        return [p.span[first[0] : first[1]], p.span[second[0] : second[1]]]

    def choose(self, p: Parameter, candidates: Sequence[str], uncertainty: float) -> tuple[list[str], dict[str, str]]:
        """Try engines on the rows of a parameter.

        Args:
            p: the parameter.
            candidates: names of engines, fastest first.
            uncertainty: of double backward in float64, as differences show it. A model with single-precision casts
                inside cannot be judged more finely, which matters to no run in single precision.

        Returns:
            The first engine that is right, and a second where the first saves double backward but has each sample's
            tangents to handle: at several positions only a measurement tells. And what each that was tried did.

        Raises:
            ProblemError: there is none.
        """
        tried: dict[str, str] = {}
        if not p.size:
            return [candidates[0]], tried
        right: list[str] = []
        rows = self._rows(p)
        mixing = np.stack([directions(self._random, self._scales[rows]) for _ in range(DIRECTIONS)])
        for name in candidates:
            try:
                errors = [self._error(name, placed, p, mixing) for placed in self._point.types]
            except Exception as error:  # whatever it is, this engine cannot be used, and the verdict says why
                tried[name] = f"raised {in_words(error)}"
                continue
            tried[name] = "off by " + ", ".join(map(str, errors))
            if name == "factored" and p.name not in self._known:
                tried[name] += "; applied otherwise to a batch of the run's size"
                continue
            if all(error.value <= self._tolerance(error.dtype, uncertainty) for error in errors):
                right.append(name)
                if name != "factored" or self._known[p.name].positions == 1:
                    break
        if right:
            return right, tried
        faults = "; ".join(f"{name} {did}" for name, did in tried.items())
        raise ProblemError(
            f"no engine computes the rows of `{p.name}`: {faults}. Leave it out with params, or change the operation; "
            "where only float32 is off, take dtype=float64 or look for lower precision inside the model"
        )

    def _tolerance(self, dtype: torch.dtype, uncertainty: float) -> float:
        """Give the block error that is let pass."""
        if self._by_differences:
            return max(DIFFERENCES, ENGINE_TOLERANCE[dtype])
        tolerance = ENGINE_TOLERANCE[dtype]
        if dtype == self._point.in_run.dtype:
            return tolerance
        return max(tolerance, min(MOST_UNCERTAIN, NOISE * uncertainty))

    def _truth(self, vectors: Vector) -> Vector:
        """Multiply by means that share nothing with the engines.  # shape: (k, P)."""
        if self._by_differences:
            weight = loss_and_gradient(self._point.exact).weight
            return weight * differenced_products(self._point.exact, vectors, self._scales, None)[0]
        return hessian_vector_products(self._point.exact, vectors, 1.0)

    def _error(self, engine: str, placed: PlacedProblem, p: Parameter, mixing: Vector) -> "_Error":
        """Compare random combinations of an engine's rows with plain double backward, block by block.

        Rows are mixed, and columns compared, in units of their own scales: an error shows that is large only beside its
        own row and column.

        Returns:
            The worst.
        """
        exact, found = self._point.exact, self._engine_rows(engine, placed, p)
        vectors = np.zeros((len(mixing), self._layout.size))
        vectors[:, self._rows(p)] = mixing
        truth = self._truth(vectors) / self._scales
        if placed is exact:
            self._sides[p.name] = found[:, self._picked]
        tolerance = ENGINE_TOLERANCE[placed.dtype]
        least, worst = ENGINE_ROUNDING[placed.dtype] / tolerance * self._top, _Error(0.0, placed.dtype, p.name, p.name)
        gaps = np.abs(mixing @ found / self._scales - truth)
        for gap, product in zip(gaps, truth, strict=True):
            for b in self._layout:
                scale = float(np.abs(product[b.place]).max(initial=0.0)) + least or 1.0
                allowed = np.maximum(scale, self._rounding[b.place] * self._top / tolerance)
                error = float(np.nan_to_num(gap[b.place] / allowed, nan=np.inf).max(initial=0.0))
                worst = max(worst, _Error(error, placed.dtype, p.name, b.name), key=lambda e: e.value)
        return worst

    def _rows(self, p: Parameter) -> list[int]:
        """Give the rows chosen."""
        return [row for run in self._runs[p.name] for row in run]

    def _engine_rows(self, engine: str, placed: PlacedProblem, p: Parameter) -> Vector:
        """Have an engine compute the rows chosen against all columns, batch by batch.  # shape: (rows, P)."""
        size, used, parts = self._layout.size, ENGINES[engine](placed, ROWS), []
        for run in self._runs[p.name]:
            parts.append(torch.zeros(len(run), size, dtype=placed.dtype, device=placed.device))
            for batch in placed.batches(None):
                used.add(batch, run, range(size), parts[-1])
        return torch.cat(parts).to("cpu", torch.float64).numpy()

    def asymmetry(self) -> float:
        """Compare block (a, b) with block (b, a), each computed in its own right.

        Returns:
            The largest difference, relative to the block.

        Raises:
            ProblemError: it is too large; the message names the block.
        """
        own = self._scales[self._picked]
        sides = np.concatenate(list(self._sides.values())) / np.outer(own, own) if self._sides else np.zeros((0, 0))
        least = float(np.abs(sides).max(initial=0.0) * self._rounding.max(initial=0.0)) / MOST_UNCERTAIN
        start, worst = 0, 0.0
        for a, rows in self._sides.items():
            stop, first = start + len(rows), 0
            for b, other in self._sides.items():
                last = first + len(other)
                block, mirror = sides[start:stop, first:last], sides[first:last, start:stop].T
                gap = float(np.abs(block - mirror).max(initial=0.0))
                error = gap / (float(np.abs(block).max(initial=0.0)) + least or 1.0)
                if error > MOST_UNCERTAIN:
                    raise ProblemError(f"engines: H[{a}, {b}] and H[{b}, {a}] differ by {error:.1e}; take engine=rows")
                worst, first = max(worst, error), last
            start = stop
        return worst
