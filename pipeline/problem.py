"""What the Hessian is of: a model, a loss, data and the parameters to differentiate with respect to.

Everything below the surface works on one function, `loss_sum(params, batch) -> (sum, weight)`. Un-normalised sums are
added over micro-batches and divided by the total weight once, at the end: the Hessian is that of the loss over the
whole data set taken as one batch.
"""

import copy
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pipeline.contexts import unchanged
from pipeline.data import Batch, byte_count, dense, digest, microbatches, read_batches, sample_count
from pipeline.errors import ProblemError, nearest
from pipeline.layout import ParameterLayout
from pipeline.losses import Reduction, SumAndWeight, as_terms, checked, known_reduction

Objective = Callable[[Callable[..., Any], Batch], SumAndWeight]


class Problem:
    """A model, a loss and data: L(theta), whose Hessian d2L / dtheta2 is wanted.

    Args:
        model: the network. Nothing of it is changed; train or eval mode is taken as it stands.
        loss: a loss of `torch.nn` or `torch.nn.functional`, or a callable (output, target) that gives a scalar (see
            `reduction`) or (sum, weight). The weight must not depend on the parameters.
        data: a tuple (inputs, target), a `Dataset`, a `DataLoader` of fixed order, or a re-iterable of batches; inputs
            are a tensor, a tuple (positional) or a dict (keywords), dimension 0 of every tensor is the sample. A batch
            that is a dict goes whole to the model, as keywords, and to the loss, in the place of the target.
        params: globs of parameter names; `!glob` excludes. All that require grad when None.
        objective: instead of a loss, `objective(call, batch) -> (sum, weight)`, where `call(*inputs)` runs the model:
            for losses of several forward passes.
        reduction: of a loss that gives a scalar: "mean" (default) or "sum" over samples. Checked.
        separable: whether each sample's loss depends on that sample alone. Checked. If not, there is one batch only.
        l2: adds l2 / 2 |theta|^2 over the selected parameters to the loss, once.

    Raises:
        ProblemError: the model has no such parameters or NaN in them, the data cannot be used (see `read_batches`), or
            the loss is not one.

    Attributes:
        layout: the selected parameters, in `named_parameters()` order.
        batches: the data in memory.
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
        reduction: Reduction | None = None,
        separable: bool = True,
        l2: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ProblemError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
        if (loss is None) == (objective is None):
            raise ProblemError("expected either a loss or an objective, got " + ("none" if loss is None else "both"))
        self.model, self.objective, self.separable, self.l2 = model, objective, separable, float(l2)
        if loss is None:
            self.reduction = known_reduction(reduction)
        else:
            self._terms, self._given, self.reduction = as_terms(loss, reduction)
        self.checkpoint: str | None = None
        self._values: dict[str, Tensor] | None = None  # in place of the model's own, see `at`
        self._slots = _slots(model)
        self.layout = _select(model, params)
        check_finite(dict(model.named_parameters()), "model")
        with unchanged(model):
            self.batches = read_batches(data)
        if not separable and len(self.batches) > 1:
            raise ProblemError(
                f"got {len(self.batches)} batches of a loss that is not separable: its value depends on what is in "
                "a batch together, so pass all samples as one batch"
            )

    def select(self, params: Sequence[str] | None) -> "Problem":
        """Give the same problem with respect to other parameters (globs as in `params`; None leaves it as it is)."""
        if params is None:
            return self
        other = copy.copy(self)
        other.layout = _select(self.model, params)
        return other

    @property
    def sample_count(self) -> int:
        """N, samples in all batches."""
        return sum(map(sample_count, self.batches))

    @property
    def dtype(self) -> torch.dtype:
        """The model's own type of the selected parameters; float32 where that is narrower."""
        named = dict(self.model.named_parameters())
        types = {named[name].dtype for name in self.layout.names}
        return torch.float64 if torch.float64 in types else torch.float32

    @property
    def byte_count(self) -> int:
        """Bytes of weights, buffers and data."""
        return sum(t.nbytes for t in self.tensors().values()) + byte_count(self.batches)

    def tensors(self) -> dict[str, Tensor]:
        """Give all parameters and buffers by name, shared ones once, detached, sparse ones made dense."""
        if self._values is not None:
            return self._values
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: dense(tensor.detach()) for name, tensor in named}

    def at(self, tensors: Mapping[str, Tensor], checkpoint: str | None = None) -> "Problem":
        """Give the same problem at other values of all parameters and buffers; the model stays as it is.

        Args:
            tensors: as `tensors()` gives them.
            checkpoint: SHA-256 of the file they are from; this problem's own when None.

        Returns:
            The problem at these values.
        """
        other = copy.copy(self)
        other._values, other.checkpoint = dict(tensors), checkpoint or self.checkpoint
        return other

    def on(self, batches: tuple[Batch, ...], *, l2: float) -> "Problem":
        """Give the same problem on other data, which was checked already, with another L2 term."""
        other = copy.copy(self)
        other.batches, other.l2 = batches, l2
        return other

    def as_given(self) -> "Problem | None":
        """Give the same problem with its loss as torch reduces it, of weight 1; None where it is not torch's."""
        if self.objective is not None or self._given is None:
            return None
        other = copy.copy(self)
        other._terms = self._given
        return other

    def weights_digest(self) -> str:
        """Hash all parameters and buffers."""
        return weights_digest(self.tensors())

    def data_digest(self) -> str:
        """Hash the data."""
        return digest(self.batches)

    def loss_sum(self, params: Mapping[str, Tensor] | None, batch: Batch) -> SumAndWeight:
        """Evaluate the un-normalised loss of a batch, without the L2 term.

        Args:
            params: parameters and buffers to use in place of the model's; None calls the module as it stands.
            batch: as in `batches`.

        Returns:
            Sum and weight, 0-d tensors.

        Raises:
            ProblemError: the loss gives something else.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            if params is None:
                return self.model(*args, **kwargs)
            slots = {slot: params[name] for slot, name in self._slots.items() if name in params}
            return functional_call(self.model, slots, args, kwargs, tie_weights=False)

        if self.objective is not None:
            return checked(self.objective(call, batch), "objective")
        inputs, target = (batch, batch) if isinstance(batch, dict) else _pair(batch)
        if isinstance(inputs, dict):
            output = call(**inputs)
        else:
            output = call(*inputs) if isinstance(inputs, tuple) else call(inputs)
        return self._terms(output, target, batch)

    def place(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "PlacedProblem":
        """Give the problem with its tensors in one type on one device; the model itself stays as it is."""
        sparse = {n: b.layout for n, b in self.model.named_buffers() if b.layout != torch.strided}
        tensors = {
            name: t.to(device, dtype) if t.is_floating_point() else t.to(device) for name, t in self.tensors().items()
        }
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
    """

    problem: Problem
    parameters: dict[str, Tensor]
    constants: dict[str, Tensor]
    dtype: torch.dtype
    device: torch.device

    @property
    def layout(self) -> ParameterLayout:
        """The selected parameters' places in the Hessian."""
        return self.problem.layout

    def loss_sum(self, params: Mapping[str, Tensor], batch: Batch) -> SumAndWeight:
        """Evaluate the un-normalised loss as a function of selected parameters (those left out keep their values)."""
        return self.problem.loss_sum({**self.constants, **self.parameters, **params}, batch)

    def batches(self, microbatch: int | None) -> Iterator[Batch]:
        """Give all data in micro-batches of this type on this device."""
        for batch in microbatches(self.problem.batches, microbatch if self.problem.separable else None):
            yield self.cast(batch)

    def cast(self, batch: Batch) -> Batch:
        """Give a batch in this type on this device."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(self.device, self.dtype) if leaf.is_floating_point() else leaf.to(self.device)

        return tree_map(move, batch)

    @contextmanager
    def own_parameters(self) -> Iterator[dict[str, nn.Parameter]]:
        """Put this problem's values into the module itself, for as long as the context lasts.

        Yields:
            The module's own selected parameters. They alone require grad.
        """
        model, values = self.problem.model, {**self.constants, **self.parameters}
        named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        tensors = {**named, **buffers}
        saved = {name: (tensor.data, tensor.requires_grad) for name, tensor in tensors.items()}
        try:
            for name, tensor in tensors.items():
                # Running statistics are changed by evaluations: those of a copy.
                tensor.data = values[name].clone() if name in buffers else values[name]
                tensor.requires_grad_(name in self.parameters)
            yield {name: named[name] for name in self.parameters}
        finally:
            for name, (data, requires_grad) in saved.items():
                tensors[name].data = data
                tensors[name].requires_grad_(requires_grad)


def _pair(batch: Batch) -> tuple[Any, Any]:
    """Take a batch as (inputs, target)."""
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ProblemError(f"batch: got {type(batch).__name__}, expected (inputs, target), or a dict of inputs")
    return batch


def _slots(model: nn.Module) -> dict[str, str]:
    """Give every place in the modules that holds a parameter or a buffer, with the name that tensor goes by."""
    # A tied tensor has several places. A module reachable by two paths has one: functional_call given two names for it
    # would leave the model's own parameter replaced (pytorch issue 164759).
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        f"{path}.{key}" if path else key: names[id(tensor)]
        for path, module in model.named_modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash parameters and buffers, whatever their order."""
    return digest(dict(sorted(tensors.items())))


def _select(model: nn.Module, params: Sequence[str] | str | None) -> ParameterLayout:
    """Lay out the parameters that globs choose among those that require grad."""
    named = dict(model.named_parameters())
    free = [name for name, p in named.items() if p.requires_grad]
    globs = ("*",) if params is None else (params,) if isinstance(params, str) else tuple(params)
    chosen: set[str] = set()
    if globs and all(g.startswith("!") for g in globs):
        chosen.update(free)
    for glob in globs:
        pattern = glob.removeprefix("!")
        matches = set(fnmatch.filter(free, pattern))
        if not matches:
            raise ProblemError(_nothing_matches(glob, named, free))
        chosen = chosen - matches if glob.startswith("!") else chosen | matches
    if not chosen:
        raise ProblemError(f"params: {list(globs)} leave no parameter, expected at least one")
    if wrong := [n for n in chosen if named[n].dtype.is_complex]:
        raise ProblemError(f"params: `{wrong[0]}` is complex; only real parameters have a Hessian here")
    layout = ParameterLayout.of([(name, named[name].shape) for name in free if name in chosen])
    if layout.size == 0:
        raise ProblemError("params: all selected parameters have no entries")
    return layout


def _nothing_matches(glob: str, named: Mapping[str, Any], free: Sequence[str]) -> str:
    """Say why a glob matches nothing."""
    if not named:
        return "params: the model has no parameters"
    if not free:
        return "params: no parameter of the model requires grad; call requires_grad_(True) on those that are wanted"
    if frozen := fnmatch.filter(named, glob.removeprefix("!")):
        return f"params: `{glob}` matches only frozen parameters ({frozen[0]}, ...); call requires_grad_(True) on them"
    return f"params: `{glob}` matches no parameter{nearest(glob.removeprefix('!'), free)}"


def check_finite(parameters: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that are not finite.

    Args:
        parameters: by name.
        source: named in the error.

    Raises:
        ProblemError: some are not.
    """
    for name, p in parameters.items():
        if p.is_floating_point() and not bool(p.isfinite().all()):
            count = int((~p.isfinite()).sum())
            raise ProblemError(f"{source}: {count} of {p.numel()} entries of `{name}` are NaN or infinite")
