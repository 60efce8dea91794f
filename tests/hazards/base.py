"""What an ingredient is, how it is registered, and the small models that most of them are put into."""

import copy
import functools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from derive import duplicate
from torch import Tensor, nn

from pipeline import Problem


@dataclass(frozen=True)
class Hazard:
    """A problem, and the loss over all its data in one batch, written a second time in plain torch.

    `culprit` is what the message of a refusal must match. `problem` is made on first use: that may refuse already.
    `twin` is the model written a second time, of the same parameters in the same order, where it cannot be judged
    itself: it writes float32, or is wrapped. `around` is set around the run. `kind` is its kind of problem. What is
    `optional` may be refused though it has a Hessian: data of a form that the message says to convert.
    """

    name: str
    model: nn.Module
    whole_loss: Callable[[nn.Module, Any], Tensor]
    whole_batch: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    twin: nn.Module | None = None
    culprit: str = ""
    kind: str = ""
    around: Callable[[], AbstractContextManager] = nullcontext
    optional: bool = False

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.model, **self.arguments)


HAZARDS: dict[str, Callable[[], Hazard]] = {}


def add(name, make, culprit="", kind="", **options):
    """Register `make() -> (model, whole_loss, whole_batch, arguments)`, a twin after them where there is one."""
    assert name not in HAZARDS, name

    @functools.wraps(make)
    def build():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return Hazard(name, *make(), culprit=culprit, kind=kind, **options)

    build.kind = kind
    HAZARDS[name] = build


def adding(kind):
    """Give `add` for one kind of problem."""
    return functools.partial(add, kind=kind)


def twinned(model, twin, whole, batch, arguments):
    """Give the twin the model's weights, one by one in their order, as wrappers change names."""
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    with torch.no_grad():
        for source, target in pairs:
            assert source.shape == target.shape
            target.copy_(source)
            target.requires_grad_(source.requires_grad)
    return model, whole, batch, arguments, twin


class Fn(nn.Module):
    """A function of itself and its inputs, with modules, parameters and buffers by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def like(loss, out):
    """Give a loss module whose own tensors are of the output's type, on its device."""
    return copy.deepcopy(loss).to(out) if isinstance(loss, nn.Module) and isinstance(out, Tensor) else loss


def supervised(model, loss, x, y, **options):
    def whole(m, batch):
        out = call(m, batch[0])
        return like(loss, out)(out, batch[1])

    return model, whole, (x, y), {"loss": loss, "data": (x, y), **options}


def objective(model, function, batch, **options):
    """Of a `function(call, batch) -> (sum, weight)`."""

    def whole(m, b):
        total, weight = function(m, b)
        return total / weight

    return model, whole, batch, {"data": batch, "objective": function, **options}


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(*shape, classes=3, seed=2):
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def shaken(model, size=0.3):
    """Move every parameter: ones and zeros hide errors."""
    for p in model.parameters():
        p.data += size * torch.randn(p.shape).to(p)
    return model


def classifier(body, x, **options):
    """Body, flattened, a linear head, cross-entropy."""
    with torch.no_grad(), torch.random.fork_rng():
        # Probed on a copy: a batch norm's statistics are to be those of the ingredient alone.
        features = call(duplicate(body), x).flatten(1).shape[1]
    n = len(x[0] if isinstance(x, tuple) else x)
    head = nn.Sequential(nn.Flatten(), nn.Linear(features, 3))
    model = Fn(lambda m, *inputs: m.head(m.body(*inputs)), body=body, head=head)
    return supervised(model, nn.CrossEntropyLoss(), x, labels(n), **options)


def between(*layers, x=None, **options):
    """Linear(5, 4), the layers, a head."""
    return classifier(nn.Sequential(nn.Linear(5, 4), *layers), normal(7, 5) if x is None else x, **options)
