"""Engines against plain double backward, on rows of every parameter: the first that is right is taken."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.engines.registry import ENGINES, Engine
from pipeline.engines.stages import Application
from pipeline.errors import ProblemError, in_words
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.parameters import Parameter
from pipeline.preflight.trial_point import TrialPoint
from pipeline.problem.double_backward import (
    Vector,
    differenced_products,
    hessian_vector_products,
    loss_and_gradient,
)
from pipeline.problem.problem import PlacedProblem
from pipeline.problem.scales import Yardstick, directions

MANY = 8  # parameters, from which on of each
FEW_ROWS = 8  # are given to an engine, and else
ROWS = 32
SLOW_SECONDS, SLOW_ROWS = 0.1, 4  # of one product in float64, beyond which so many have to do
UNITS, MOST_ROWS = 2, 256  # of a weight, whole, where they are not more rows than this
ROW_BYTES = 64 * 2**20  # that these may take
TRUTH_BYTES = 256 * 2**20  # of products by plain double backward that are held
DIRECTIONS = 2  # random combinations of these rows, compared with plain double backward
ENGINE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # against plain double backward
ENGINE_ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}  # of the largest product, in blocks that are zero
MOST_UNCERTAIN = 1e-5  # block error let pass in float64, where the run is in single precision
FEWER = 2  # times, directions than weights, from which on a layer at positions may be worth its products
NOISE = 8  # times the uncertainty of double backward
DIFFERENCES = 1e-5  # block error let pass where differences of the gradient are all there is


@dataclass(frozen=True)
class _Error:
    """The largest error of a block, and where."""

    value: float
    dtype: torch.dtype
    row: str
    col: str

    def __str__(self) -> str:
        return f"{self.value:.1e} in H[{self.row}, {self.col}] ({str(self.dtype).removeprefix('torch.')})"


@dataclass(frozen=True)
class _Picked:
    """Rows of a parameter, in runs, and combinations of them.  # shape of these: (DIRECTIONS, rows)."""

    runs: list[range]
    rows: list[int]
    mixing: Vector


class Trial:
    """Engines against plain double backward, at one point.

    Args:
        point: few samples at moved weights.
        known: how parameters are applied to a first batch of the run's size, which few samples need not show.
        measure: what errors are held against.
        candidates: names of engines, fastest first.
        by_differences: whether products by differences are what engines are held against.
    """

    def __init__(
        self,
        point: TrialPoint,
        known: Mapping[str, Application],
        measure: Yardstick,
        candidates: Sequence[str],
        *,
        by_differences: bool,
    ) -> None:
        self._point, self._layout = point, point.exact.layout
        self._scales, self._rounding = measure.scales, measure.rounding
        self._by_differences = by_differences
        self._random = np.random.default_rng(0)
        start = time.process_time()  # a busy machine must not decide
        active = np.abs(self._truth(measure.directions(self._random, 1))[0]) / self._scales
        is_slow = time.process_time() - start > SLOW_SECONDS
        self._most_rows = SLOW_ROWS if is_slow else FEW_ROWS if len(self._layout) > MANY else ROWS
        self._top = float(active.max())
        self._active, self._known, self._candidates = active, known, candidates
        self._picked: dict[tuple[str, bool], _Picked] = {}
        self._truths: dict[tuple[str, bool], Vector] = {}
        self._forms: dict[str, Vector] = {}
        self._engines: dict[tuple[str, torch.dtype], Engine] = {}
        self._batches = {placed.dtype: list(placed.batches(None)) for placed in point.types}
        if point.in_run is not point.exact:  # parts of batches were tried in float64
            whole = point.in_run.problem.on(point.whole, l2=0.0)
            self._batches[point.in_run.dtype] = list(replace(point.in_run, problem=whole).batches(None))

    def _rows(self, p: Parameter, *, units: bool) -> "_Picked":
        """Choose rows of a parameter, and combinations of them: whole units, or a few rows."""
        if (p.name, units) not in self._picked:
            runs = self._units(p) if units else [self._around(p, min(self._most_rows, ROWS // 2))]
            rows = [row for run in runs for row in run]
            mixing = np.stack([directions(self._random, self._scales[rows]) for _ in range(DIRECTIONS)])
            self._picked[p.name, units] = _Picked(runs, rows, mixing)
        return self._picked[p.name, units]

    def _around(self, p: Parameter, count: int) -> range:
        """Choose consecutive rows, with the largest curvature among them."""
        count = min(count, p.size, max(2, ROW_BYTES // (8 * self._layout.size)))
        top = int(self._active[p.place].argmax())
        first = max(0, min(top - int(self._random.integers(count)), p.size - count))
        return p.span[first : first + count]

    def _units(self, p: Parameter) -> list[range]:
        """Choose whole units of a weight around the largest curvature, and a few rows anywhere: parts of units."""
        anywhere = self._around(p, self._most_rows)
        room, unit = ROW_BYTES // (8 * self._layout.size), p.size // p.shape[0] if len(p.shape) == 2 else p.size
        if UNITS * unit > min(p.size, room, MOST_ROWS):
            return [anywhere]
        start = min(int(self._active[p.place].argmax()) // unit * unit, p.size - UNITS * unit)
        whole = p.span[start : start + UNITS * unit]
        if self._most_rows < ROWS or len(whole) == p.size:
            return [whole]
        start = p.offset + int(self._random.integers(p.size - len(anywhere) + 1))
        first, second = sorted([whole, range(start, start + len(anywhere))], key=lambda run: run.start)
        if second.start < first.stop:
            return [range(first.start, max(first.stop, second.stop))]
        return [first, second]

    def choose(self, p: Parameter, uncertainty: float) -> tuple[list[str], dict[str, str]]:
        """Try engines on the rows of a parameter.

        Args:
            p: the parameter.
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
            return [self._candidates[0]], tried
        right: list[str] = []
        for name in self._candidates:
            if len(self._candidates) > 1 and TRAITS[name].by_units and not self._gains(p):
                tried[name] = "not tried: as many positions as inputs, or half as many, take as long by any other"
                continue
            try:
                errors = [self._error(name, placed, p) for placed in self._point.types]
            except Exception as error:  # whatever it is, this engine cannot be used, and the verdict says why
                tried[name] = f"raised {in_words(error)}"
                continue
            tried[name] = "off by " + ", ".join(map(str, errors))
            if TRAITS[name].by_units and p.name not in self._known:
                tried[name] += "; applied otherwise to a batch of the run's size"
                continue
            if all(error.value <= self._tolerance(error.dtype, uncertainty) for error in errors):
                right.append(name)
                if not TRAITS[name].by_units or self._known[p.name].positions == 1:
                    break
        if right:
            return right, tried
        faults = "; ".join(f"{name} {did}" for name, did in tried.items())
        is_double = self._point.in_run is self._point.exact
        elsewhere = "" if is_double else "where only float32 is off, take dtype=float64 or "
        was_asked = len(self._candidates) == 1 and TRAITS[self._candidates[0]].functional
        elsewhere += "take engine=auto, which tries others, or " if was_asked else ""
        raise ProblemError(
            f"no engine computes the rows of `{p.name}`: {faults}. Leave it out with params, or change the operation; "
            f"{elsewhere}look for lower precision inside the model (an array of NumPy's, say)"
        )

    def _gains(self, p: Parameter) -> bool:
        """Whether directions, a layer's units at all positions, are so few beside its weights that it may pay.

        What half as many save in pull-backs, products take: of transformers of width 32 such layers took 1.3 to 2.5
        times as long as by `jacrev`, of small convolutional nets as long; the latter half as long with a fifth.

        Args:
            p: the parameter.

        Returns:
            Whether to try.
        """
        at = self._known.get(p.name)
        if at is None or at.positions == 1:
            return True
        return FEWER * at.positions < self._layout[at.weight].size // at.units

    def _tolerance(self, dtype: torch.dtype, uncertainty: float) -> float:
        """Return the block error that is let pass."""
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

    def _error(self, engine: str, placed: PlacedProblem, p: Parameter) -> "_Error":
        """Compare random combinations of an engine's rows with plain double backward, block by block.

        Rows are mixed, and columns compared, in units of their own scales: an error shows that is large only beside its
        own row and column. Columns left of the parameter's own are never asked for.

        Returns:
            The worst.
        """
        units = TRAITS[engine].by_units
        found, truth = self._engine_rows(engine, placed, p), self._truth_of(p, units=units) / self._scales
        tolerance = ENGINE_TOLERANCE[placed.dtype]
        least, worst = ENGINE_ROUNDING[placed.dtype] / tolerance * self._top, _Error(0.0, placed.dtype, p.name, p.name)
        gaps = np.abs(self._rows(p, units=units).mixing @ found / self._scales[p.offset :] - truth[:, p.offset :])
        for gap, product in zip(gaps, truth, strict=True):
            for b in self._layout:
                if not b.size or b.offset < p.offset:
                    continue
                scale = float(np.abs(product[b.place]).max(initial=0.0)) + least or 1.0
                allowed = np.maximum(scale, self._rounding[b.place] * self._top / tolerance)
                here = slice(b.offset - p.offset, b.offset - p.offset + b.size)
                error = float(np.nan_to_num(gap[here] / allowed, nan=np.inf).max(initial=0.0))
                worst = max(worst, _Error(error, placed.dtype, p.name, b.name), key=lambda e: e.value)
        return worst

    def _engine_rows(self, engine: str, placed: PlacedProblem, p: Parameter) -> Vector:
        """Have an engine compute the rows chosen against all columns from the parameter's own on, batch by batch.

        Returns:
            The entries.  # shape: (rows, P - offset)
        """
        key, right = (engine, placed.dtype), range(p.offset, self._layout.size)
        if key not in self._engines:
            self._engines[key] = ENGINES[engine](placed, ROWS)
        parts = []
        for run in self._rows(p, units=TRAITS[engine].by_units).runs:
            parts.append(torch.zeros(len(run), len(right), dtype=placed.dtype, device=placed.device))
            for batch in self._batches[placed.dtype]:
                self._engines[key].add(batch, run, right, parts[-1])
        return torch.cat(parts).to("cpu", torch.float64).numpy()

    def _truth_of(self, p: Parameter, *, units: bool) -> Vector:
        """Multiply the combinations of a parameter's rows, together with those of as many others as memory allows.

        Returns:
            The products.  # shape: (DIRECTIONS, P)
        """
        if (p.name, units) not in self._truths:
            later = (q for q in self._layout if q.size and q.offset > p.offset)
            waiting = [p, *(q for q in later if units in self._ways(q))]
            some = waiting[: max(1, TRUTH_BYTES // (8 * DIRECTIONS * self._layout.size))]
            vectors = np.zeros((len(some), DIRECTIONS, self._layout.size))
            for q, vector in zip(some, vectors, strict=True):
                picked = self._rows(q, units=units)
                vector[:, picked.rows] = picked.mixing
            products = self._truth(vectors.reshape(-1, self._layout.size)).reshape(vectors.shape)
            kept = {key: product for key, product in self._truths.items() if key[1] != units}
            self._truths = kept | {(q.name, units): product for q, product in zip(some, products, strict=True)}
            for q, product in zip(some, products, strict=True):
                if units == self._ways(q)[0]:
                    self._forms[q.name] = self._form(product)
        return self._truths[p.name, units]

    def _ways(self, p: Parameter) -> list[bool]:
        """Return how rows of a parameter are tried: in whole units where an engine may go by them, else a few."""
        at = self._known.get(p.name) if any(TRAITS[name].by_units for name in self._candidates) else None
        return [False] if at is None or not self._gains(p) else [True] if at.positions == 1 else [True, False]

    def _form(self, product: Vector) -> Vector:
        """Multiply a product with the combinations of all parameters' rows.  # shape: (P's, DIRECTIONS, DIRECTIONS)."""
        picked = [self._rows(p, units=self._ways(p)[0]) for p in self._layout if p.size]
        return np.stack([product[:, rows.rows] @ rows.mixing.T for rows in picked])

    def asymmetry(self) -> float:
        """Compare u' H v with v' H u, for combinations u and v of the rows of every two parameters.

        Returns:
            The largest difference, relative to the block of the two.

        Raises:
            ProblemError: it is too large; the message names the block.
        """
        names = [p.name for p in self._layout if p.name in self._forms]
        if len(names) < sum(p.size > 0 for p in self._layout):  # an engine that raised was not compared
            return 0.0
        forms = np.stack([self._forms[name] for name in names])
        sizes = np.abs(forms).max((2, 3))
        least = float(sizes.max() * self._rounding.max()) / MOST_UNCERTAIN
        gaps = np.abs(forms - forms.transpose(1, 0, 3, 2)).max((2, 3))
        errors = gaps / np.maximum(sizes + least, np.finfo(np.float64).tiny)
        if errors.max() > MOST_UNCERTAIN:
            a, b = (names[k] for k in np.unravel_index(errors.argmax(), errors.shape))
            raise ProblemError(
                f"loss: double backward gives H[{a}, {b}] and H[{b}, {a}], which differ by {errors.max():.1e}: it is "
                "not that of one function. Change the operation, or take engine=differences"
            )
        return float(errors.max())
