"""The judge: whether a loss has a Hessian, and which, from a model and a loss in plain torch alone.

Everything is evaluated in float64 on a copy of the model whose parameters are changed in place.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from evaluate import Loss, Span, duplicate
from oracle import block_error, dense_hessian
from scales import NOISE, RANDOM_SHIFTS, bounds, entry_error
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))  # f' of fourth order, over the step
AGREEMENT = 1e-7  # of two steps, relative to the entry
ROUNDING = 1e-10  # of the largest entry: what differences of rounded gradients leave
GRADIENT_TOLERANCE = 1e-6  # of the largest entry of the gradient
TOLERANCE = 1e-6  # block error between autograd and differences
INCONCLUSIVE = 0.02  # of all entries
DIFFERENCE_ULPS = math.ceil(ROUNDING / np.finfo(np.float64).eps)
MOVED = 0.01
PASSES = 25  # a branch taken once in five is missed once in 250
GAPS = 100  # between two steps: what the better of them may be off
ENTRY_TOLERANCE = 1e-4  # of an entry of autograd against differences, over the scales of its row and its column
LARGE = 1e3  # a Hessian entry over the gradient's, beyond which a kink is suspected


@dataclass(frozen=True)
class Truth:
    """What is true of a loss.

    Attributes:
        kind: "computable" where autograd agrees with differences; "kinked" where the loss has a kink at these very
            weights and none nearby, so that autograd's choice of a side is all there is; "inconclusive" where
            differences do not agree among themselves.
        reason: why not computable.
        differences: the Hessian by differences; NaN where no two steps agree.
        autograd: by plain double backward.
        sums: of "mean" and "sum", what the loss is over samples.
        layout: of the parameters.
        conclusive: fraction of entries on which two steps agree.
        noise: of each entry of `autograd`, as far as rounding may take it.
        gap: of each entry of `differences`, between the two steps that agree best.
    """

    kind: Literal["computable", "kinked", "uncomputable", "inconclusive"]
    reason: str
    differences: np.ndarray | None
    autograd: np.ndarray | None
    sums: frozenset[str]
    layout: tuple[Span, ...]
    conclusive: float = 0.0
    noise: np.ndarray | None = None
    gap: np.ndarray | None = None

    def error(self, found: np.ndarray) -> float:
        """Block error against differences, where they are conclusive."""
        assert self.differences is not None
        known = np.isfinite(self.differences)
        truth = np.where(known, self.differences, 0.0)
        return block_error(np.where(known, found, 0.0), truth, self.layout, ulps=DIFFERENCE_ULPS)

    def entry_error(self, found: np.ndarray) -> float:
        """Error of an entry against double backward, over the scales of its row and its column."""
        assert self.autograd is not None
        assert self.noise is not None
        return entry_error(found, self.autograd, self.noise)

    def off_differences(self, found: np.ndarray) -> float:
        """Error of an entry against differences, beyond what these resolve."""
        assert self.differences is not None
        assert self.gap is not None
        known = np.isfinite(self.differences) & np.isfinite(self.gap)
        truth = np.where(known, self.differences, 0.0)
        noise = np.where(known, GAPS * self.gap, 0.0) + (0.0 if self.noise is None else self.noise)
        return entry_error(np.where(known, found, 0.0), truth, noise)


def truth(hazard: Any, *, nearby: bool = False, of_itself: bool = False) -> Truth:
    """Derive whether the loss of a hazard has a Hessian that double backward gives, and which.

    At its weights, or with all of them moved a little; of its twin where it has one, or of itself all the same.
    """
    with _random_state_kept():
        judged = hazard.model if of_itself or hazard.twin is None else hazard.twin
        if any(is_lazy(p) for p in judged.parameters()):
            return Truth("uncomputable", "a parameter has no shape yet", None, None, frozenset(), ())
        model = duplicate(judged)
        for p in model.parameters() if nearby else ():
            p.data += MOVED * torch.linspace(1, 2, p.numel()).reshape(p.shape).to(p)
        found = _Finding(model, hazard)
        try:
            found.derive()
        except _Kink as reason:
            is_one = nearby or truth(hazard, nearby=True).kind == "computable"
            found.kind, found.reason = "kinked" if is_one else "uncomputable", str(reason)
            found.double_backward()
        except _Uncomputable as reason:
            found.kind, found.reason = "uncomputable", str(reason)
        return found.truth()


class _Uncomputable(Exception):  # noqa: N818  a verdict
    pass


class _Kink(_Uncomputable):
    pass


class _Finding:
    """A truth in the making."""

    def __init__(self, model: nn.Module, hazard: Any) -> None:
        self.model, self.hazard = model, hazard
        self.loss, self.kind, self.reason = self.fresh(), "computable", ""
        self.differences: np.ndarray | None = None
        self.autograd: np.ndarray | None = None
        self.sums: frozenset[str] = frozenset()
        self.conclusive = 0.0
        self.gap: np.ndarray | None = None
        self.noise: np.ndarray | None = None

    def fresh(self, shifted: int = 0) -> Loss:
        """Return a loss of its own, its parameters shifted by an ulp or two."""
        loss = Loss(self.model, self.hazard.whole_loss, self.hazard.whole_batch, self.hazard.arguments.get("params"))
        if shifted:
            loss.shift_by_ulps(shifted)
        return loss

    def truth(self) -> Truth:
        return Truth(
            self.kind,
            self.reason,
            self.differences,
            self.autograd,
            self.sums,
            self.loss.layout,
            self.conclusive,
            self.noise,
            self.gap,
        )

    def derive(self) -> None:
        self._deterministic()
        self.sums = _sums(self.loss)
        if any(p.is_complex() for p in self.loss.parameters):
            raise _Uncomputable("a parameter is complex")
        if not self.loss.parameters:
            raise _Uncomputable("no parameter is selected")
        differences = self._differences()
        self.conclusive = float(np.isfinite(differences).mean())
        if self.conclusive >= 1 - INCONCLUSIVE:
            self.differences = differences
        self.double_backward()
        if self.differences is None:
            self.kind, self.reason = "inconclusive", f"two steps agree on {self.conclusive:.1%} of entries"
        elif (error := self.truth().error(self.autograd)) > TOLERANCE:
            raise _Uncomputable(f"autograd is off by {error:.1e}")
        elif (error := self.truth().off_differences(self.autograd)) > ENTRY_TOLERANCE:
            raise _Uncomputable(f"an entry of autograd is off by {error:.1e}")

    def _deterministic(self) -> None:
        try:
            values = [self.loss.value() for _ in range(PASSES)]
        except Exception as error:
            raise _Uncomputable(f"raises {type(error).__name__}: {error}") from error
        if not all(math.isfinite(v) for v in values):
            raise _Uncomputable("the loss is not finite")
        if max(values) - min(values) > 1e-12 * max(map(abs, values)):
            raise _Uncomputable("not deterministic")
        # A state that follows the parameters (a power iteration) is settled only where it has been before.
        moved = [self.loss.value(shift=MOVED) for _ in range(2)]
        moved.append(self.fresh().value(shift=MOVED))  # a cache is right where it was filled
        if max(moved) - min(moved) > 1e-12 * max(map(abs, moved)):
            raise _Uncomputable("not deterministic: its state follows its parameters")
        ends = [_end_of_pass(self.loss, seed) for seed in (1, 2)]
        # Reseeding inside is deterministic: then the state after a pass does not depend on that before.
        for before, after, other in zip(*ends[0], ends[1][1], strict=True):
            if before != after and after != other:
                raise _Uncomputable("draws random numbers")

    def _differences(self) -> np.ndarray:
        """Differentiate loss and gradient along every parameter entry; refuse a wrong gradient."""
        try:
            value, gradient = self.loss.with_gradient()
        except Exception as error:
            raise _Uncomputable(f"autograd raises {type(error).__name__}: {error}") from error
        if not np.isfinite(gradient).all():
            raise _Uncomputable("the gradient is not finite")
        columns, gaps, slopes = [], [], []
        steps = self.loss.steps()
        for entry in self.loss.entries():
            column, gap, slope = _column(self.loss, entry, value, gradient, steps)
            columns.append(column)
            gaps.append(gap)
            slopes.append(slope)
        slope, kink = np.array(slopes).T
        scale = np.abs(np.concatenate([gradient, slope[np.isfinite(slope)]])).max(initial=0) + ROUNDING * abs(value)
        for name, wrong in (("the gradient is not the loss's", slope - gradient), ("the loss has a kink", kink)):
            if (worst := np.nanmax(np.abs(wrong), initial=0)) > GRADIENT_TOLERANCE * scale:
                raise _Kink(f"{name} (by {worst:.1e} of {scale:.1e})")
        matrix, self.gap = np.stack(columns, axis=1), np.stack(gaps, axis=1)
        # Below this there is rounding alone, in which a zero block would be compared with noise.
        small = np.abs(matrix) < ROUNDING / 10 * scale
        self.gap = np.maximum(self.gap, np.where(small, np.abs(matrix), 0.0))
        return np.where(small, 0.0, matrix)

    def double_backward(self) -> None:
        # `value` and `with_gradient` may have left tensors of a graph on the copy.
        try:
            self.autograd = _dense(self.fresh())
            if not np.isfinite(self.autograd).all():
                raise _Uncomputable("second derivatives are not finite")
            others = [_dense(self.fresh(1 + shift)) for shift in range(RANDOM_SHIFTS)]
        except _Uncomputable:
            raise
        except Exception as error:
            raise _Uncomputable(f"autograd raises {type(error).__name__}: {error}") from error
        spread = np.max([np.abs(other - self.autograd) for other in others], axis=0)
        self.noise = NOISE * bounds(np.nan_to_num(spread, posinf=0.0))


def _dense(loss: Loss) -> np.ndarray:
    return dense_hessian(loss.model, loss.whole_loss, loss.batch, list(loss.names))


def _column(
    loss: Loss, entry: tuple[int, int], value: float, gradient: np.ndarray, steps: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, tuple]:
    """A column of H, NaN where no two steps agree; the gap; the loss's slope, and by how much its two sides differ."""
    scale = np.abs(gradient).max(initial=0)
    best, gap = np.full(gradient.shape, np.nan), np.full(gradient.shape, np.inf)
    slopes, kinks, columns = [], [], []
    for step in steps:
        values, gradients = {0: value}, []
        for k, weight in STENCIL:
            values[k], shifted = loss.with_gradient(entry, k * step)
            gradients.append(weight / step * shifted)
        columns.append(np.sum(gradients, axis=0))
        slopes.append(sum(weight / step * values[k] for k, weight in STENCIL))
        kinks.append((4 * values[1] - values[2] + 4 * values[-1] - values[-2] - 6 * value) / (2 * step))
        if len(columns) == 1:
            continue
        new, scale_of = np.abs(columns[-1] - columns[-2]), np.abs(columns[-1])
        closer = new < gap
        # Rounding grows as 1 / step and truncation as its fourth power: of the first three steps the second is best.
        best, gap = np.where(closer, columns[max(len(columns) - 2, 1)], best), np.where(closer, new, gap)
        # A jump gives 1 / step: large, never agreeing, and no measure for the other entries.
        tame = scale_of[scale_of < LARGE * scale]
        noise = ROUNDING * (scale + tame.max(initial=0))
        settled = gap <= np.maximum(AGREEMENT * np.abs(best), noise)
        if settled.all() and _settled(slopes, scale, value, steps) is not None:
            break
    slope, kink = _settled(slopes, scale, value, steps), _settled(kinks, scale, value, steps)
    return (
        np.where(settled, best, np.nan),
        gap,
        (math.nan if slope is None else slope, math.nan if kink is None else kink),
    )


def _settled(numbers: list[float], scale: float, value: float, steps: tuple[float, ...]) -> float | None:
    """The first number that the next one, of a smaller step, confirms."""
    for step, a, b in zip(steps[1:], numbers, numbers[1:], strict=False):
        if abs(a - b) <= 1e-7 * max(abs(a), scale) + 1e-15 * abs(value) / step:
            return a
    return None


def _sums(loss: Loss) -> frozenset[str]:
    """Whether the whole batch's loss is the mean, or the sum, of those of uneven parts, and of single samples."""
    n = next((len(leaf) for leaf in tree_leaves(loss.batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)
    if n == 0:
        return frozenset()
    cut = 1 + n // 3
    kinds = {"sum", "mean"}
    for parts in ((range(cut), range(cut, n)), [range(k, k + 1) for k in range(n)]):
        try:
            whole, values = loss.value(), [loss.value(_part(loss.batch, part)) for part in parts]
        except Exception:
            return frozenset()
        weighted = sum(len(part) * value for part, value in zip(parts, values, strict=True)) / n
        gaps = {"sum": whole - sum(values), "mean": whole - weighted}
        scale = max(abs(whole), *map(abs, values))
        kinds &= {kind for kind, gap in gaps.items() if abs(gap) <= 1e-9 * scale}
    return frozenset(kinds)


def _part(batch: Any, samples: range) -> Any:
    return tree_map(lambda t: t[samples.start : samples.stop] if isinstance(t, Tensor) else t, batch)


def _end_of_pass(loss: Loss, seed: int) -> tuple[list[bytes], list[bytes]]:
    """The random states before and after a pass."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    before = _random_states()
    loss.value()
    return before, _random_states()


def _random_states() -> list[bytes]:
    return [
        torch.get_rng_state().numpy().tobytes(),
        repr(np.random.get_state(legacy=True)[1:3]).encode() + np.random.get_state(legacy=True)[1].tobytes(),
        repr(random.getstate()).encode(),
    ]


@contextmanager
def _random_state_kept() -> Iterator[None]:
    saved = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(saved[0])
        np.random.set_state(saved[1])
        random.setstate(saved[2])
