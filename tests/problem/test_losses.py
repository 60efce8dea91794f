"""Sums and weights of losses: divided, they are what torch gives."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import ProblemError
from pipeline.problem.losses import as_terms, sum_and_weight

SCORES = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [2.0, 2.0, 1.0], [0.3, 0.2, 0.1]])
LABELS = torch.tensor([0, 2, -100, 1])
CLASSES = torch.tensor([1.0, 2.0, 5.0])

KNOWN = {
    "cross entropy": (nn.CrossEntropyLoss(), SCORES, LABELS),
    "with class weights": (nn.CrossEntropyLoss(weight=CLASSES), SCORES, LABELS),
    "by its function": (functools.partial(F.cross_entropy, ignore_index=2), SCORES, torch.tensor([0, 2, 2, 1])),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), SCORES, LABELS),
    "squares": (nn.MSELoss(), SCORES, SCORES.flip(0)),
    "divergence by batches": (nn.KLDivLoss(reduction="batchmean"), SCORES.log_softmax(1), SCORES.softmax(1)),
    "mean and variance": (nn.GaussianNLLLoss(), (SCORES, SCORES.abs() + 1), SCORES.flip(0)),
    "in double precision": (nn.CrossEntropyLoss(weight=CLASSES), SCORES.double(), LABELS),
}


@pytest.mark.parametrize("name", KNOWN)
def test_sum_divided_by_weight_is_what_torch_gives(name):
    loss, output, target = KNOWN[name]
    terms, given, reduction = as_terms(loss, None)
    total, weight = terms(output, (target,), (output, target))
    value, one = given(output, (target,), (output, target))
    assert float(one) == 1
    torch.testing.assert_close(total / weight if reduction == "mean" else total, value)


def test_a_weight_is_that_of_what_counts():
    terms, *_ = as_terms(nn.CrossEntropyLoss(weight=CLASSES), None)
    assert float(terms(SCORES, (LABELS,), (SCORES, LABELS))[1]) == 1 + 5 + 2  # the third is ignored


@pytest.mark.parametrize(
    ("loss", "reduction", "message"),
    [
        (nn.MSELoss, None, r"write MSELoss\(\)"),
        (3, None, "got int, expected a callable"),
        (nn.MSELoss(reduction="none"), None, "expected 'mean' or 'sum'"),
        (nn.MSELoss(), "sum", "has reduction='mean', but the problem says 'sum'"),
        (lambda o, t: o, "median", "got 'median'"),
    ],
)
def test_refused(loss, reduction, message):
    with pytest.raises(ProblemError, match=message):
        as_terms(loss, reduction)


@pytest.mark.parametrize(
    ("value", "reduction", "expected"),
    [
        (torch.tensor(2.0), "mean", (8.0, 4.0)),
        (torch.tensor([[2.0]]), "sum", (2.0, 4.0)),
        ((torch.tensor(2.0), 7), "mean", (2.0, 7.0)),
    ],
)
def test_what_a_function_gives(value, reduction, expected):
    assert tuple(map(float, sum_and_weight(value, reduction, (SCORES, LABELS), "loss"))) == expected


@pytest.mark.parametrize("value", [2.0, torch.ones(2), (torch.ones(2), 1)])
def test_what_is_no_sum(value):
    with pytest.raises(ProblemError, match="expected a scalar tensor"):
        sum_and_weight(value, "mean", (SCORES, LABELS), "loss")
