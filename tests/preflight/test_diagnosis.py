"""Modules that are named where numbers part."""

import torch
from torch import nn

from pipeline import Problem
from pipeline.preflight.diagnosis import coupling_module, drawing_module, remembering_module, unsteady_module
from pipeline.problem.batches import take

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand(())


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Keeping(nn.Module):
    def forward(self, x):
        self.last = x.detach()
        return x


def placed(*modules):
    model = nn.Sequential(nn.Linear(3, 3), *modules)
    model.double()  # hooks are told of what a model does by itself, outside of any substitution
    return Problem(model, lambda out, _: out.sum(), (X.double(), X), reduction="sum").place(torch.float64)


def test_who_draws():
    at = placed(nn.ReLU(), nn.Dropout())
    assert drawing_module(at, at.problem.batches[0]) == " in `2` (Dropout)"
    at = placed(nn.ReLU())
    assert drawing_module(at, at.problem.batches[0]) == " in the loss"


def test_who_differs_from_pass_to_pass():
    at = placed(nn.ReLU(), Noisy(), nn.Tanh())
    assert unsteady_module(at, at.problem.batches[0]) == " from `2` (Noisy)"
    at = placed(nn.ReLU())
    assert unsteady_module(at, at.problem.batches[0]) == " from the loss"


def test_who_keeps_something():
    at = placed(Keeping())
    assert remembering_module(at, at.problem.batches[0]) == ", kept as `last` of `1` (Keeping)"
    at = placed()
    assert remembering_module(at, at.problem.batches[0]) == ""


def test_who_couples_samples():
    at = placed(nn.ReLU(), Centred(), nn.Tanh())
    batch = at.problem.batches[0]
    assert coupling_module(at, batch, take(batch, slice(0, 2))) == ", they act on each other in `2` (Centred)"
    at = placed(nn.ReLU(), nn.LayerNorm(3))
    assert coupling_module(at, batch, take(batch, slice(0, 2))) == ""
