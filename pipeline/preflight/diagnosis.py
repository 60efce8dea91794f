"""Where a model breaks the rules: the innermost module at which numbers part, for error messages.

Best effort: a clause for a message that is going to be raised anyway, empty where nothing is found.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import debug_unwrap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from pipeline.problem.batches import Batch, digest
from pipeline.problem.contexts import random_digest
from pipeline.problem.explain import place
from pipeline.problem.problem import PlacedProblem

_Hook = Callable[..., None]

STEPS = (1e-4, 1e-5)
TOLERANCE = 1e-4  # relative; what is looked for is far larger


@dataclass(frozen=True)
class _Call:
    """One call of a module, innermost first."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    drew: bool

    @property
    def output_digest(self) -> str:
        return digest([leaf for leaf in tree_leaves(self.output) if isinstance(leaf, Tensor)])

    def clause(self, what: str) -> str:
        return place(what, self.path, self.module)


def drawing_module(placed: PlacedProblem, batch: Batch) -> str:
    """Name the module that draws random numbers, as in " in `1` (Dropout)"."""
    return next((call.clause(" in") for call in _calls(placed, batch) if call.drew), " in the loss")


def unsteady_module(placed: PlacedProblem, batch: Batch) -> str:
    """Name the first module whose output differs between two passes."""
    pairs = zip(_calls(placed, batch), _calls(placed, batch), strict=False)
    return next((a.clause(" from") for a, b in pairs if a.output_digest != b.output_digest), " from the loss")


def remembering_module(placed: PlacedProblem, batch: Batch) -> str:
    """Name a module that holds another tensor as an attribute after an evaluation than before."""
    modules = list(placed.problem.model.named_modules())
    before = [dict(vars(module)) for _, module in modules]
    with placed.own_parameters():
        placed.problem.remembering().loss_sum(None, batch)
    for (path, module), attributes in zip(modules, before, strict=True):
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value is not attributes.get(name):
                return f", kept as `{name}`{place(' of', path, module)}"
    return ""


def coupling_module(placed: PlacedProblem, batch: Batch, part: Batch) -> str:
    """Name the first module whose output for the first samples of a batch depends on the others."""
    try:
        pairs = list(zip(_calls(placed, batch), _calls(placed, part), strict=False))
    except Exception:  # what cannot be evaluated is reported by the caller
        return ""
    return next((a.clause(", they act on each other in") for a, b in pairs if _is_coupled(a.output, b.output)), "")


def _is_coupled(whole: Any, part: Any) -> bool:
    """Compare the outputs for a batch, as far as they go, with those for its first samples."""
    pairs = [(w, p) for w, p in zip(tree_leaves(whole), tree_leaves(part), strict=False) if _is_float(w) and w.ndim]
    return any(
        w.shape[1:] == p.shape[1:] and len(w) > len(p) and not torch.allclose(w[: len(p)], p, rtol=1e-9, atol=1e-12)
        for w, p in pairs
    )


def wrong_module(placed: PlacedProblem, *, order: int) -> str:
    """Name the innermost module whose derivative by autograd is not that by differences.

    Args:
        placed: the problem on a few samples, in float64.
        order: 1 for the derivative, 2 for the second one.

    Returns:
        A clause, as in ", and it goes wrong in `embed` (Embedding)".
    """
    with placed.own_parameters():
        for batch in placed.batches(None):
            for call in _calls(placed, batch):
                try:
                    is_wrong = _is_wrong(call, order)
                except (RuntimeError, NotImplementedError):
                    is_wrong = True  # it cannot be differentiated
                if is_wrong:
                    return call.clause(", and it goes wrong in")
    return ", and it goes wrong outside the model's modules"


def _calls(placed: PlacedProblem, batch: Batch) -> list[_Call]:
    """Evaluate a batch and note every call of a module."""
    calls: list[_Call] = []
    states: list[str] = []

    def enter(*_: Any) -> None:
        states.append(random_digest())

    def leave(path: str) -> _Hook:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            drew = random_digest() != states.pop()
            if not _is_transformed((args, kwargs, output)):
                calls.append(_Call(path, module, _frozen(args), _frozen(kwargs), _frozen(output), drew))

        return hook

    with torch.enable_grad(), _hooked(placed.problem.model, enter, leave):
        placed.loss_sum(None, batch)
    return calls


@contextmanager
def _hooked(model: nn.Module, enter: _Hook, leave: Callable[[str], _Hook]) -> Iterator[None]:
    """Watch all modules that can be watched."""
    handles = []
    try:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_transformed(tree: Any) -> bool:
    """Whether tensors belong to a transform of torch.func inside the loss, and mean nothing outside."""
    return any(isinstance(leaf, Tensor) and debug_unwrap(leaf) is not leaf for leaf in tree_leaves(tree))


def _frozen(tree: Any) -> Any:
    """Copy the tensors of a pytree, which later in-place operations might change."""
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def _is_wrong(call: _Call, order: int) -> bool:
    """Differentiate one call along a random direction of all its inputs and parameters, both ways."""
    line = _Line(call)
    found = float(line.slope(0.0, second=order == 2).detach())
    function = line.value if order == 1 else line.slope
    with line.restored(), torch.set_grad_enabled(order == 2):
        near, far = ((float(function(h)) - float(function(-h))) / (2 * h) for h in STEPS)
    scale = max(abs(found), abs(near), 1e-6)
    if not math.isfinite(found):
        return True
    return abs(near - far) < TOLERANCE * scale and abs(found - near) > 10 * TOLERANCE * scale


class _Line:
    """A module's outputs, summed with random weights, as a function along a random direction."""

    def __init__(self, call: _Call) -> None:
        self._module = call.module
        self._leaves, self._structure = tree_flatten((call.args, call.kwargs))
        self._free = [k for k, leaf in enumerate(self._leaves) if _is_float(leaf)]
        self._own = [p for p in call.module.parameters() if p.requires_grad]
        self._start = [p.data for p in self._own]
        generator = torch.Generator().manual_seed(0)
        self._directions = {k: _randn(self._leaves[k], generator) for k in self._free}
        self._own_directions = [_randn(p, generator) for p in self._own]

    def value(self, t: float | Tensor) -> Tensor:
        """Evaluate at t; a tensor t is differentiated through the inputs."""
        for p, start, direction in zip(self._own, self._start, self._own_directions, strict=True):
            p.data = start + float(torch.as_tensor(t).detach()) * direction
        leaves = [leaf + t * self._directions[k] if k in self._free else leaf for k, leaf in enumerate(self._leaves)]
        args, kwargs = tree_unflatten(leaves, self._structure)
        outputs = [o for o in tree_leaves(self._module(*args, **kwargs)) if _is_float(o)]
        generator = torch.Generator().manual_seed(1)
        return torch.stack([(o * _randn(o, generator)).sum() for o in outputs]).sum()

    def slope(self, t: float, *, second: bool = False) -> Tensor:
        """Return the derivative at t by autograd, or the second one."""
        at = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        wanted, along = [at, *self._own], [torch.ones_like(at), *self._own_directions]
        slope = _along(self.value(at), wanted, along, keep=second)
        return _along(slope, wanted, along, keep=False) if second else slope

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the parameters back at the end."""
        try:
            yield
        finally:
            for p, start in zip(self._own, self._start, strict=True):
                p.data = start


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _along(value: Tensor, wanted: list[Tensor], along: list[Tensor], *, keep: bool) -> Tensor:
    """Differentiate a scalar along a direction."""
    if not value.requires_grad:
        return torch.zeros((), dtype=value.dtype)
    parts = grad(value, wanted, create_graph=keep, materialize_grads=True)
    return torch.stack([(part * d).sum().cpu() for part, d in zip(parts, along, strict=True)]).sum()
