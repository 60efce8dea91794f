"""The problem that a composition names, and its twin in float64."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hazards.compositions import (
    OUTPUTS,
    PULL,
    SCALE,
    Composition,
    N,
    anchored,
    reduced,
    torch_loss,
    two_passes,
    user_loss,
)
from hazards.nets import FEATURES, POSITIONS, TOKENS, WRAPPERS, make, twin_of
from pipeline import Problem


@dataclass(frozen=True)
class Made:
    """What a composition comes to.

    Attributes:
        problem: made when it is called: that may refuse already.
        twin: the net in float64, not wrapped.
        names: of its parameters that are selected, in order.
        whole: the loss of a net over all data.
    """

    problem: Callable[[], Problem]
    twin: nn.Module
    names: tuple[str, ...]
    whole: Callable[[nn.Module], Tensor]


def inputs(c: Composition, generator: torch.Generator) -> Tensor:
    if c.front == "tokens":
        return torch.randint(0, TOKENS, (N, POSITIONS), generator=generator)
    shape = (N, FEATURES) if c.front == "features" else (N, POSITIONS, FEATURES)
    return torch.randn(shape, generator=generator) * 10.0 ** torch.tensor(c.features)


def scaled(c: Composition, net: nn.Module) -> nn.Module:
    """The net's front with its weights in their scales."""
    weight = net.front.linear.weight if c.front == "features" else net.front.weight
    if c.front != "tokens" and c.fitted:
        weight.data /= 10.0 ** torch.tensor(c.features)
    weight.data *= 10.0**c.weights
    return net


def data_of(c: Composition, x: Tensor, y: Tensor, w: Tensor) -> Any:
    return {
        "tuple": lambda: (x, y),
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=3 if c.separable else N),
        "data set": lambda: TensorDataset(x, y),
        "flags": lambda: [{"x": x, "scale": SCALE, "flip": True, "y": y}],
        "three parts": lambda: (x, y, w),
        "numpy": lambda: (x.numpy(), y.numpy()),
    }[c.form]()


def selected(net: nn.Module, globs: Any) -> tuple[str, ...]:
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    patterns = ("*",) if globs is None else (globs,) if isinstance(globs, str) else globs
    keep = [g for g in patterns if not g.startswith("!")] or ["*"]
    drop = [g[1:] for g in patterns if g.startswith("!")]
    matches = lambda n, gs: any(fnmatch.fnmatch(n, g) for g in gs)
    return tuple(n for n in names if matches(n, keep) and not matches(n, drop))


def build(c: Composition) -> Made:
    """Make the problem, and its twin."""
    torch.manual_seed(c.seed)
    generator = torch.Generator().manual_seed(c.seed)
    net = scaled(c, make(c.front, c.layers, OUTPUTS, c.wrapper))
    twin, model = twin_of(net), WRAPPERS[c.wrapper](net)
    x, w, extra = inputs(c, generator), torch.linspace(0.25, 2, N), inputs(c, generator)[:3]
    y = torch.randint(0, OUTPUTS, (N,), generator=generator)
    y = torch.where(torch.arange(N) % 3 == 1, -100, y) if c.loss == "ignored" else y
    y = torch.randn(N, OUTPUTS, generator=generator) if c.loss in {"mse", "huber"} else y
    other = (lambda t: t.flip(1)) if c.front == "tokens" else (lambda t: t * 0.5)
    options = {"params": c.params, "l2": c.l2, "separable": c.separable}
    passes, by_user = c.way == "two passes", c.way not in {"torch", "two passes", "terms"}
    plain = c.form not in {"flags", "three parts"}
    if passes:
        data = data_of(c, x, y, w) if plain else (x, y)
        arguments = {"objective": two_passes(c, other), "data": data, "reduction": c.reduction}
    elif c.way == "terms":
        terms = [(1.0, lambda call, b: user_loss(c, model)(call(b[0]), b[1]), (x, y)), (PULL, anchored, extra)]
        arguments = {"terms": terms}
    elif by_user or not plain:
        arguments = {"loss": user_loss(c, model), "data": data_of(c, x, y, w), "reduction": c.reduction}
    else:
        arguments = {"loss": torch_loss(c), "data": data_of(c, x, y, w)}
    names = selected(twin, c.params)

    def whole(m):
        wide = lambda t: t.to(m.head.weight) if t.is_floating_point() else t
        if passes:
            loss = reduced(c, two_passes(c, other)(m, (wide(x), wide(y))))
        else:
            flags = (SCALE, True) if c.form == "flags" and c.way != "terms" else ()
            weights = (wide(w),) if c.form == "three parts" and c.way != "terms" else ()
            loss = reduced(c, user_loss(c, m)(m(wide(x), *flags), wide(y), *weights))
        if c.way == "terms":
            loss = loss + PULL * anchored(m, wide(extra))
        return loss + c.l2 / 2 * sum((p**2).sum() for n, p in m.named_parameters() if n in names)

    return Made(lambda: Problem(model, **options, **arguments), twin, names, whole)
