"""The engine for layers: rows of a weight W in z = a W' + b, applied once to each sample, by matrix products.

A row of W, and the gradient it belongs to, factorise: dL / dW_ij = sum_n delta_ni a_nj with delta = dL / dz. Hence

    H[(i, j), q] = sum_n a_nj Y_n(i, q),        Y_n(i, q) = d g_nq / d z_ni,

with g_n the gradient of sample n's loss, for columns q that are not upstream of W. Where the column is itself an entry
(p, k) of such a weight, with input a' and delta',

    Y_n(i, (p, k)) = d delta'_np / d z_ni  a'_nk  +  delta'_np  d a'_nk / d z_ni,

which needs double backward in the d_out directions of z instead of the d_out d_in of W; all that is left is one matrix
product a' Y for every unit i. This is second-order back-propagation by stages (Mizutani, Dreyfus and Demmel, 2005).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import debug_unwrap, grad, vjp, vmap
from torch.overrides import TorchFunctionMode

from pipeline.data import Batch, sample_count
from pipeline.engines.jacrev import Jacrev
from pipeline.layout import Parameter
from pipeline.problem import PlacedProblem

_ByPlace = dict[int, Tensor]

PANEL_BYTES = 4 * 2**20  # of Y formed at a time, so that the product finds it in the cache
FEWEST_SAMPLES = 64  # of a panel: the inner dimension of the product
MOST_UNITS = 16  # pulled back together: a bias has one for every row


class NotFactoredError(NotImplementedError):
    """A parameter is not used as this engine needs it."""


class _Linears(TorchFunctionMode):
    """Notes every application z = a W' + b of known parameters, and perturbs z.

    Args:
        names: of parameters, by identity.
        shifts: added to each z in turn, by place; none where a place is missing.
    """

    def __init__(self, names: Mapping[int, str], shifts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._names, self._shifts = names, shifts
        self.uses: list[_Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return z
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        weight, bias = (self._names.get(id(given.get(kind))) for kind in ("weight", "bias"))
        if weight is None and bias is None:
            return z
        place = len(self.uses)
        self.uses.append(_Use(weight, bias, given["input"], z.shape))
        return z + self._shifts[place] if place in self._shifts else z


@dataclass(frozen=True)
class _Use:
    """An application of a weight: names of weight and bias, a, and the shape of z."""

    weight: str | None
    bias: str | None
    input: Tensor
    shape: torch.Size


@dataclass(frozen=True)
class _Stage:
    """Rows or columns of one parameter, at the place where it is applied.

    Attributes:
        span: flat indices.
        first: of them, within the parameter.
        place: among the applications.
        left: a for a weight, None for a bias.  # shape: (samples, inputs)
    """

    span: range
    first: int
    place: int
    left: Tensor | None

    @property
    def width(self) -> int:
        """Entries of a unit."""
        return 1 if self.left is None else self.left.shape[1]

    @property
    def units(self) -> range:
        """Outputs that the entries belong to."""
        return range(self.first // self.width, (self.first + len(self.span) - 1) // self.width + 1)

    def inside(self, unit: int) -> tuple[slice, slice]:
        """Give a unit's entries among these, and their places within the unit."""
        low, high = max(unit * self.width, self.first), min((unit + 1) * self.width, self.first + len(self.span))
        return slice(low - self.first, high - self.first), slice(low - unit * self.width, high - unit * self.width)

    def whole(self, entries: Tensor) -> Tensor:
        """Cut the entries of whole units to these.  # shape: (..., units * width) to (..., entries)."""
        skipped = self.first - self.units.start * self.width
        return entries[..., skipped : skipped + len(self.span)]


class _Stages:
    """The applications of linear layers in one micro-batch, as stages of back-propagation."""

    def __init__(self, problem: PlacedProblem, batch: Batch) -> None:
        self._problem, self.batch = problem, batch
        self._names = {id(tensor): name for name, tensor in problem.parameters.items()}
        self.uses, _ = self._evaluate({})
        if any(debug_unwrap(use.input) is not use.input for use in self.uses):
            raise NotFactoredError("layers are applied inside a transform of torch.func")
        self.inputs = [use.input.detach() for use in self.uses]
        self.samples = sample_count(batch)

    def is_factored(self, name: str) -> bool:
        """Say whether a parameter is applied exactly once, to each sample, as a linear layer."""
        return self._fault(name) is None

    def stage(self, parameter: Parameter, span: range) -> _Stage:
        """Give rows or columns of a parameter at their place.

        Args:
            parameter: which.
            span: flat indices.

        Returns:
            The stage.

        Raises:
            NotFactoredError: it is not applied exactly once, to each sample, as a linear layer.
        """
        if fault := self._fault(parameter.name):
            raise NotFactoredError(f"`{parameter.name}` is applied {fault}")
        (place,) = self._places(parameter.name)
        is_weight = self.uses[place].weight == parameter.name
        return _Stage(span, span.start - parameter.offset, place, self.inputs[place] if is_weight else None)

    def _places(self, name: str) -> list[int]:
        return [k for k, use in enumerate(self.uses) if name in {use.weight, use.bias}]

    def _fault(self, name: str) -> str | None:
        """Say what keeps a parameter from being factored."""
        places = self._places(name)
        if len(places) != 1:
            return f"{len(places)} times as a linear layer, expected once"
        shape = tuple(self.uses[places[0]].input.shape)
        if len(shape) != 2 or shape[0] != self.samples:
            return f"to an input of shape {shape}, expected one row for each of {self.samples} samples"
        return None

    def deltas(self, places: Sequence[int]) -> _ByPlace:
        """Give delta = dL / dz at some places.  # shape of each: (samples, outputs)."""
        deltas: _ByPlace = grad(lambda shifts: self._evaluate(shifts)[1])(self._zeros(places))
        return deltas

    def pull_back(self, place: int, places: Sequence[int]) -> Callable[[Tensor], tuple[_ByPlace, _ByPlace]]:
        """Linearise delta at a place.

        Args:
            place: of the rows.
            places: of the columns, none before the rows'.

        Returns:
            From directions of delta  # shape: (units, samples, outputs), the derivatives d delta' / dz and d a' / dz of
            all columns' places in these directions.  # shape of each: (units, samples, outputs' or inputs')
        """
        later = [k for k in places if k != place]

        def delta(shifts: dict[int, Tensor], weights: dict[int, Tensor]) -> Tensor:
            def lagrangian(shift: Tensor) -> Tensor:
                uses, loss = self._evaluate({**shifts, place: shift})
                # d a' / dz as a second derivative: of <w, a'> with respect to w and z.
                return loss + sum((weights[k] * uses[k].input).sum() for k in later)

            found: Tensor = grad(lagrangian)(shifts[place] if place in shifts else self._zeros([place])[place])
            return found

        weights = {k: torch.zeros_like(self.inputs[k]) for k in later}
        return vmap(vjp(delta, self._zeros(places), weights)[1])

    def _zeros(self, places: Sequence[int]) -> dict[int, Tensor]:
        return {k: self.inputs[k].new_zeros(self.uses[k].shape) for k in places}

    def _evaluate(self, shifts: Mapping[int, Tensor]) -> tuple[list[_Use], Tensor]:
        """Evaluate the un-normalised loss with perturbed z."""
        with _Linears(self._names, shifts) as watched:
            loss = self._problem.loss_sum({}, self.batch)[0]
        return watched.uses, loss


@dataclass(frozen=True)
class Factored:
    """Rows of weights and biases of linear layers, applied once to each sample.

    Columns of all other parameters are left to `Jacrev`, from whichever side has fewer entries.

    Attributes:
        problem: the problem.
        row_group: rows computed at a time; their units are pulled back together.
    """

    problem: PlacedProblem
    row_group: int

    def add(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add one micro-batch's part of H[rows, cols]; see `Engine.add`.

        Raises:
            NotFactoredError: rows are of a parameter that is not applied once, to each sample, as a linear layer.
        """
        if not self.problem.problem.separable:
            raise NotFactoredError("samples act on each other")
        stages = _Stages(self.problem, batch)
        for parameter, segment in self.problem.layout.segments(rows):
            start = segment.start - rows.start
            self._add_segment(stages, parameter, segment, cols, out[start : start + len(segment)])

    def _add_segment(self, stages: _Stages, parameter: Parameter, rows: range, cols: range, out: Tensor) -> None:
        """Add rows that belong to one parameter."""
        stage = stages.stage(parameter, rows)
        later: list[_Stage] = []
        for other, span in self.problem.layout.segments(cols):
            part = out[:, span.start - cols.start : span.stop - cols.start]
            if not stages.is_factored(other.name):
                self._add_general(stages.batch, rows, span, part)
                continue
            column = stages.stage(other, span)
            if column.place < stage.place:  # the rows' input depends on it: the other way round
                mirror = out.new_zeros(len(span), len(rows))
                self._add_stage(stages, column, [stage], mirror, rows.start)
                part += mirror.T
            else:
                later.append(column)
        if later:
            self._add_stage(stages, stage, later, out, cols.start)

    def _add_general(self, batch: Batch, rows: range, cols: range, out: Tensor) -> None:
        """Add columns of a parameter that does not factorise."""
        engine = Jacrev(self.problem, self.row_group)
        if len(cols) >= len(rows):
            engine.add(batch, rows, cols, out)
            return
        mirror = out.new_zeros(len(cols), len(rows))
        engine.add(batch, cols, rows, mirror)
        out += mirror.T

    def _add_stage(self, stages: _Stages, stage: _Stage, columns: list[_Stage], out: Tensor, origin: int) -> None:
        """Add rows of one stage against columns of that and later ones; `origin` is the flat index of out's first."""
        places = sorted({c.place for c in columns})
        deltas, pull_back = stages.deltas(places), stages.pull_back(stage.place, places)
        for group in _groups(stage.units, min(MOST_UNITS, max(1, self.row_group // stage.width))):
            directions = out.new_zeros(len(group), *stages.uses[stage.place].shape)
            directions[torch.arange(len(group)), :, torch.arange(group.start, group.stop)] = 1
            with torch.no_grad():  # else each pull-back would keep a graph for a third derivative
                dz, da = pull_back(directions)
            if stage.left is None:
                rows = slice(group.start - stage.first, group.stop - stage.first)
                for c in columns:
                    part = out[rows, c.span.start - origin : c.span.stop - origin]
                    part += _summed(c, deltas[c.place], dz[c.place], da.get(c.place))
                continue
            for k, unit in enumerate(group):
                one = {place: (deltas[place], dz[place][k], da[place][k] if place in da else None) for place in places}
                rows, entries = stage.inside(unit)
                for run in _runs(columns):
                    part = out[rows, run[0].span.start - origin : run[-1].span.stop - origin]
                    _multiply(part, stage.left[:, entries], run, one)


def _multiply(out: Tensor, left: Tensor, columns: Sequence[_Stage], unit: dict[int, Any]) -> None:
    """Add a' Y of one unit, panel by panel.  # shape of out: (entries of the unit, columns)."""
    for panel in _panels(len(left), out.shape[1] * out.element_size()):
        Y = out.new_empty(panel.stop - panel.start, out.shape[1])
        start = columns[0].span.start
        for c in columns:
            _write_panel(Y[:, c.span.start - start : c.span.stop - start], c, panel, *unit[c.place])
        out.addmm_(left[panel].T, Y)


def _summed(c: _Stage, delta: Tensor, dz: Tensor, da: Tensor | None) -> Tensor:
    """Give Y summed over samples, for the row of a bias.  # shape: (units of the row, columns)."""
    outputs = slice(c.units.start, c.units.stop)
    if c.left is None:
        return dz[:, :, outputs].sum(1)
    Y = torch.einsum("unp,nk->upk", dz[:, :, outputs], c.left)
    if da is not None:
        Y += torch.einsum("np,unk->upk", delta[:, outputs], da)
    return c.whole(Y.flatten(1))


def _write_panel(Y: Tensor, c: _Stage, panel: slice, delta: Tensor, dz: Tensor, da: Tensor | None) -> None:
    """Write Y of one unit for some samples.  # shape of Y: (samples of the panel, columns)."""
    outputs = slice(c.units.start, c.units.stop)
    if c.left is None:
        Y.copy_(dz[panel, outputs])
        return
    shape = (len(Y), len(c.units), c.width)
    is_whole = len(c.span) == len(c.units) * c.width
    # In place, where the columns are whole units: a temporary would cost as much as the product.
    full = Y.as_strided(shape, (Y.stride(0), c.width, 1), Y.storage_offset()) if is_whole else Y.new_empty(shape)
    torch.mul(dz[panel, outputs, None], c.left[panel, None], out=full)
    if da is not None:
        full.addcmul_(delta[panel, outputs, None], da[panel, None])
    if not is_whole:
        Y.copy_(c.whole(full.flatten(1)))


def _runs(columns: Sequence[_Stage]) -> Iterator[list[_Stage]]:
    """Group columns that follow on each other."""
    run: list[_Stage] = []
    for column in columns:
        if run and run[-1].span.stop != column.span.start:
            yield run
            run = []
        run.append(column)
    yield run


def _groups(units: range, size: int) -> Iterator[range]:
    for start in range(units.start, units.stop, size):
        yield range(start, min(start + size, units.stop))


def _panels(samples: int, row_bytes: int) -> Iterator[slice]:
    """Cut samples into panels of Y that stay in the cache."""
    size = max(FEWEST_SAMPLES, PANEL_BYTES // row_bytes)
    for start in range(0, samples, size):
        yield slice(start, min(start + size, samples))
