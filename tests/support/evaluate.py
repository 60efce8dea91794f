"""A loss as a function of a copy's parameters, in float64 and plain torch: what the judge evaluates."""

import copy
import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from oracle import double, wide
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

STEPS = (1e-3, 1e-4, 1e-5, 1e-6)
FINER = (1e-7, 1e-8, 1e-9, 1e-10)  # beside features of 1e2 and more, down to 1e-6 over the largest


@dataclass(frozen=True)
class Span:
    """Where a parameter lies; what `block_error` wants to know."""

    name: str
    size: int
    span: range


def duplicate(model: nn.Module) -> nn.Module:
    """Copy a model; tensors it keeps as plain attributes may be parts of an old graph, which deepcopy refuses."""
    kept = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(v): v.detach().clone() for v in kept})


def copied(model: nn.Module) -> nn.Module:
    """Copy a model in float64, or complex128."""
    return duplicate(model)._apply(wide)


def selected(model: nn.Module, globs: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad and match, as `Problem` says it."""
    free = {n: p for n, p in model.named_parameters() if p.requires_grad}
    globs = ("*",) if globs is None else (globs,) if isinstance(globs, str) else tuple(globs)
    chosen = set(free) if all(g.startswith("!") for g in globs) else set()
    for glob in globs:
        matches = set(fnmatch.filter(free, glob.removeprefix("!")))
        chosen = chosen - matches if glob.startswith("!") else chosen | matches
    return {n: p for n, p in free.items() if n in chosen}


class Loss:
    """A loss as a function of a copy's parameters."""

    def __init__(
        self, model: nn.Module, whole_loss: Callable[[nn.Module, Any], Tensor], batch: Any, globs: Any = None
    ) -> None:
        self.model, self.whole_loss, self.batch = copied(model), whole_loss, double(batch)
        named = selected(self.model, globs)
        self.names, self.parameters = tuple(named), tuple(named.values())
        ends = np.cumsum([p.numel() for p in self.parameters])
        self.layout = tuple(
            Span(n, p.numel(), range(end - p.numel(), end))
            for (n, p), end in zip(named.items(), map(int, ends), strict=True)
        )
        # A forward pass may write into parameters (max_norm), so every evaluation starts from these.
        self.start = [(p, p.detach().clone()) for p in self.model.parameters()]

    def shift_by_ulps(self, seed: int) -> None:
        """Shift every parameter by a few of its last bits: what a Hessian changes by is rounding."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters:
                rms = float(parameter.abs().square().mean().sqrt()) if parameter.numel() else 0.0
                size = torch.where(parameter == 0, rms or 0.1, parameter.abs())
                shift = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += np.finfo(np.float64).eps * size * shift.sign() * (1 + shift.abs())

    def value(self, batch: Any = None, shift: float = 0.0) -> float:
        """The loss at the start, or with a shift of all parameters that is not along them."""
        self._reset()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for parameter in self.parameters if shift else ():
                parameter += shift * torch.linspace(1, 2, parameter.numel()).reshape(parameter.shape).to(parameter)
            return float(self.whole_loss(self.model, self.batch if batch is None else batch))

    def with_gradient(self, index: tuple[int, int] | None = None, shift: float = 0.0) -> tuple[float, np.ndarray]:
        """Loss and gradient with one entry, (parameter, flat index), shifted."""
        self._reset()
        if index is not None:
            parameter = self.parameters[index[0]]
            with torch.no_grad():
                parameter[np.unravel_index(index[1], parameter.shape)] += shift
        with sdpa_kernel(SDPBackend.MATH):
            value = self.whole_loss(self.model, self.batch)
            parts = torch.autograd.grad(value, self.parameters, materialize_grads=True)
        dense = [(g.to_dense() if g.is_sparse else g).reshape(-1) for g in parts]
        return float(value.detach()), torch.cat(dense).numpy()

    def steps(self) -> tuple[float, ...]:
        """Steps of differences: a weight beside a feature of 2e4 moves what it is multiplied into that much further."""
        floats = [t for t in tree_leaves(self.batch) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
        largest = max((float(t.detach().to_dense().abs().nan_to_num(0, 0).max()) for t in floats), default=0.0)
        return STEPS + tuple(step for step in FINER if largest >= 100 and step > 1e-6 / largest)

    def entries(self) -> Iterator[tuple[int, int]]:
        return ((k, i) for k, p in enumerate(self.parameters) for i in range(p.numel()))

    def _reset(self) -> None:
        with torch.no_grad():
            for parameter, value in self.start:
                parameter.copy_(value)
