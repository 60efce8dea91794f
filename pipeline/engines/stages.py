"""Weights as stages of back-propagation: where each is applied, and derivatives from one place to another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import debug_unwrap, grad, vjp

from pipeline.engines.linear_uses import Use, Uses
from pipeline.engines.pullback import pull_back_each
from pipeline.planning.parameters import Parameter
from pipeline.problem.batches import Batch, microbatches, sample_count
from pipeline.problem.problem import PlacedProblem

ByPlace = dict[int, Tensor]
_PullBack = Callable[[range], tuple[ByPlace, ByPlace]]


class NotFactoredError(NotImplementedError):
    """A parameter is not used as the factored engine needs it."""


@dataclass(frozen=True)
class Piece:
    """Entries of a parameter that are a rectangle of units and inputs.

    Attributes:
        entries: consecutive, among those of the stage.
        units: outputs i of the layer.
        inputs: j.
    """

    entries: slice
    units: range
    inputs: range


@dataclass(frozen=True)
class Stage:
    """Rows or columns of one parameter, at one place where it is applied.

    Attributes:
        name: of the parameter.
        span: flat indices.
        first: of them, within the parameter.
        place: among the applications.
        input: a for a weight, ones for a bias.  # shape: (samples, positions, inputs)
            Tokens for an embedding.  # shape: (samples, positions)
        units: outputs of the layer.
        inputs: of each.
        is_weight: whether it is a weight.
    """

    name: str
    span: range
    first: int
    place: int
    input: Tensor
    units: int
    inputs: int
    is_weight: bool

    @property
    def positions(self) -> int:
        """T, of each sample, at which it is applied."""
        return self.input.shape[1]

    @property
    def is_embedding(self) -> bool:
        """Whether entries are ordered by inputs, tokens, first and by units second."""
        return self.input.ndim == 2

    def pieces(self) -> Iterator[Piece]:
        """Cut the entries into whole units (of an embedding: tokens), and what is before and after them."""
        width, start, stop = self.units if self.is_embedding else self.inputs, self.first, self.first + len(self.span)
        while start < stop:
            outer, j = divmod(start, width)
            if j or stop - start < width:
                outers, count = range(outer, outer + 1), min(width - j, stop - start)
            else:
                outers = range(outer, stop // width)
                count = len(outers) * width
            inners = range(j, min(j + count, width))
            units, inputs = (inners, outers) if self.is_embedding else (outers, inners)
            yield Piece(slice(start - self.first, start - self.first + count), units, inputs)
            start += count


@dataclass(frozen=True)
class Application:
    """How the factored engine treats a parameter.

    Attributes:
        positions: of each sample at which it is applied, at all its places.
        units: outputs of the layer.
        unit_rows: consecutive rows that share what is pulled back from a unit: its inputs; of an embedding, whose rows
            are ordered by tokens, all.
        weight: that a bias goes with; a weight's own name.
    """

    positions: int
    units: int
    unit_rows: int
    weight: str


class Stages:
    """The applications of weights in one micro-batch.

    Args:
        problem: the problem.
        batch: of its type, on its device.

    Raises:
        NotFactoredError: layers are applied inside a transform of torch.func.
    """

    def __init__(self, problem: PlacedProblem, batch: Batch) -> None:
        self._problem, self.batch = problem, batch
        self._names = {id(tensor): name for name, tensor in problem.parameters.items()}
        watched = self._watch(batch)
        self._uses, self._otherwise = watched.uses, watched.otherwise
        self._samples = sample_count(batch)
        self._of_one = self._watch_one(batch)
        if any(debug_unwrap(use.given) is not use.given for use in self._uses):
            raise NotFactoredError("layers are applied inside a transform of torch.func")
        self._inputs: ByPlace = {}
        self._deltas: ByPlace = {}
        self._linearised: tuple[object, _PullBack] | None = None

    def _watch_one(self, batch: Batch) -> list[Use]:
        """Watch one sample alone: this tells the dimension that counts samples from one that is as long by chance."""
        try:
            return self._watch(next(microbatches((batch,), 1))).uses
        except Exception as error:
            raise NotFactoredError(f"one sample alone raises {type(error).__name__}") from error

    def _watch(self, batch: Batch) -> Uses:
        watched = Uses(self._names, {})
        with watched:
            self._problem.loss_sum({}, batch)
        return watched

    def positions(self, name: str) -> int:
        """Count the positions of each sample at which a parameter is applied, at all its places."""
        return sum(self._input(k).shape[1] for k in self._places(name))

    def application(self, name: str) -> Application | None:
        """Describe how a parameter is applied; None where the engine cannot treat it."""
        if self._fault(name):
            return None
        uses = [self._uses[k] for k in self._places(name)]
        size, units = self._problem.layout[name].size, uses[0].shape[uses[0].channel]
        unit_rows = size // units if all(use.patches for use in uses) else size
        return Application(self.positions(name), units, unit_rows, uses[0].weight or name)

    def require_fewer_directions(self, name: str) -> None:
        """Refuse rows of a layer whose directions, its units at each position, are not fewer than its weights.

        Args:
            name: of the parameter; a bias goes with its weight.

        Raises:
            NotFactoredError: there is nothing to gain.
        """
        positions, use = self.positions(name), self._uses[self._places(name)[0]]
        inputs = self._problem.layout[use.weight or name].size // use.shape[use.channel]
        if 1 < positions >= inputs:
            raise NotFactoredError(f"`{name}` has {inputs} inputs at {positions} positions: jacrev does less")

    def is_factored(self, name: str) -> bool:
        """Whether a parameter is only applied as a linear map, at all positions of each sample."""
        return self._fault(name) is None

    def stages(self, parameter: Parameter, span: range) -> list[Stage]:
        """Return rows or columns of a parameter at each of its places.

        Args:
            parameter: which.
            span: flat indices.

        Returns:
            The stages.

        Raises:
            NotFactoredError: it is used in other ways.
        """
        if fault := self._fault(parameter.name):
            raise NotFactoredError(f"`{parameter.name}` is applied {fault}")
        return [self._stage(parameter, span, place) for place in self._places(parameter.name)]

    def _stage(self, parameter: Parameter, span: range, place: int) -> Stage:
        a, use = self._input(place), self._uses[place]
        is_weight = use.weight == parameter.name
        if not is_weight:
            a = torch.ones(*a.shape[:2], 1, dtype=use.dtype, device=a.device)
        units = use.shape[use.channel]
        return Stage(
            parameter.name, span, span.start - parameter.offset, place, a, units, parameter.size // units, is_weight
        )

    def _input(self, place: int) -> Tensor:
        if place not in self._inputs:
            self._inputs[place] = self._uses[place].input.detach()
        return self._inputs[place]

    def _places(self, name: str) -> list[int]:
        return [k for k, use in enumerate(self._uses) if name in {use.weight, use.bias}]

    def _fault(self, name: str) -> str | None:
        """Return what keeps a parameter from being factored."""
        if name in self._otherwise:
            return "by other operations than dense layers, convolutions in one group and plain embeddings"
        places = self._places(name)
        if not places:
            return "nowhere"
        if len(self._of_one) != len(self._uses):
            return "to some samples only"
        for use, of_one in ((self._uses[k], self._of_one[k]) for k in places):
            if use.weight == use.bias or len(use.shape) < 2:
                return "in a way that is not known"
            first = len(use.given), use.shape[:1], of_one.shape[:1]
            if first != (self._samples, (self._samples,), (1,)) or use.shape[1:] != of_one.shape[1:]:
                return f"to an input of shape {tuple(use.given.shape)}, expected {self._samples} samples first"
        return None

    def deltas(self, places: Sequence[int]) -> ByPlace:
        """Return delta = dL / dz at some places.  # shape of each: (samples, positions, outputs)."""
        if not self._deltas.keys() >= set(places):
            deltas: ByPlace = grad(lambda shifts: self._evaluate(shifts)[1])(self._zeros(places))
            self._deltas = {place: self._uses[place].by_position(delta) for place, delta in deltas.items()}
        return {place: self._deltas[place] for place in places}

    def pull_back(self, place: int, places: Sequence[int]) -> _PullBack:
        """Linearise delta at a place, unless that was done last: a bias has its weight's.

        Args:
            place: of the rows.
            places: of the columns, none before the rows'.

        Returns:
            From units of the rows, the derivatives d delta' / dz and d a' / dz of all columns' places in the directions
            of these units at each position; the latter of later places only, and not of embeddings.
            # shape of each: (units, positions, samples, positions', outputs' or inputs')
        """
        key = place, tuple(places)
        if self._linearised is None or self._linearised[0] != key:
            self._linearised = None  # first, so that no two graphs are held at once
            self._linearised = key, self._linearise(place, places)
        return self._linearised[1]

    def _linearise(self, place: int, places: Sequence[int]) -> _PullBack:
        later = [k for k in places if k != place and self._uses[k].patches]

        def delta(shifts: dict[int, Tensor], weights: dict[int, Tensor]) -> Tensor:
            def lagrangian(shift: Tensor) -> Tensor:
                uses, loss = self._evaluate({**shifts, place: shift})
                # d a' / dz as a second derivative: of <w, a'> with respect to w and z.
                return loss + sum((weights[k] * uses[k].input).sum() for k in later)

            found: Tensor = grad(lagrangian)(shifts[place] if place in shifts else self._zeros([place])[place])
            return found

        weights = {k: torch.zeros_like(self._input(k)) for k in later}
        pull_back, use = vjp(delta, self._zeros(places), weights)[1], self._uses[place]

        def of_units(units: range) -> tuple[ByPlace, ByPlace]:
            z = use.by_position(self._zeros([place])[place])  # shape: (samples, positions, outputs)
            positions = z.shape[1]
            ones = z.new_zeros(len(units), positions, *z.shape)
            ones.diagonal(dim1=1, dim2=3).diagonal(units.start, 0, 2).fill_(1)  # units with themselves, each position
            dz, da = pull_back_each(pull_back, use.of_position(ones.flatten(0, 1)))
            directions = (len(units), positions)
            return (
                {
                    k: self._uses[k].by_position(values.reshape(*directions, *values.shape[1:]))
                    for k, values in dz.items()
                },
                {k: values.reshape(*directions, *values.shape[1:]) for k, values in da.items()},
            )

        return of_units

    def _zeros(self, places: Sequence[int]) -> ByPlace:
        uses, device = self._uses, self._problem.device
        return {k: torch.zeros(uses[k].shape, dtype=uses[k].dtype, device=device) for k in places}

    def _evaluate(self, shifts: Mapping[int, Tensor]) -> tuple[list[Use], Tensor]:
        """Evaluate the un-normalised loss with perturbed z."""
        with Uses(self._names, shifts) as watched:
            loss = self._problem.loss_sum({}, self.batch)[0]
        return watched.uses, loss
