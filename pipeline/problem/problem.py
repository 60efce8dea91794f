"""What the Hessian is of: a model, a loss, data and the parameters to differentiate with respect to.

Everything below the surface works on one function, `loss_sum(params, batch) -> (sum, weight)`. Un-normalised sums are
added over micro-batches and divided by the total weight once, at the end: the Hessian is that of the loss over the
whole data set taken as one batch.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import HessianError, ProblemError, human_bytes
from pipeline.planning.notebook import card
from pipeline.planning.parameters import ParameterLayout
from pipeline.problem.batches import (
    Batch,
    byte_count,
    cast,
    cast_batch,
    copied,
    dense,
    digest,
    is_cuttable,
    microbatches,
    sample_count,
    weights_digest,
)
from pipeline.problem.contexts import unchanged
from pipeline.problem.criteria import Objective, Term, criterion_of
from pipeline.problem.explain import explained
from pipeline.problem.first_look import Seen, first_look
from pipeline.problem.kept import put_back
from pipeline.problem.lifting import evaluated_in
from pipeline.problem.losses import Reduction, SumAndWeight
from pipeline.problem.modules import evaluate_at, holding, slots_of, uncast, unwrapped
from pipeline.problem.read_once import ReadOnce
from pipeline.problem.reading import recognise
from pipeline.problem.selection import check_finite, constants_of, require_ready, select


class Problem:
    """A model, a loss and data: L(theta), whose Hessian d2L / dtheta2 is wanted.

    Args:
        model: the network. Nothing of it is changed; train or eval mode is taken as it stands. What only wraps one
            (DataParallel, torch.compile) is taken off.
        loss: a loss of `torch.nn` or `torch.nn.functional`, or a callable (output, target) that gives a scalar (see
            `reduction`) or (sum, weight). The weight must not depend on the parameters. Parameters that it has of its
            own are constants.
        data: a tuple (inputs, target), a `Dataset`, a `DataLoader` of fixed order, or a re-iterable of batches; inputs
            are a tensor, a tuple (positional), a dict (keywords), or a list or an object (one argument); dimension 0 of
            every tensor is the sample. Of longer tuples, (inputs, target, weight), the loss takes all that follows the
            inputs. A batch that is a dict goes whole to the model, as keywords, and to the loss, in the place of the
            target; so does an object with tensors by name (a graph of torch_geometric, a dataclass, a named tuple), as
            the one argument.
        params: globs of parameter names; `!glob` excludes. All that require grad when None.
        objective: instead of a loss, `objective(call, batch)`, where `call(*inputs)` runs the model, gives a scalar or
            (sum, weight): for losses of several forward passes.
        terms: instead of a loss and data, a sum of terms (coefficient, objective, data), each over data of its own:
            L = sum_k c_k sum_k / weight_k.
        reduction: of a function that gives a scalar: "mean" (default) or "sum" over samples. Checked.
        separable: whether each sample's loss depends on that sample alone. Checked. If not, there is one batch only (of
            each term), which is never cut, and whose tensors need not agree in dimension 0.
        l2: adds l2 / 2 |theta|^2 over the selected parameters to the loss, once.

    Raises:
        ProblemError: the model has no such parameters or NaN in them, the data cannot be used (see `read_batches`), or
            the loss is not one.

    Attributes:
        layout: the selected parameters, in `named_parameters()` order.
        batches: the data in memory.
        constants: parameters of the loss itself, which H does not differentiate with respect to.
        checkpoint: SHA-256 of the file that the weights are from; None where they are the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any] | None = None,
        data: Any = None,
        *,
        params: Sequence[str] | str | None = None,
        objective: Objective | None = None,
        terms: Sequence[Term] | None = None,
        reduction: Reduction | None = None,
        separable: bool = True,
        l2: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ProblemError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        criterion = criterion_of(loss, objective, terms, reduction)
        self.model, self.unwrapped = unwrapped(model)
        require_ready(self.model)
        self._criterion, self.separable, self.l2 = criterion, separable, float(l2)  # shared by copies, as
        self.modules: tuple[nn.Module, ...] = (self.model, loss) if isinstance(loss, nn.Module) else (self.model,)
        self._seen: list[Seen] = []  # is what an evaluation showed
        self._forgets = True  # what one evaluation leaves in the model, before the next
        self.constants = constants_of(loss, self.model)
        self.checkpoint: str | None = None
        self._values: dict[str, Tensor] | None = None  # in place of the model's own, see `at`
        self._slots = slots_of(self.model)
        self._types = {name: p.dtype for name, p in self.model.named_parameters()}  # while values are swapped, too
        self.layout = select(self.model, params, self.constants)
        check_finite(dict(self.model.named_parameters()), "model")
        with unchanged(*self.modules):
            self.batches = criterion.batches(data if terms is None else terms, separable=separable)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, which has not seen the kinds of objects in the data."""
        self.__dict__.update(state)
        recognise(self.batches)

    def _repr_html_(self) -> str:
        values = [
            ("P", f"{self.layout.size:,}"),
            ("samples", f"{self.sample_count:,}"),
            ("loss is a", self.reduction),
            ("L2 term added", f"{self.l2:g}" if self.l2 else ""),
            ("type", str(self.dtype)),
            ("weights and data", human_bytes(self.byte_count)),
        ]
        rows = [(p.name, p.shape_text, f"{p.size:,}") for p in self.layout]
        return card(f"Problem of {type(self.model).__name__}", values, "parameters", ("name", "shape", "rows"), rows)

    def select(self, params: Sequence[str] | None) -> "Problem":
        """Return the same problem with respect to other parameters (globs as in `params`; None leaves it as it is)."""
        return self if params is None else self._with(layout=select(self.model, params, self.constants))

    @property
    def reduction(self) -> Reduction:
        """Whether the whole loss is the sum over samples divided by the weight, or the sum."""
        return self._criterion.reduction

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The loss, the objective or those of the terms."""
        return self._criterion.functions

    @property
    def sample_count(self) -> int:
        """N, samples in all batches."""
        return sum(map(sample_count, self.batches))

    @property
    def is_cuttable(self) -> bool:
        """Whether batches may be cut into micro-batches."""
        return self.separable and all(map(is_cuttable, self.batches))

    @property
    def dtype(self) -> torch.dtype:
        """The model's own type of the selected parameters; float32 where that is narrower."""
        types = {self._types[name] for name in self.layout.names}
        return torch.float64 if torch.float64 in types else torch.float32

    @property
    def byte_count(self) -> int:
        """Bytes of weights, buffers and data."""
        return sum(t.nbytes for t in self.tensors().values()) + byte_count(self.batches)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name, shared ones once, detached, sparse ones made dense."""
        if self._values is not None:
            return self._values
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: dense(tensor.detach()) for name, tensor in named}

    def at(self, tensors: Mapping[str, Tensor], checkpoint: str | None = None) -> "Problem":
        """Return the same problem at other values of all parameters and buffers; the model stays as it is.

        Args:
            tensors: as `tensors()` gives them.
            checkpoint: SHA-256 of the file they are from; this problem's own when None.

        Returns:
            The problem at these values.
        """
        return self._with(_values=dict(tensors), checkpoint=checkpoint or self.checkpoint)

    def on(self, batches: tuple[Batch, ...], *, l2: float) -> "Problem":
        """Return the same problem on other data, which was checked already, with another L2 term."""
        self._criterion.weigh(self.model, self.batches)  # all data: a few of them have the same denominators,
        _ = self.written_out  # and do what is seen of all
        return self._with(batches=batches, l2=l2)

    def as_given(self) -> "Problem | None":
        """Return the same problem with its loss as torch reduces it, of weight 1; None where it is not torch's."""
        criterion = self._criterion.as_torch()
        return None if criterion is None else self._with(_criterion=criterion)

    def remembering(self) -> "Problem":
        """Return the same problem, of which an evaluation may read what others have left in the model."""
        return self._with(_forgets=False)

    def _with(self, **attributes: Any) -> "Problem":
        other = copy.copy(self)
        vars(other).update(attributes)
        return other

    def weights_digest(self) -> str:
        """Hash all parameters and buffers."""
        return weights_digest(self.tensors())

    def data_digest(self) -> str:
        """Hash the data."""
        return digest(self.batches)

    def microbatches(self, most: int | None) -> Iterator[Batch]:
        """Yield all data in micro-batches of at most so many samples; whole where they may not be cut."""
        return microbatches(self.batches, most if self.separable else None)

    def loss_sum(self, params: Mapping[str, Tensor] | None, batch: Batch) -> SumAndWeight:
        """Evaluate the un-normalised loss of a batch, without the L2 term.

        Args:
            params: parameters and buffers to use in place of the model's, for whatever of the model the loss reads,
                inside the forward pass and out of it; None evaluates the module as it stands.
            batch: as in `batches`.

        Returns:
            Sum and weight, 0-d tensors.

        Raises:
            ProblemError: the loss gives something else.
            NotImplementedError: parameters are given, and the model holds scripted modules, or assigns `.data`.
        """
        sums = partial(self._criterion.sums, self.model)
        seen = self._seen[0] if self._seen else Seen()
        batch = copied(batch) if seen.writes else batch
        with put_back(*self.modules) if seen.leaves and self._forgets else nullcontext():
            if params is None:
                return sums(batch)
            if seen.assigns:
                raise NotImplementedError("torch.func does not bear that `.data` of a tensor is assigned")
            values = {slot: params[name] for slot, name in self._slots.items() if name in params}
            found: SumAndWeight = evaluate_at(values, self.model, sums, batch)
            return found

    @property
    def written_out(self) -> frozenset[str] | None:
        """Operations without a right double backward in torch, which are written out; None for all that there are."""
        if not self._seen:
            evaluate = partial(self.loss_sum, None)
            self._seen.append(first_look(self.modules, evaluate, self.batches, may_cut=self.separable))
        return self._seen[0].written_out

    def place(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "PlacedProblem":
        """Return the problem with its tensors in one type on one device; the model itself stays as it is."""
        self._criterion.weigh(self.model, self.batches)
        _ = self.written_out  # found with the model as it is
        sparse = {n: b.layout for n, b in self.model.named_buffers() if b.layout != torch.strided}
        tensors = {name: cast(tensor, dtype, device) for name, tensor in self.tensors().items()}
        tensors |= {name: tensors[name].to_sparse(layout=layout) for name, layout in sparse.items()}
        parameters = {name: tensors.pop(name) for name in self.layout.names}
        return PlacedProblem(self, parameters, tensors, dtype, torch.device(device))


@dataclass(frozen=True)
class PlacedProblem:
    """A problem in one floating type on one device: what engines work on.

    Attributes:
        problem: the problem.
        parameters: the selected parameters.
        constants: all other parameters and the buffers.
        dtype: of every floating tensor.
        device: of every tensor.
        counts: bounds that engines may take in place of what they count; None has each read.
    """

    problem: Problem
    parameters: dict[str, Tensor]
    constants: dict[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    counts: ReadOnce | None = None

    @property
    def layout(self) -> ParameterLayout:
        """The selected parameters' places in the Hessian."""
        return self.problem.layout

    def loss_sum(self, params: Mapping[str, Tensor] | None, batch: Batch) -> SumAndWeight:
        """Evaluate the un-normalised loss as a function of selected parameters.

        Args:
            params: those left out keep their values; None evaluates the module as it stands, in `own_parameters`.
            batch: of this type, on this device.

        Returns:
            Sum and weight, 0-d tensors.

        Raises:
            ProblemError: the model or the loss raised something, or gave something else.
        """
        values = None if params is None else {**self.constants, **self.parameters, **params}
        try:
            with nullcontext() if values is None else self._evaluated():
                return self.problem.loss_sum(values, batch)
        except (HessianError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            name = str(self.dtype).removeprefix("torch.")
            through = "" if values is None else ", through torch.func"
            doing = f"evaluated in {name} on {sample_count(batch)} samples{through}"
            raise ProblemError(explained(error, self.problem.model, doing)) from error

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Have evaluations be in this type."""
        with evaluated_in(self.dtype, self.problem.dtype, self.problem.written_out), uncast(self.problem.model):
            yield

    def batches(self, microbatch: int | None) -> Iterator[Batch]:
        """Yield all data in micro-batches of this type on this device."""
        if self.device.type == "cpu":  # a piece at a time is little, and where types agree nothing
            return map(self.cast, self.problem.microbatches(microbatch))
        return microbatches(self._on_device, microbatch if self.problem.separable else None)

    @cached_property
    def _on_device(self) -> tuple[Batch, ...]:
        """All data, copied once: memory is planned for it."""
        return tuple(map(self.cast, self.problem.batches))

    @property
    def byte_count(self) -> int:
        """Bytes of weights, buffers and data in this type."""
        tensors = [*self.parameters.values(), *self.constants.values()]
        return sum(t.nbytes for t in tensors) + byte_count(self.problem.batches, self.dtype)

    def at(self, parameters: dict[str, Tensor]) -> "PlacedProblem":
        """Return the same problem at other values of the selected parameters, on the same data where they lie."""
        other = replace(self, parameters=parameters)
        if "_on_device" in vars(self):
            vars(other)["_on_device"] = self._on_device
        return other

    def cast(self, batch: Batch) -> Batch:
        """Return a batch in this type on this device."""
        return cast_batch(batch, self.dtype, self.device)

    @contextmanager
    def own_parameters(self) -> Iterator[dict[str, nn.Parameter]]:
        """Put this problem's values into the module itself, for as long as the context lasts.

        What autograd evaluates once more meanwhile, as at checkpoints, is evaluated in this type too.

        Yields:
            The module's own selected parameters. They alone require grad.
        """
        names = list(self.parameters)
        with holding({**self.constants, **self.parameters}, self.problem.model, names) as own, self._evaluated():
            yield {name: own[name] for name in names}
