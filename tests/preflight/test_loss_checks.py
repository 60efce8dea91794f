"""What a loss must be: the same each time, of its parameters alone, and a sum over samples."""

import pytest
import torch
from torch import nn

from pipeline import Problem, ProblemError
from pipeline.preflight.loss_checks import (
    check_deterministic,
    check_reduction,
    check_separable,
    check_weight,
    check_without_memory,
    custom_functions,
    reads_outside,
)

X, Y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1, 0])


def placed(model, loss=None, **options):
    return Problem(model, loss or nn.CrossEntropyLoss(), (X, Y), **options).place(torch.float64)


def dense():
    torch.manual_seed(0)
    return nn.Linear(2, 2)


def test_a_plain_network_passes():
    whole = placed(dense())
    assert check_deterministic(whole) == []
    check_reduction(whole, 4)
    check_separable(whole, whole, 4)
    check_without_memory(whole, whole.at({name: 2 * p for name, p in whole.parameters.items()}))
    assert reads_outside(whole) == []
    assert custom_functions(whole) == ""


def test_random_numbers_are_traced_to_their_module():
    with pytest.raises(ProblemError, match=r"random numbers are drawn in `1` \(Dropout\)"):
        check_deterministic(placed(nn.Sequential(dense(), nn.Dropout())))


class Counting(nn.Module):
    """Another function at each call."""

    def __init__(self):
        super().__init__()
        self.dense, self.calls = dense(), 0

    def forward(self, x):
        self.calls += 1
        return self.dense(x) * self.calls


def test_state_is_traced_to_its_module():
    with pytest.raises(ProblemError, match=r"not deterministic .* from the model \(Counting\)"):
        check_deterministic(placed(Counting()))


def test_buffers_that_change_without_effect_are_named():
    model = nn.Sequential(nn.BatchNorm1d(2), dense())
    assert check_deterministic(placed(model, separable=False)) == [
        "0.running_mean",
        "0.running_var",
        "0.num_batches_tracked",
    ]


class Caching(nn.Module):
    """Keeps what it made of its weights at first."""

    def __init__(self):
        super().__init__()
        self.dense, self.kept = dense(), None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.dense.weight.detach().clone()
        return self.dense(x) @ self.kept


def with_accuracy(out, y):
    return nn.functional.cross_entropy(out, y), (out.argmax(1) == y).double().mean()


def test_a_weight_that_follows_the_parameters_is_none():
    weighted = placed(dense(), lambda out, y: (nn.functional.cross_entropy(out, y, reduction="sum"), (y + 1).sum()))
    check_weight(weighted)
    with pytest.raises(ProblemError, match=r"second number changes with the parameters \(0\.\d+, then .*an accuracy"):
        check_weight(placed(dense(), with_accuracy, separable=False))


def test_memory_is_found():
    one = placed(Caching())
    other = one.at({name: 2 * p for name, p in one.parameters.items()})
    with pytest.raises(ProblemError, match="after an evaluation with other parameters"):
        check_without_memory(one, other)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum"), {"reduction": "mean"}),
        (nn.functional.cross_entropy, {"reduction": "mean"}),
        (lambda out, y: (out - out.mean(0)).square().mean(), {}),
    ],
)
def test_what_is_no_mean_over_samples(loss, options):
    whole = placed(dense(), loss, **options)
    if loss is nn.functional.cross_entropy:  # of torch: it is known how it is reduced
        check_separable(whole, whole, 4)
        return
    with pytest.raises(ProblemError, match="it is not a mean over samples"):
        check_separable(whole, whole, 4)


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def test_samples_that_act_on_each_other_are_traced_to_their_module():
    whole = placed(nn.Sequential(dense(), Centred()))
    with pytest.raises(ProblemError, match=r"they act on each other in `1` \(Centred\)"):
        check_separable(whole, whole, 4)


def test_parameters_read_past_the_model():
    model = dense()
    held = model.weight  # by a closure that no substitution reaches

    def loss(out, y):
        return nn.functional.cross_entropy(out, y, reduction="sum") + len(y) * 1e-9 * held.square().sum()

    assert reads_outside(placed(model, loss, reduction="sum")) == ["weight"]


def test_tensors_made_of_parameters_before_the_call():
    model = dense()
    made = model.weight.flatten()
    with pytest.raises(ProblemError, match="was made of `weight` before the call"):
        reads_outside(placed(model, lambda out, y: out.sum() + made.sum(), reduction="sum"))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


def test_functions_with_a_backward_of_their_own_are_named():
    whole = placed(dense(), lambda out, y: Square.apply(out).sum(), reduction="sum")
    assert custom_functions(whole) == " (`Square` has a backward of its own)"


def test_a_loss_that_is_no_number():
    with pytest.raises(ProblemError, match="expected a finite number"):
        check_deterministic(placed(dense(), lambda out, y: out.sum() * float("nan")))
