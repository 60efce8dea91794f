"""A model as modules: what only wraps it is taken off, and other values are put where it holds its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Take off what only wraps a module.

    Args:
        model: as it was given.

    Returns:
        The module inside, and the names of what was taken off.
    """
    taken: list[str] = []
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif type(model).__name__ == "OptimizedModule":  # of torch.compile, whose own module is slow to import
            inner = model._orig_mod
        else:
            return model, tuple(taken)
        taken.append("torch.compile" if type(model).__name__ == "OptimizedModule" else type(model).__name__)
        model = inner


def slots_of(model: nn.Module) -> dict[str, str]:
    """Return every place in the modules that holds a parameter or a buffer, with the name that tensor goes by."""
    # A tied tensor has several places. A module reachable by two paths has one: functional_call given two names for it
    # would leave the model's own parameter replaced (pytorch issue 164759).
    names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {
        f"{path}.{key}" if path else key: names[id(tensor)]
        for path, module in model.named_modules()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


class _Evaluation(nn.Module):
    """A function of a model as one module, so that values reach all that reads the model, closures and methods too."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self._function = model, function

    def forward(self, batch: Any) -> Any:
        return self._function(batch)


def evaluate_at(values: Mapping[str, Tensor], model: nn.Module, function: Callable[[Any], Any], batch: Any) -> Any:
    """Evaluate a function that reads a model, while the model has other values.

    Args:
        values: by place, see `slots_of`.
        model: the model.
        function: of a batch.
        batch: that it is given.

    Returns:
        What the function gives.

    Raises:
        NotImplementedError: the model holds scripted modules.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise NotImplementedError("a scripted module computes with its own parameters alone")
    places = {f"model.{slot}": value for slot, value in values.items()}
    return functional_call(_Evaluation(model, function), places, (batch,), tie_weights=False)


@contextmanager
def holding(values: Mapping[str, Tensor], model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Put values into a model's own parameters and buffers, for as long as the context lasts.

    Args:
        values: of all of them, by name.
        model: the model.
        names: of parameters; these alone require grad meanwhile.

    Yields:
        The model's own parameters.
    """
    named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    tensors = {name: t for name, t in {**named, **buffers}.items() if name in values}  # some are made meanwhile
    saved = {name: (tensor.data, tensor.requires_grad) for name, tensor in tensors.items()}
    try:
        for name, tensor in tensors.items():
            # Running statistics are changed by evaluations: those of a copy.
            tensor.data = values[name].clone() if name in buffers else values[name]
            tensor.requires_grad_(name in names)
        yield named
    finally:
        for name, (data, requires_grad) in saved.items():
            tensors[name].data = data
            tensors[name].requires_grad_(requires_grad)


@contextmanager
def uncast(model: nn.Module) -> Iterator[None]:
    """Have casts of modules, as `self.head.float()` in a forward pass, last no longer than the context.

    A model's own are not done: its parameters' places hold what is evaluated, whose type that is. Others, which a loss
    casts to its input's type, are, and are undone. Nothing is written into `.data`: under torch.func that ends the
    process.

    Args:
        model: that is evaluated.

    Yields:
        Nothing; afterwards modules are cast for good again.
    """
    modules: Any = nn.Module
    cast = modules._apply
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []

    def cast_for_now(module: nn.Module, function: Callable[[Tensor], Tensor], *_: Any, **__: Any) -> nn.Module:
        own = {id(each) for each in model.modules()}
        for each in module.modules():
            if id(each) not in own:
                before.append((each, dict(each._parameters), dict(each._buffers)))
                places: tuple[dict[str, Any], ...] = each._parameters, each._buffers
                for place in places:
                    place.update({key: t if t is None else function(t.detach()) for key, t in place.items()})
        return module

    try:
        modules._apply = cast_for_now
        yield
    finally:
        modules._apply = cast
        for module, parameters, buffers in reversed(before):
            module._parameters.update(parameters)
            module._buffers.update(buffers)
