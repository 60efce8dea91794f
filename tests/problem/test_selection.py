"""Which parameters globs choose, and what is said where they choose none."""

import pytest
import torch
from torch import nn

from pipeline import ProblemError
from pipeline.problem.selection import check_finite, constants_of, require_ready, select


def model():
    made = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    made[0].bias.requires_grad_(requires_grad=False)
    return made


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        (None, ["0.weight", "1.weight", "1.bias"]),
        ("1.*", ["1.weight", "1.bias"]),
        (["*", "!*.weight"], ["1.bias"]),
        (["1.bias", "0.weight"], ["0.weight", "1.bias"]),  # in the model's order
    ],
)
def test_chosen(globs, names):
    assert select(model(), globs).names == tuple(names)


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        (["2.*"], "`2.*` matches no parameter"),
        (["1.wieght"], "did you mean `1.weight`"),
        (["0.bias"], "matches only frozen parameters"),
        (["prior.*"], "is a parameter of the loss"),
        (["!*"], "leave no parameter"),
    ],
)
def test_refused(globs, message):
    with pytest.raises(ProblemError) as caught:
        select(model(), globs, elsewhere=["prior.scale"])
    assert message in str(caught.value)


def test_nothing_to_choose_from():
    with pytest.raises(ProblemError, match="has no parameters"):
        select(nn.ReLU(), None)
    with pytest.raises(ProblemError, match="requires_grad_"):
        select(nn.Linear(1, 1).requires_grad_(requires_grad=False), None)


def test_complex_parameters_have_no_hessian():
    made = nn.Module()
    made.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ProblemError, match="`phase` is complex"):
        select(made, None)


def test_weights_that_are_not_there_yet():
    with pytest.raises(ProblemError, match="`weight` is not initialised"):
        require_ready(nn.LazyLinear(1))
    require_ready(model())


def test_parameters_of_a_loss(caplog):
    shared = model()
    loss = nn.ModuleDict({"own": nn.Linear(1, 1), "shared": shared})
    assert constants_of(loss, shared) == ("own.weight", "own.bias")
    assert "loss: its own parameters (own.weight, own.bias) are constants here" in caplog.text
    assert constants_of(torch.sum, shared) == ()


def test_weights_must_be_finite():
    check_finite({"w": torch.ones(3)}, "model")
    with pytest.raises(ProblemError, match="model: 1 of 2 entries of `w`"):
        check_finite({"w": torch.tensor([1.0, float("inf")])}, "model")
