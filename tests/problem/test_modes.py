"""A mode sees what functions of torch call of others' code: a recomputed forward pass, a distance of the user's."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from pipeline.problem.modes import within


class Noting(TorchFunctionMode):
    """Notes the names of all operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return within(self, func, args, kwargs or {})


def test_a_forward_pass_that_a_backward_pass_repeats():
    x = torch.ones(3, requires_grad=True)
    with Noting() as mode:
        value = checkpoint(lambda y: torch.exp(y).sum(), x, use_reentrant=False)
        first = mode.seen.count("exp")
        (slope,) = torch.autograd.grad(value, x)
    assert (first, mode.seen.count("exp")) == (1, 2)
    torch.testing.assert_close(slope, torch.exp(x).detach())


def test_a_distance_of_the_users():
    rows = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))

    def distance(a, b):
        return torch.exp(a - b).sum(-1)

    with Noting() as mode:
        found = F.triplet_margin_with_distance_loss(*rows, distance_function=distance)
    assert mode.seen.count("exp") == 2
    torch.testing.assert_close(found, F.triplet_margin_with_distance_loss(*rows, distance_function=distance))


def test_an_operation_is_called_as_it_is():
    with Noting() as mode:
        assert float(torch.add(torch.ones(()), 2)) == 3
    assert mode.seen.count("add") == 1
