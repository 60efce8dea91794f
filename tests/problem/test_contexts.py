"""What is set around evaluations is put back, and so is what they do to models."""

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.problem.contexts import exact_kernels, on_copies, random_digest, unchanged


def with_grads():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.scratch = torch.zeros(2)
    return model


def test_models_are_left_as_they_are():
    model, loss = with_grads(), nn.CrossEntropyLoss(weight=torch.ones(2))
    loss.seen = []
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]

    def spoil():
        with unchanged(model, loss):
            model.zero_grad()
            model[1].weight.grad = torch.zeros(2)
            model(torch.randn(3, 2)).sum().backward()
            model.scratch += 1
            loss.seen.append(1)
            loss.weight.mul_(2)
            model.eval()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        spoil()
    assert model.training
    assert model.scratch.tolist() == [0, 0]
    assert loss.seen == []
    assert loss.weight.tolist() == [1, 1]
    for p, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(grad, value)


def test_weights_are_written_into_copies():
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with on_copies(model):
        model.weight.data.zero_()
    assert torch.equal(model.weight, before)


def test_nothing_is_compiled_meanwhile(monkeypatch):
    """Whether torch has loaded what compiles, or not yet."""
    calls, compiled = [], torch.compile
    with exact_kernels(nn.Linear(1, 1)):
        torch.compile(lambda x: calls.append(torch.compiler.is_compiling()) or x, backend="eager")(torch.ones(1))
    assert calls == [False]
    assert torch.compile is compiled
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with exact_kernels(nn.Linear(1, 1)):
        assert torch.compile(len) is len
        assert torch.compile(mode="default")(len) is len
    assert torch.compile is compiled


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: np.random.random(), random.random])
def test_a_number_that_is_drawn_shows(draw):
    before = random_digest()
    assert random_digest() == before
    draw()
    assert random_digest() != before
