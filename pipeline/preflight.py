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

from pipeline.contexts import applied_contexts, exact_kernels, unchanged
from pipeline.contract import check_deterministic, check_reduction, check_separable, check_without_memory
from pipeline.culprit import raising_module, wrong_module
from pipeline.derivatives import derivative_errors
from pipeline.engines import ENGINES, applications
from pipeline.engines.stages import Application
from pipeline.errors import HessianError, ProblemError, in_words
from pipeline.layout import Parameter
from pipeline.probe import PROBE_SAMPLES
from pipeline.problem import PlacedProblem, Problem
from pipeline.reference import Vector, hessian_vector_products, moved
from pipeline.samples import representative, uneven_parts
from pipeline.verdict import ParameterVerdict, PreflightVerdict

# Of a parameter's root mean square, or of 0.1 where that is smaller. Where differences prove nothing the point is
# moved, nearer to the weights: a shift may leave where the loss is defined (the logarithm of a small parameter).
SHIFTS = (1e-2, 1e-3, 0.0)
ROWS = 32  # of each parameter, given to an engine
UNITS, MOST_ROWS = 2, 256  # of a weight, whole, where they are not more rows than this
ROW_BYTES = 64 * 2**20  # that these may take
DIRECTIONS = 2  # random combinations of these rows, compared with plain double backward
ENGINE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # against plain double backward
ENGINE_ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}  # of the largest product, in blocks that are zero
MOST_UNCERTAIN = 1e-5  # block error let pass in float64, where the run is in single precision
NOISE, MOST_NOISE = 8, 1e-5  # times the rounding of plain double backward in the run's type; at most, of the largest


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
    few = representative(problem)
    with exact_kernels(problem.model), unchanged(problem.model):
        with _explained(problem):
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
            errors, point = _check_autograd(few, dtype, device)
        trial = _Trial(point, applications(problem.place(dtype, device), PROBE_SAMPLES))
        chosen = {p.name: trial.choose(p, candidates, errors[p.name][1]) for p in problem.layout}
        asymmetry = trial.asymmetry()
    return PreflightVerdict(
        samples=few.sample_count,
        contexts=applied_contexts(problem.model, torch.device(device))
        + [f"buffer {name} restored" for name in buffers],
        parameters={
            name: ParameterVerdict(right[0], next(iter(right[1:]), None), *errors[name], tried)
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
    except HessianError:
        raise
    except Exception as error:
        place = raising_module(problem.model, error)
        raise ProblemError(f"model or loss: evaluating them raised {in_words(error)}{place}") from error


def _require_finite(placed: PlacedProblem) -> None:
    """Refuse second derivatives that do not exist, or are not finite at the weights themselves."""
    everywhere = np.random.default_rng(0).standard_normal((1, placed.layout.size))
    try:
        product = hessian_vector_products(placed, everywhere, 1.0, None)[0]
    except (RuntimeError, NotImplementedError) as error:
        raise ProblemError(
            f"loss: plain double backward raised {in_words(error)}{wrong_module(placed, order=2)}. No engine can help: "
            "change the operation, or leave the parameters before it out with params"
        ) from error
    for p in placed.layout:
        if not np.isfinite(product[p.place]).all():
            raise ProblemError(
                f"loss: its second derivatives with respect to `{p.name}` are NaN or infinite at these weights: look "
                "for sqrt, norm, log or a division at zero, and for torch.where over a branch that is not finite"
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
        constants = few.place(dtype, device).constants
        self.in_run = PlacedProblem(few, parameters, constants, dtype, placed.device)

    @property
    def types(self) -> list[PlacedProblem]:
        """The point in float64, and in the run's type where that is another."""
        return [self.exact] if self.in_run.dtype == torch.float64 else [self.exact, self.in_run]


def _check_autograd(few: Problem, dtype: torch.dtype, device: str) -> tuple[dict[str, tuple[float, float]], _Point]:
    """Compare the gradient with differences of the loss, and double backward with differences of the gradient.

    Returns:
        Both errors, by parameter; and the point at which the last of them were found.
    """
    found: dict[str, tuple[float, float]] = {p.name: (0.0, 0.0) for p in few.layout if not p.size}
    for attempt in range(len(SHIFTS)):
        point, random = _Point(few, attempt, dtype, device), np.random.default_rng(attempt)
        for p in few.layout:
            if p.name not in found:
                vector = np.zeros(few.layout.size)
                vector[p.place] = random.standard_normal(p.size) / p.size**0.5
                errors = derivative_errors(point.exact, p, vector)
                if errors is not None:
                    found[p.name] = errors
        if len(found) == len(few.layout):
            return found, point
    missing = next(p.name for p in few.layout if p.name not in found)
    raise ProblemError(
        f"loss: no three steps of differences agree along `{missing}` at its weights and at two points nearby, so that "
        "nothing proves its derivatives: it jumps or bends too often (rounding, quantization, lower precision "
        f"inside?). Change the operation, or leave `{missing}` out with params"
    )


@dataclass(frozen=True)
class _Error:
    """The largest error of a block, and where."""

    value: float
    dtype: torch.dtype
    row: str
    col: str

    def __str__(self) -> str:
        return f"{self.value:.1e} in H[{self.row}, {self.col}] ({str(self.dtype).removeprefix('torch.')})"


class _Trial:
    """Engines against plain double backward, at one point.

    Args:
        point: few samples at moved weights.
        known: how parameters are applied to a first batch of the run's size, which few samples need not show.
    """

    def __init__(self, point: _Point, known: Mapping[str, Application]) -> None:
        self._point, self._layout = point, point.exact.layout
        self._random = np.random.default_rng(0)
        everywhere = self._random.standard_normal((1, self._layout.size))
        active = np.abs(hessian_vector_products(point.exact, everywhere, 1.0, None)[0])
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
        mixing = self._random.standard_normal((DIRECTIONS, len(self._rows(p))))
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
        tolerance = ENGINE_TOLERANCE[dtype]
        if dtype == self._point.in_run.dtype:
            return tolerance
        return max(tolerance, min(MOST_UNCERTAIN, NOISE * uncertainty))

    def _error(self, engine: str, placed: PlacedProblem, p: Parameter, mixing: Vector) -> "_Error":
        """Compare random combinations of an engine's rows with plain double backward, block by block."""
        exact, found = self._point.exact, self._engine_rows(engine, placed, p)
        vectors = np.zeros((len(mixing), self._layout.size))
        vectors[:, self._rows(p)] = mixing
        truth = hessian_vector_products(exact, vectors, 1.0, None)
        noise = np.zeros_like(truth)
        if placed is exact:
            self._sides[p.name] = found[:, self._picked]
        else:
            own = hessian_vector_products(placed, vectors, 1.0, None)
            noise = np.minimum(NOISE * np.abs(own - truth), MOST_NOISE * self._top)
        tolerance = ENGINE_TOLERANCE[placed.dtype]
        least, worst = ENGINE_ROUNDING[placed.dtype] / tolerance * self._top, _Error(0.0, placed.dtype, p.name, p.name)
        gaps = np.abs(mixing @ found - truth)
        for gap, product, excused in zip(gaps, truth, noise, strict=True):
            for b in self._layout:
                scale = float(np.abs(product[b.place]).max(initial=0.0)) + least or 1.0
                allowed = max(scale, float(excused[b.place].max(initial=0.0)) / tolerance)
                error = float(np.nan_to_num(gap[b.place], nan=np.inf).max(initial=0.0)) / allowed
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
        sides = np.concatenate(list(self._sides.values())) if self._sides else np.zeros((0, 0))
        top, start, worst = float(np.abs(sides).max(initial=0.0)), 0, 0.0
        for a, rows in self._sides.items():
            stop, first = start + len(rows), 0
            for b, other in self._sides.items():
                last = first + len(other)
                block, mirror = sides[start:stop, first:last], sides[first:last, start:stop].T
                gap = float(np.abs(block - mirror).max(initial=0.0))
                error = gap / (float(np.abs(block).max(initial=0.0)) + 1e-6 * top or 1.0)
                if error > MOST_UNCERTAIN:
                    raise ProblemError(f"engines: H[{a}, {b}] and H[{b}, {a}] differ by {error:.1e}; take engine=rows")
                worst, first = max(worst, error), last
            start = stop
        return worst
