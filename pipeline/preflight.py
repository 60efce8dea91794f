"""Checks on the real model before any work is spent: is there one well-defined Hessian, and which engine gets it right?

Numbers are judged, not module names. Everything is evaluated in float64 on a few samples, with the parameters moved a
little off their values, since a zero-initialised layer hides errors.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data import Batch, sample_count, take
from pipeline.engines import ENGINES
from pipeline.errors import HessianError, ProblemError
from pipeline.problem import PlacedProblem, Problem, exact_kernels, unchanged
from pipeline.reference import Vector, moved

PART_SAMPLES = 1024  # at a time, in the pass over all data that checks sums and weights
GRADIENT_SAMPLES = 64
GRADIENT_STEPS = (1e-4, 2e-4)  # in parameter space, along vectors of length about one
GRADIENT_TOLERANCE = 1e-5  # relative
GRADIENT_ROUNDING = 1e-9  # of the loss: its last bits over a step, with room
SAMPLES = 7  # odd and prime: no split into equal micro-batches hides a mean of means
ROWS = 4  # of each parameter, in the comparison of engines
SHIFT = 0.01  # of a parameter's root mean square, or of 0.1 where that is smaller
LOSS_TOLERANCE = 1e-9  # relative, in float64
ENGINE_TOLERANCE = 1e-8  # block error, in float64


def check_loss(problem: Problem) -> None:
    """Refuse a loss that is not a deterministic sum over samples.

    Args:
        problem: as given by the user.

    Raises:
        ProblemError: two evaluations differ, draw random numbers or change buffers; or the loss of several samples is
            not the sum (or mean) of their losses although the problem is said to be separable.
    """
    placed = _moved(problem)
    try:
        with exact_kernels(), unchanged(problem.model):
            with torch.no_grad():
                for batch in (problem.batches[0], problem.batches[-1]):
                    _check_deterministic(placed, _few(placed, placed.cast(batch), SAMPLES))
                if problem.separable:
                    for part in placed.batches(PART_SAMPLES):
                        _check_separable(placed, part)
            _check_gradient(placed)
    except HessianError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ProblemError(f"model or loss: evaluating them raised {type(error).__name__}: {text}") from error


def choose_engines(problem: Problem, candidates: Sequence[str]) -> dict[str, str]:
    """Choose the first engine that agrees with plain double backward, for each row parameter.

    Args:
        problem: as given by the user.
        candidates: names of engines, fastest first.

    Returns:
        Engine by parameter name.

    Raises:
        ProblemError: no candidate gets a parameter right; the message names it, and what each did.
    """
    placed = _moved(problem)
    chosen: dict[str, str] = {}
    with exact_kernels(), unchanged(problem.model):
        batch = _few(placed, placed.cast(problem.batches[-1]), SAMPLES)
        for parameter in problem.layout:
            verdicts: list[str] = []
            truth = None
            for name in candidates:
                try:
                    rows = _some_rows(placed, name, parameter.span, batch)
                    truth = _some_rows(placed, "rows", parameter.span, batch) if truth is None else truth
                except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                    verdicts.append(f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    continue
                error_found = _row_error(rows, truth)
                if error_found <= ENGINE_TOLERANCE:
                    chosen[parameter.name] = name
                    break
                verdicts.append(f"{name} is off by {error_found:.1e}")
            else:
                raise ProblemError(
                    f"no engine computes the rows of `{parameter.name}`: {'; '.join(verdicts)}; "
                    "leave it out with params, or change the operation"
                )
    return chosen


def _some_rows(placed: PlacedProblem, engine: str, span: range, batch: Batch) -> Tensor:
    """Compute a few rows spread over a parameter, against all columns.  # shape: (rows, P)."""
    size = placed.layout.size
    picked = sorted({int(k) for k in np.linspace(span.start, span.stop - 1, min(ROWS, len(span)))})
    out = torch.zeros(len(picked), size, dtype=placed.dtype, device=placed.device)
    for k, row in enumerate(picked):
        ENGINES[engine](placed, 1).add(batch, range(row, row + 1), range(size), out[k : k + 1])
    return out


def _row_error(rows: Tensor, truth: Tensor) -> float:
    """Give the largest difference over the largest entry; infinite where an entry is not finite."""
    if not bool(rows.isfinite().all()):
        return float("inf")
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    return float((rows - truth).abs().max()) / scale if scale > 0 else float(rows.abs().sum())


def _moved(problem: Problem) -> PlacedProblem:
    """Place a problem in float64, its parameters moved a little by a fixed random vector."""
    placed = problem.place(torch.float64)
    generator = np.random.default_rng(0)
    shift = np.zeros(problem.layout.size)
    for p in problem.layout:
        rms = float(placed.parameters[p.name].square().mean().sqrt()) if p.size else 0.0
        shift[p.span.start : p.span.stop] = SHIFT * max(rms, 0.1) * generator.standard_normal(p.size)
    return moved(placed, shift)


def _few(placed: PlacedProblem, batch: Batch, most: int) -> Batch:
    """Give a few samples, spread over a batch; all of them where samples are not separable."""
    count = sample_count(batch)
    if not placed.problem.separable or count <= most:
        return batch
    return take(batch, torch.linspace(0, count - 1, most, device=placed.device).long())


def _check_gradient(placed: PlacedProblem) -> None:
    """Compare autograd with differences of the loss, along a dense random direction on each parameter.

    Where autograd itself disagrees with the loss (the masked lookups of `padding_idx`), no engine helps. Only a verdict
    on which two steps of the differences agree counts: at the kinks of a ReLU they do not.
    """
    random = np.random.default_rng(1)
    for batch in dict.fromkeys((0, len(placed.problem.batches) - 1)):
        few = _few(placed, placed.cast(placed.problem.batches[batch]), GRADIENT_SAMPLES)
        with torch.enable_grad(), placed.own_parameters() as own:
            value, _ = placed.problem.loss_sum(None, few)
            if not value.requires_grad:
                continue  # refused with its reasons by `loss_and_gradient`
            gradients = torch.autograd.grad(value, list(own.values()), materialize_grads=True)
        for p, gradient in zip(placed.layout, gradients, strict=True):
            vector = np.zeros(placed.layout.size)
            vector[p.span.start : p.span.stop] = random.standard_normal(p.size) / max(p.size, 1) ** 0.5
            slope = float(gradient.reshape(-1) @ torch.from_numpy(vector[p.span.start : p.span.stop]))
            near, far = (_difference(placed, few, vector, step) for step in GRADIENT_STEPS)
            scale = max(abs(slope), abs(near), float(gradient.norm()) / max(p.size, 1) ** 0.5)
            scale += GRADIENT_ROUNDING * abs(float(value.detach()))
            if abs(near - far) <= GRADIENT_TOLERANCE * scale / 10 and abs(near - slope) > GRADIENT_TOLERANCE * scale:
                raise ProblemError(
                    f"loss: its gradient with respect to `{p.name}` is {slope:.6g} along a direction in which the loss "
                    f"itself changes by {near:.6g}: autograd does not differentiate this loss (padding_idx masks the "
                    "gradient of lookups that are in the data; so may custom backward functions). Change the "
                    f"operation, or leave `{p.name}` out with params"
                )


def _difference(placed: PlacedProblem, batch: Batch, vector: Vector, step: float) -> float:
    """Differentiate the loss along a vector by central differences of fourth order."""
    total = 0.0
    for sign, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        with torch.no_grad(), moved(placed, sign * step * vector).own_parameters():
            total += factor * float(placed.problem.loss_sum(None, batch)[0])
    return total / (12 * step)


def _check_deterministic(placed: PlacedProblem, batch: Batch) -> None:
    """Evaluate a few times and compare values, buffers and the random state."""
    model = placed.problem.model
    random_state = torch.get_rng_state()
    buffers = {name: b.detach().clone() for name, b in placed.constants.items()}
    values = [float(placed.loss_sum({}, batch)[0]) for _ in range(3)]
    spread = max(values) - min(values)
    drew = not torch.equal(torch.get_rng_state(), random_state)
    changed = [
        name for name, b in buffers.items() if not torch.equal(b.nan_to_num(), placed.constants[name].nan_to_num())
    ]
    if drew or spread > LOSS_TOLERANCE * max(map(abs, values)):
        raise ProblemError(
            f"loss: not deterministic ({values[0]:.12g}, then {values[1]:.12g}"
            f"{'; random numbers were drawn' if drew else ''}): {_suspects(model, 'Dropout')}call model.eval()"
        )
    if changed:
        raise ProblemError(
            f"model: evaluating it changes its buffer `{changed[0]}`: {_suspects(model, 'Norm')}call model.eval()"
        )


def _check_separable(placed: PlacedProblem, batch: Batch) -> None:
    """Compare the loss of a batch with that of its uneven parts."""
    count = sample_count(batch)
    if count == 1:
        return
    head, tail = take(batch, slice(0, 1 + count // 3)), take(batch, slice(1 + count // 3, None))
    (whole, weight), (a, weight_a), (b, weight_b) = (placed.loss_sum({}, part) for part in (batch, head, tail))
    is_mean = placed.problem.reduction == "mean"
    gaps = [_gap(whole, a, b), _gap(weight, weight_a, weight_b) if is_mean else 0.0]
    if max(gaps) > LOSS_TOLERANCE:
        raise ProblemError(
            f"loss: (sum, weight) of {count} samples is ({float(whole):.9g}, {float(weight):.9g}), of two parts "
            f"({float(a):.9g}, {float(weight_a):.9g}) and ({float(b):.9g}, {float(weight_b):.9g}): "
            f"it is not a {placed.problem.reduction} over samples. Return (sum, weight), say "
            f"reduction={'sum' if is_mean else 'mean'!r} if that is what it is, or separable=False (one batch only) "
            f"if samples act on each other {_suspects(placed.problem.model, 'BatchNorm')}".rstrip()
        )


def _gap(whole: Tensor, a: Tensor, b: Tensor) -> float:
    """Give how far two parts miss the whole, relative to the largest of them."""
    return abs(float(whole - a - b)) / (max(abs(float(part)) for part in (whole, a, b)) or 1.0)


def _suspects(model: nn.Module, kind: str) -> str:
    """Name modules in train mode whose class name has a word in it."""
    found = [name for name, m in model.named_modules() if m.training and kind in type(m).__name__]
    return f"`{found[0]}` ({type(model.get_submodule(found[0])).__name__}) is in train mode; " if found else ""
