"""What a program has around the call: modes of autograd, default types, hooks; layers that have no weights yet."""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu

from hazards.base import Fn, adding, call, labels, normal, supervised
from hazards.outside import closed

add = adding("surroundings")
X, Y = normal(7, 4), labels(7)


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 3))


def classified(model=None, **options):
    return supervised(model or net(), nn.CrossEntropyLoss(), X, Y, **options)


@contextlib.contextmanager
def default_type(dtype=torch.float64):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def graph_alive():
    """A backward pass of the user's own is under way: gradients lie in .grad of other tensors."""
    own = torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(True):
        (own**2).sum().backward()
        yield
    assert own.grad.tolist() == [2.0, 2.0]


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients switched off": lambda: torch.set_grad_enabled(False),
    "anomalies looked for": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": default_type,
    "deterministic algorithms": deterministic,
    "saved tensors moved": save_on_cpu,
    "a device by default": lambda: torch.device("cpu"),
    "a backward pass of its own": graph_alive,
}
for name_, around_ in AROUND.items():
    add(f"around: {name_}", classified, around=around_)
add(
    "around: no_grad, and a closure over the model",
    lambda: closed(net(), lambda m: lambda o, t: F.cross_entropy(o, t) + 0.1 * m[0].weight.pow(4).sum(), X, Y),
    around=torch.no_grad,
)


class Tempered(nn.Module):
    """A loss with a temperature of its own, which is learnt."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, o, y):
        return F.cross_entropy(o * self.temperature.exp(), y)


def tempered(loss=None, **options):
    """Its temperature is a constant of the Hessian with respect to the model."""
    loss = loss or Tempered()
    whole = lambda m, b: F.cross_entropy(call(m, b[0]) * loss.temperature.double().exp().detach(), b[1])
    return net(), whole, (X, Y), {"loss": loss, "data": (X, Y), **options}


def joined():
    """Model and loss in one module, as the message is to say."""
    model = Fn(lambda m, x, y: m.loss(m.net(x), y), net=net(), loss=Tempered())
    return supervised(model, lambda o, _: o, (X, Y), Y)


def made(model):
    """The lazy layers get their shapes."""
    model(X)
    return model


def lazy():
    return nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(3))


def with_lazy_norm():
    return nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d(), nn.Linear(3, 3)).eval()


NOT_MADE = r"LazyLinear|LazyBatchNorm|[Ll]azy|not initiali[sz]ed|no shape"
add("around: loss with a temperature that is learnt", tempered)
add("around: loss with a temperature that is frozen", lambda: tempered(Tempered().requires_grad_(False)))
add(
    "around: temperature of the loss, chosen by name",
    lambda: tempered(params="temperature"),
    r"temperature.*loss|loss.*temperature",
)
add("around: temperature in one module with the model", joined)
add("around: lazy layers without shapes", lambda: classified(lazy()), NOT_MADE)
add("around: a lazy norm without a shape", lambda: classified(with_lazy_norm()), NOT_MADE)
add("around: lazy layers that were called", lambda: classified(made(lazy())))
