"""Where engines are tried: a few samples, with what is rare in them, at weights a little off their values."""

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pipeline.problem.batches import Batch, OfTerm, has_rows, is_cuttable, sample_count, take
from pipeline.problem.double_backward import moved
from pipeline.problem.problem import PlacedProblem, Problem

# Of a parameter's root mean square, or of 0.1 where that is smaller. Where differences prove nothing the point is
# moved, nearer to the weights: a shift may leave where the loss is defined (the logarithm of a small parameter).
SHIFTS = (1e-2, 1e-3, 0.0)
SPREAD = 4  # samples taken from the first batch, and from the last


def representative(problem: Problem) -> Problem:
    """Return the same problem on a few samples.

    They are spread over the first and the last batch; to these come, for every integer tensor of the data, a sample
    that holds its smallest value, its largest and its commonest one: ignored targets, padding and masks are among them.
    Their order is reversed: a model that sorts its samples changes it.

    Args:
        problem: with all its data.

    Returns:
        The problem on a few samples, without the L2 term: engines do not know it.
    """
    if not problem.separable:
        return problem.on(problem.batches, l2=0.0)
    picked: dict[int, set[int]] = {}
    for index in _ends(problem.batches):
        count = sample_count(problem.batches[index])
        picked[index] = {round(k) for k in torch.linspace(0, count - 1, min(SPREAD, count)).tolist()}
    for index, sample in _extremes(problem.batches):
        picked.setdefault(index, set()).add(sample)
    few = [_some(problem.batches[index], samples) for index, samples in sorted(picked.items())]
    return problem.on(tuple(few), l2=0.0)


def _ends(batches: tuple[Batch, ...]) -> set[int]:
    """Return the places of the first and the last batch, of each term where there are several."""
    terms = [batch.term if isinstance(batch, OfTerm) else 0 for batch in batches]
    firsts = {term: k for k, term in reversed(list(enumerate(terms)))}
    lasts = {term: k for k, term in enumerate(terms)}
    return {*firsts.values(), *lasts.values()}


def _some(batch: Batch, samples: set[int]) -> Batch:
    """Return some samples of a batch, all of one that cannot be cut."""
    return take(batch, torch.tensor(sorted(samples, reverse=True))) if is_cuttable(batch) else batch


def uneven_parts(problem: Problem) -> Problem:
    """Return the same problem with every batch cut in two uneven ones, unless samples act on each other."""
    if not problem.separable:
        return problem
    return problem.on(tuple(part for batch in problem.batches for part in two_parts(batch)), l2=problem.l2)


def two_parts(batch: Batch) -> tuple[Batch, ...]:
    """Cut a batch in two, as long as it has two samples; equal parts would hide a mean of means."""
    count = sample_count(batch)
    if count == 1 or not is_cuttable(batch):
        return (batch,)
    cut = max(1, count // 3)
    return take(batch, slice(0, cut)), take(batch, slice(cut, None))


def _extremes(batches: tuple[Batch, ...]) -> list[tuple[int, int]]:
    """Find samples, as (batch, place), with the smallest, largest and commonest value of every integer tensor."""
    found: dict[tuple[int, str], tuple[float, int, int]] = {}
    common: dict[int, Tensor] = {}
    for index, batch in enumerate(batches):
        for k, leaf in enumerate(tree_leaves(batch) if has_rows(batch) else []):
            if not isinstance(leaf, Tensor) or leaf.is_floating_point() or leaf.is_complex() or leaf.numel() == 0:
                continue
            flat = leaf.reshape(len(leaf), -1).long()
            mode = common.setdefault(k, flat.flatten().mode().values)
            scores = {"low": -flat.amin(1), "high": flat.amax(1), "common": (flat == mode).sum(1)}
            for kind, score in scores.items():
                best = (float(score.max()), index, int(score.argmax()))
                found[k, kind] = max(found.get((k, kind), best), best, key=lambda entry: entry[0])
    return [(index, sample) for _, index, sample in found.values()]


class TrialPoint:
    """A problem on a few samples near its weights: the same point in float64 and in the run's type.

    Attributes:
        whole: the batches that those of the problem are parts of.
        exact: in float64.
        in_run: in the run's type.

    Args:
        few: the problem.
        whole: the batches that its own are parts of.
        attempt: which of the shifts.
        dtype: of the run.
        device: of the run.
    """

    def __init__(self, few: Problem, whole: tuple[Batch, ...], attempt: int, dtype: torch.dtype, device: str) -> None:
        self.whole = whole
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

    @property
    def type_name(self) -> str:
        """The run's type: "float32" or "float64"."""
        return str(self.in_run.dtype).removeprefix("torch.")
