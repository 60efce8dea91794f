"""Values in the place of a model's own, for as long as something is evaluated, and no longer."""

import pytest
import torch
from torch import nn

from pipeline.problem.modules import evaluate_at, holding, slots_of, uncast, unwrapped


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x):
        return self.b(self.a(x)) + self.shift


def test_a_tied_tensor_has_two_places_and_one_name():
    assert slots_of(Tied()) == {"a.weight": "a.weight", "b.weight": "a.weight", "shift": "shift"}


def test_wrappers_are_taken_off():
    inner = nn.Linear(1, 1)
    assert unwrapped(nn.DataParallel(nn.DataParallel(inner))) == (inner, ("DataParallel", "DataParallel"))
    assert unwrapped(inner) == (inner, ())


def test_evaluated_at_other_values():
    model, x = Tied(), torch.tensor([[1.0, 2.0]])
    before = model(x)
    twice = {slot: 2 * torch.eye(2) for slot in ("a.weight", "b.weight")}
    # A closure that reads the model outside of the call reads the same values.
    found = evaluate_at(twice, model, lambda batch: model(batch) + model.a.weight.sum(), x)
    torch.testing.assert_close(found, 4 * x + 1 + 4)
    torch.testing.assert_close(model(x), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_have_their_own():
    with pytest.raises(NotImplementedError, match="scripted"):
        evaluate_at({}, torch.jit.script(nn.Linear(1, 1)), torch.sum, torch.ones(1))


def test_held_values_are_given_back_even_after_an_error():
    model = Tied()
    before, shift = model.a.weight.detach().clone(), model.shift
    model.a.weight.requires_grad_(requires_grad=False)

    def fail():
        with holding({"a.weight": torch.zeros(2, 2), "shift": torch.zeros(2)}, model, ["a.weight"]) as own:
            assert own["a.weight"] is model.a.weight
            assert model.a.weight.requires_grad
            assert not model(torch.ones(1, 2)).any()
            model.shift += 1  # as running statistics are changed
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    torch.testing.assert_close(model.a.weight, before)
    assert not model.a.weight.requires_grad
    assert model.shift is shift
    assert bool((shift == 1).all())


def test_casts_last_no_longer_than_the_context():
    model, other = nn.Sequential(nn.Linear(2, 2)), nn.BatchNorm1d(2)
    weight, mean = other.weight, other.running_mean
    with uncast(model):
        assert model.double()[0].weight.dtype == torch.float32
        other.double()
        assert other.weight.dtype == other.running_mean.dtype == torch.float64
        assert other.num_batches_tracked.dtype == torch.int64
    assert other.weight is weight
    assert other.running_mean is mean
    assert model.double()[0].weight.dtype == torch.float64
