"""Losses written out: the values and gradients of torch, and second derivatives that torch does not have."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck, gradgradcheck

from pipeline.problem import plain_losses

SCORES = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 4, 1])
SEVERAL = torch.tensor([[3, 0, -1, 1, 2], [-1, 0, 1, 2, 3], [0, 1, 2, 3, 4], [2, -1, -1, 4, -1]])


def checked(ours, torchs, x):
    x = x.clone().requires_grad_()
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(grad(ours(x).sum(), x)[0], grad(torchs(x).sum(), x)[0])
    assert gradcheck(ours, (x,))
    assert gradgradcheck(ours, (x,))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_multi_margin(p, reduction):
    options = {"p": p, "margin": 0.5, "reduction": reduction, "weight": torch.arange(1.0, 6.0).double()}
    checked(
        lambda x: plain_losses.multi_margin_loss(x, LABELS, **options),
        lambda x: F.multi_margin_loss(x, LABELS, **options),
        SCORES,
    )


def test_multilabel_margin():
    checked(
        lambda x: plain_losses.multilabel_margin_loss(x, SEVERAL, reduction="none"),
        lambda x: F.multilabel_margin_loss(x, SEVERAL, reduction="none"),
        SCORES,
    )


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc(zero_infinity):
    scores = torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels, steps, sizes = torch.tensor([[1, 1, 2], [3, 2, 1], [1, 2, 3]]), [6, 5, 4], [3, 0, 2]

    def loss(function):
        return lambda x: function(x.log_softmax(2), labels, steps, sizes, zero_infinity=zero_infinity)

    checked(loss(plain_losses.ctc_loss), loss(F.ctc_loss), scores)


def test_a_label_sequence_that_has_no_alignment():
    table = torch.zeros(2, 1, 3).log_softmax(2)
    arguments = table, torch.tensor([[1, 1]]), [2], [2]  # needs a blank between equal labels
    assert plain_losses.ctc_loss(*arguments, reduction="sum") == torch.inf == F.ctc_loss(*arguments, reduction="sum")
    assert plain_losses.ctc_loss(*arguments, reduction="sum", zero_infinity=True) == 0


@pytest.mark.parametrize(
    "left",
    [
        lambda: plain_losses.multi_margin_loss(SCORES, LABELS, p=3),
        lambda: plain_losses.multi_margin_loss(SCORES, LABELS[:2]),
        lambda: plain_losses.multi_margin_loss(SCORES, LABELS, reduction="median"),
        lambda: plain_losses.multilabel_margin_loss(SCORES, LABELS),
        lambda: plain_losses.ctc_loss(SCORES.unsqueeze(1), SEVERAL[:1], [9], [2]),
    ],
)
def test_what_is_torchs_to_refuse(left):
    assert left() is NotImplemented
