"""What is summed over samples: a loss of the model's output, an objective of its calls, or a sum of several terms."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import HessianError, ProblemError
from pipeline.problem.batches import Batch, OfTerm, detached, sample_count
from pipeline.problem.contexts import on_copies
from pipeline.problem.explain import explained
from pipeline.problem.losses import Reduction, SumAndWeight, as_terms, known_reduction, sum_and_weight
from pipeline.problem.reading import read_batches

Objective = Callable[[Callable[..., Any], Batch], Any]
Term = tuple[float, Objective, Any]  # coefficient, function, data


class Criterion:
    """The un-normalised loss of a batch.

    Attributes:
        reduction: whether the whole loss is the sum divided by the weight ("mean") or the sum.
    """

    reduction: Reduction

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What is called to evaluate a batch, besides the model."""
        raise NotImplementedError

    def sums(self, model: nn.Module, batch: Batch) -> SumAndWeight:
        """Evaluate a batch with what the model holds.

        Args:
            model: the network.
            batch: of its data.

        Returns:
            Sum and weight, 0-d tensors.
        """
        raise NotImplementedError

    def batches(self, data: Any, *, separable: bool) -> tuple[Batch, ...]:
        """Read data; see `read_batches`."""
        return read_batches(data, separable=separable, bare=True)

    def weigh(self, model: nn.Module, batches: tuple[Batch, ...]) -> None:
        """Find what sums are divided by, where all data together tell."""

    def as_torch(self) -> "Criterion | None":
        """Return the loss as torch itself reduces it, of weight 1; None where it is not torch's."""
        return None


class OfOutput(Criterion):
    """A loss of the model's output.

    Args:
        loss: see `as_terms`.
        reduction: of a function that gives a scalar.
    """

    def __init__(self, loss: Callable[..., Any], reduction: Reduction | None) -> None:
        self._loss, self._given, self.reduction = as_terms(loss, reduction)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """See `Criterion`."""
        return (self._loss,)

    def sums(self, model: nn.Module, batch: Batch) -> SumAndWeight:
        """Run the model once, and its loss; see `Criterion`."""
        inputs, targets = _parts(batch)
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if type(inputs) is tuple else model(inputs)
        return self._loss(output, targets, batch)

    def batches(self, data: Any, *, separable: bool) -> tuple[Batch, ...]:
        """Read pairs of inputs and target; see `read_batches`."""
        return read_batches(data, separable=separable, bare=False)

    def as_torch(self) -> "Criterion | None":
        """See `Criterion`."""
        if self._given is None:
            return None
        other = copy.copy(self)
        other._loss = self._given
        return other


class OfCalls(Criterion):
    """An objective, which calls the model as often as it likes.

    Args:
        objective: see `Problem`.
        reduction: of one that gives a scalar.
    """

    def __init__(self, objective: Objective, reduction: Reduction | None) -> None:
        self._objective, self.reduction = objective, known_reduction(reduction)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """See `Criterion`."""
        return (self._objective,)

    def sums(self, model: nn.Module, batch: Batch) -> SumAndWeight:
        """See `Criterion`."""
        return sum_and_weight(self._objective(model, batch), self.reduction, batch, "objective")


class OfTerms(Criterion):
    """A sum of terms, L = sum_k c_k sum_k / weight_k, each over data of its own: of sums that are weighed already.

    Args:
        terms: see `Problem`; their data are not kept.
        reduction: of functions that give a scalar.
    """

    def __init__(self, terms: Sequence[Term], reduction: Reduction | None) -> None:
        if not terms or any(not isinstance(term, tuple) or len(term) != 3 or not callable(term[1]) for term in terms):
            raise ProblemError("terms: expected a list of (coefficient, objective, data), at least one")
        self._terms = tuple((float(coefficient), function) for coefficient, function, _ in terms)
        self._each, self.reduction = known_reduction(reduction), "sum"
        self._totals: dict[int, float] = {}  # weight of all data of a term, once it is known

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """See `Criterion`."""
        return tuple(function for _, function in self._terms)

    def sums(self, model: nn.Module, batch: Batch) -> SumAndWeight:
        """Divide a term's sum by the weight of all its data; see `Criterion`."""
        coefficient, _ = self._terms[batch.term]
        total, _ = self._own(model, batch)
        return total * (coefficient / self._totals[batch.term]), torch.ones_like(total)

    def batches(self, data: Sequence[Term], *, separable: bool) -> tuple[Batch, ...]:
        """Read the data of each term."""
        return tuple(
            OfTerm(k, batch)
            for k, (_, _, each) in enumerate(data)
            for batch in read_batches(each, separable=separable, bare=True)
        )

    def weigh(self, model: nn.Module, batches: tuple[Batch, ...]) -> None:
        """Find the weight of each term from all its data; once."""
        if self._totals:
            return
        weights = dict.fromkeys(range(len(self._terms)), 0.0)
        with on_copies(model):
            for batch in batches:
                try:
                    _, weight = self._own(model, detached(batch))
                except HessianError:
                    raise
                except Exception as error:
                    doing = f"evaluated as it is on {sample_count(batch)} samples of term {batch.term}"
                    raise ProblemError(explained(error, model, doing)) from error
                weights[batch.term] += float(weight)
        if wrong := [k for k, weight in weights.items() if not weight > 0]:
            raise ProblemError(f"terms: the weights of term {wrong[0]} sum to {weights[wrong[0]]}, expected above 0")
        self._totals |= weights if self._each == "mean" else dict.fromkeys(weights, 1.0)

    def _own(self, model: nn.Module, batch: OfTerm) -> tuple[Tensor, Tensor]:
        return sum_and_weight(self._terms[batch.term][1](model, batch.batch), self._each, batch.batch, "terms")


def criterion_of(
    loss: Callable[..., Any] | None,
    objective: Objective | None,
    terms: Sequence[Term] | None,
    reduction: Reduction | None,
) -> Criterion:
    """Take what is given of the three, which must be one.

    Args:
        loss: as for `Problem`, and so are the others.
        objective: instead of it.
        terms: instead of either.
        reduction: of a function that gives a scalar.

    Returns:
        The criterion.

    Raises:
        ProblemError: none or several are given, or it is not one.
    """
    found = {"loss": loss, "objective": objective, "terms": terms}
    given = [name for name, value in found.items() if value is not None]
    if len(given) != 1:
        raise ProblemError(
            f"expected either a loss or an objective, or terms; got {' and '.join(given) if given else 'none'}"
        )
    if loss is not None:
        return OfOutput(loss, reduction)
    return OfTerms(terms, reduction) if terms is not None else OfCalls(objective, reduction)  # type: ignore[arg-type]


def _parts(batch: Batch) -> tuple[Any, tuple[Any, ...]]:
    """Take a batch as inputs, and what the loss takes beside the output."""
    if type(batch) is not tuple:
        if isinstance(batch, Tensor | list):
            raise ProblemError(
                f"batch: got {type(batch).__name__}, expected (inputs, target), or a dict of inputs: of a list each "
                "item is a batch, a tuple is one"
            )
        return batch, (batch,)
    if len(batch) < 2:
        raise ProblemError(f"batch: got a tuple of {len(batch)}, expected (inputs, target)")
    return batch[0], batch[1:]
