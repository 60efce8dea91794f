"""Special functions of torch that have no derivatives there, or none at zero: written out, or given their known ones.

As in `plain_forms.py`, what is not known gives NotImplemented.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, special

from pipeline.problem.plain_forms import Written

SERIES = 0.1  # below which sin y / y is a series: 1e-18 of the value is left away


def sinc(x: Tensor) -> Written:
    """Return sin(pi x) / (pi x), smooth at 0."""
    if not x.is_floating_point():
        return NotImplemented
    y = math.pi * x
    near = y.abs() < SERIES
    small, large = torch.where(near, y, 0.0).square(), torch.where(near, 1.0, y)
    series = 1 - small / 6 * (1 - small / 20 * (1 - small / 42 * (1 - small / 72)))
    return torch.where(near, series, torch.sin(large) / large)


def _not_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


# Derivatives in terms of each other.
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "bessel_j0": lambda x: -_of("bessel_j1", x),
    "bessel_j1": lambda x: torch.where(x == 0, 0.5, _of("bessel_j0", x) - _of("bessel_j1", x) / _not_zero(x)),
    "bessel_y0": lambda x: -_of("bessel_y1", x),
    "bessel_y1": lambda x: _of("bessel_y0", x) - _of("bessel_y1", x) / x,
    "modified_bessel_k0": lambda x: -_of("modified_bessel_k1", x),
    "modified_bessel_k1": lambda x: -_of("modified_bessel_k0", x) - _of("modified_bessel_k1", x) / x,
    "scaled_modified_bessel_k0": lambda x: _of("scaled_modified_bessel_k0", x) - _of("scaled_modified_bessel_k1", x),
    "scaled_modified_bessel_k1": lambda x: (
        _of("scaled_modified_bessel_k1", x) * (1 - 1 / x) - _of("scaled_modified_bessel_k0", x)
    ),
}


def _of(name: str, x: Tensor) -> Tensor:
    found: Tensor = _Known.apply(name, x)
    return found


class _Known(torch.autograd.Function):
    """A function of `torch.special` with its derivative from `SLOPES`."""

    @staticmethod
    def forward(name: str, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # in a backward pass this may be called where it is written out again
            found: Tensor = getattr(special, name)(x)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.name = inputs[0]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return None, slope * SLOPES[ctx.name](x)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], name: str, x: Tensor) -> tuple[Tensor, Any]:  # noqa: ARG004
        return _of(name, x), dims[1]


def bessel(name: str) -> Callable[[Tensor], Written]:
    """Add derivatives to a Bessel function of `torch.special`."""
    return lambda x: _of(name, x) if x.is_floating_point() else NotImplemented


def spherical_bessel_j0(x: Tensor) -> Written:
    """Return sin(x) / x."""
    return sinc(x / math.pi)


# The first polynomial after 1, and the next one from the degree k of the last, x, the last and the one before.
Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]
RECURRENCES: dict[str, tuple[Callable[[Tensor], Tensor], Step]] = {
    "chebyshev_polynomial_t": (lambda x: x, lambda _k, x, a, b: 2 * x * a - b),
    "chebyshev_polynomial_u": (lambda x: 2 * x, lambda _k, x, a, b: 2 * x * a - b),
    "chebyshev_polynomial_v": (lambda x: 2 * x - 1, lambda _k, x, a, b: 2 * x * a - b),
    "chebyshev_polynomial_w": (lambda x: 2 * x + 1, lambda _k, x, a, b: 2 * x * a - b),
    "hermite_polynomial_h": (lambda x: 2 * x, lambda k, x, a, b: 2 * x * a - 2 * k * b),
    "hermite_polynomial_he": (lambda x: x, lambda k, x, a, b: x * a - k * b),
    "laguerre_polynomial_l": (lambda x: 1 - x, lambda k, x, a, b: ((2 * k + 1 - x) * a - k * b) / (k + 1)),
    "legendre_polynomial_p": (lambda x: x, lambda k, x, a, b: ((2 * k + 1) * x * a - k * b) / (k + 1)),
}
POLYNOMIALS = (*RECURRENCES, *(f"shifted_chebyshev_polynomial_{kind}" for kind in "tuvw"))


def polynomial(name: str) -> Callable[..., Written]:
    """Write an orthogonal polynomial of `torch.special`, of a whole degree, by its recurrence."""
    shifted = name.startswith("shifted_")
    first, step = RECURRENCES[name.removeprefix("shifted_")]

    def form(x: Tensor, n: Any) -> Written:
        if not isinstance(x, Tensor) or not x.is_floating_point() or type(n) is not int or n < 0:
            return NotImplemented
        x = 2 * x - 1 if shifted else x
        last, found = torch.zeros_like(x), torch.ones_like(x)
        for k in range(n):
            last, found = found, first(x) if k == 0 else step(k, x, found, last)
        return found

    return form
