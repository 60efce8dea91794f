"""Dense layers as stages of back-propagation: where each weight is applied, and derivatives from one to another."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import debug_unwrap, grad, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pipeline.data import Batch, sample_count
from pipeline.layout import Parameter
from pipeline.problem import PlacedProblem

ByPlace = dict[int, Tensor]

INPUTS_PER_POSITION = 4  # of a layer, at least, that make rows cheaper by its outputs' directions than one by one


class NotFactoredError(NotImplementedError):
    """A parameter is not used as the factored engine needs it."""


class _Linears(TorchFunctionMode):
    """Notes every application z = a W' + b of known parameters and what else they are used for, and perturbs z.

    Args:
        names: of parameters, by identity.
        shifts: added to each z in turn, by place; none where a place is missing.
    """

    def __init__(self, names: Mapping[int, str], shifts: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._names, self._shifts = names, shifts
        self.uses: list[_Use] = []
        self.otherwise: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        z = func(*args, **(kwargs or {}))
        if func is not F.linear:
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(z)):
                self.otherwise |= {self._names[id(t)] for t in tree_leaves((args, kwargs)) if id(t) in self._names}
            return z
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        weight, bias = (self._names.get(id(given.get(kind))) for kind in ("weight", "bias"))
        if name := self._names.get(id(given["input"])):
            self.otherwise.add(name)
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
class Piece:
    """Entries of a parameter that are a rectangle of units and inputs.

    Attributes:
        entries: consecutive, among those of the stage.
        units: outputs i of the layer.
        inputs: j, of each of them.
    """

    entries: slice
    units: range
    inputs: slice


@dataclass(frozen=True)
class Stage:
    """Rows or columns of one parameter, at the place where it is applied.

    Attributes:
        name: of the parameter.
        span: flat indices.
        first: of them, within the parameter.
        place: among the applications.
        input: a for a weight, ones for a bias.  # shape: (samples, positions, inputs)
        is_weight: whether it is a weight.
    """

    name: str
    span: range
    first: int
    place: int
    input: Tensor
    is_weight: bool

    @property
    def positions(self) -> int:
        """T, of each sample, at which it is applied."""
        return self.input.shape[1]

    def pieces(self) -> Iterator[Piece]:
        """Cut the entries into whole units, and what is before and after them."""
        width, start, stop = self.input.shape[2], self.first, self.first + len(self.span)
        while start < stop:
            unit, j = divmod(start, width)
            if j or stop - start < width:
                units, count = range(unit, unit + 1), min(width - j, stop - start)
            else:
                units = range(unit, stop // width)
                count = len(units) * width
            yield Piece(slice(start - self.first, start - self.first + count), units, slice(j, min(j + count, width)))
            start += count


class Stages:
    """The applications of dense layers in one micro-batch.

    Args:
        problem: the problem.
        batch: of its type, on its device.

    Raises:
        NotFactoredError: layers are applied inside a transform of torch.func.
    """

    def __init__(self, problem: PlacedProblem, batch: Batch) -> None:
        self._problem, self.batch = problem, batch
        self._names = {id(tensor): name for name, tensor in problem.parameters.items()}
        with _Linears(self._names, {}) as watched:
            problem.loss_sum({}, batch)
        self._uses, self._otherwise = watched.uses, watched.otherwise
        if any(debug_unwrap(use.input) is not use.input for use in self._uses):
            raise NotFactoredError("layers are applied inside a transform of torch.func")
        self._inputs = [use.input.detach() for use in self._uses]
        self._samples = sample_count(batch)

    def require_cheap_rows(self, name: str) -> None:
        """Refuse the rows of a layer with few inputs at many positions: their directions are about as many.

        Measured on a transformer with 16 positions: 64 inputs take half the time of `jacrev`, 32 inputs 1.6 times it.

        Args:
            name: of the parameter; a bias goes with its weight.

        Raises:
            NotFactoredError: `jacrev` is cheaper.
        """
        use = self._uses[self._places(name)[0]]
        positions = math.prod(use.shape[1:-1])
        inputs = use.input.shape[-1] if use.weight else 1
        if positions > 1 and inputs < INPUTS_PER_POSITION * positions:
            raise NotFactoredError(f"`{name}`: {positions} positions of {inputs} inputs, jacrev is cheaper")

    def is_factored(self, name: str) -> bool:
        """Say whether a parameter is applied exactly once, at all positions of each sample, as a dense layer."""
        return self._fault(name) is None

    def stage(self, parameter: Parameter, span: range) -> Stage:
        """Give rows or columns of a parameter at their place.

        Args:
            parameter: which.
            span: flat indices.

        Returns:
            The stage.

        Raises:
            NotFactoredError: it is not applied exactly once as a dense layer.
        """
        if fault := self._fault(parameter.name):
            raise NotFactoredError(f"`{parameter.name}` is applied {fault}")
        (place,) = self._places(parameter.name)
        is_weight = self._uses[place].weight == parameter.name
        a = _by_position(self._inputs[place], 1)
        if not is_weight:
            a = a.new_ones(*a.shape[:2], 1)
        return Stage(parameter.name, span, span.start - parameter.offset, place, a, is_weight)

    def _places(self, name: str) -> list[int]:
        return [k for k, use in enumerate(self._uses) if name in {use.weight, use.bias}]

    def _fault(self, name: str) -> str | None:
        """Say what keeps a parameter from being factored."""
        if name in self._otherwise:
            return "by other operations than dense layers"
        places = self._places(name)
        if len(places) != 1:
            return f"{len(places)} times as a dense layer, expected once"
        shape = tuple(self._uses[places[0]].input.shape)
        if len(shape) < 2 or shape[0] != self._samples or len(self._uses[places[0]].shape) != len(shape):
            return f"to an input of shape {shape}, expected rows for each of {self._samples} samples"
        return None

    def deltas(self, places: Sequence[int]) -> ByPlace:
        """Give delta = dL / dz at some places.  # shape of each: (samples, positions, outputs)."""
        deltas: ByPlace = grad(lambda shifts: self._evaluate(shifts)[1])(self._zeros(places))
        return {place: _by_position(delta, 1) for place, delta in deltas.items()}

    def pull_back(self, place: int, places: Sequence[int]) -> Callable[[range], tuple[ByPlace, ByPlace]]:
        """Linearise delta at a place.

        Args:
            place: of the rows.
            places: of the columns, none before the rows'.

        Returns:
            From units of the rows, the derivatives d delta' / dz and d a' / dz of all columns' places in the directions
            of these units at each position; the latter of later places only.
            # shape of each: (units, positions, samples, positions', outputs' or inputs')
        """
        later = [k for k in places if k != place]

        def delta(shifts: dict[int, Tensor], weights: dict[int, Tensor]) -> Tensor:
            def lagrangian(shift: Tensor) -> Tensor:
                uses, loss = self._evaluate({**shifts, place: shift})
                # d a' / dz as a second derivative: of <w, a'> with respect to w and z.
                return loss + sum((weights[k] * uses[k].input).sum() for k in later)

            found: Tensor = grad(lagrangian)(shifts[place] if place in shifts else self._zeros([place])[place])
            return found

        weights = {k: torch.zeros_like(self._inputs[k]) for k in later}
        pulled = vmap(vjp(delta, self._zeros(places), weights)[1])

        def of_units(units: range) -> tuple[ByPlace, ByPlace]:
            shape = self._uses[place].shape
            z = _by_position(self._inputs[place].new_zeros(shape), 1)
            positions = z.shape[1]
            ones = z.new_zeros(len(units), positions, *z.shape)
            ones.diagonal(dim1=1, dim2=3)[torch.arange(len(units)), :, torch.arange(units.start, units.stop)] = 1
            with torch.no_grad():  # else each pull-back would keep a graph for a third derivative
                found = pulled(ones.reshape(-1, *shape))
            dz, da = (
                {k: _by_position(t.unflatten(0, (len(units), positions)), 3) for k, t in part.items()} for part in found
            )
            return dz, da

        return of_units

    def _zeros(self, places: Sequence[int]) -> ByPlace:
        return {k: self._inputs[k].new_zeros(self._uses[k].shape) for k in places}

    def _evaluate(self, shifts: Mapping[int, Tensor]) -> tuple[list[_Use], Tensor]:
        """Evaluate the un-normalised loss with perturbed z."""
        with _Linears(self._names, shifts) as watched:
            loss = self._problem.loss_sum({}, self.batch)[0]
        return watched.uses, loss


def _by_position(tensor: Tensor, dim: int) -> Tensor:
    """Give the dimensions from `dim` to the last but one as one, of positions; one position where there are none."""
    return tensor.unsqueeze(dim) if tensor.ndim == dim + 1 else tensor.flatten(dim, -2)
