"""What is summed over samples, by hand: a loss of outputs, an objective, and several terms."""

import pytest
import torch
from torch import nn

from pipeline import ProblemError
from pipeline.problem.criteria import OfCalls, OfOutput, OfTerms, criterion_of

X, Y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.0], [0.0], [1.0]])


def scaling(factor):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, factor)
    return model


def as_numbers(found):
    return tuple(float(number.detach()) for number in found)


def test_a_loss_of_the_output():
    criterion = OfOutput(nn.MSELoss(), None)
    assert criterion.reduction == "mean"
    assert as_numbers(criterion.sums(scaling(2.0), (X, Y))) == (4 + 16 + 49, 3)
    assert as_numbers(criterion.as_torch().sums(scaling(2.0), (X, Y))) == ((4 + 16 + 49) / 3, 1)
    assert OfOutput(lambda output, target: output.sum(), "sum").as_torch() is None


@pytest.mark.parametrize("batch", [X, [X, Y], (X,)])
def test_what_is_no_pair(batch):
    with pytest.raises(ProblemError, match=r"expected \(inputs, target\)"):
        OfOutput(nn.MSELoss(), None).sums(scaling(1.0), batch)


def test_an_objective_calls_the_model_as_it_likes():
    criterion = OfCalls(lambda call, batch: (call(batch) - call(2 * batch)).sum(), "mean")
    assert as_numbers(criterion.sums(scaling(3.0), X)) == (-21 * 3, 3)  # a mean: times the samples
    (batch,) = criterion.batches(X, separable=True)
    assert batch is X


def test_terms_are_weighed_over_all_their_data():
    terms = [
        (2.0, lambda call, x: (call(x).sum(), float(len(x))), [X[:2], X[2:]]),
        (0.5, lambda call, x: (call(x).square().sum(), 4.0), [X]),
    ]
    criterion, model = OfTerms(terms, None), scaling(1.0)
    batches = criterion.batches(terms, separable=True)
    assert [batch.term for batch in batches] == [0, 0, 1]
    criterion.weigh(model, batches)
    total = sum(as_numbers(criterion.sums(model, batch))[0] for batch in batches)
    assert total == pytest.approx(2 * 7 / 3 + 0.5 * 21 / 4)
    criterion.weigh(model, batches[:1])  # of a few of them: what they are divided by stays
    assert as_numbers(criterion.sums(model, batches[0])) == pytest.approx((2 * 3 / 3, 1))


@pytest.mark.parametrize("terms", [[], [(1.0, None, [X])], [(1.0, torch.sum)]])
def test_what_are_no_terms(terms):
    with pytest.raises(ProblemError, match=r"expected a list of \(coefficient, objective, data\)"):
        criterion_of(None, None, terms, None)


def test_a_term_without_weight():
    terms = [(1.0, lambda call, x: (call(x).sum(), 0.0), [X])]
    criterion = OfTerms(terms, None)
    with pytest.raises(ProblemError, match=r"weights of term 0 sum to 0\.0"):
        criterion.weigh(scaling(1.0), criterion.batches(terms, separable=True))


@pytest.mark.parametrize(("given", "named"), [({}, "none"), ({"loss": nn.MSELoss(), "terms": []}, "loss and terms")])
def test_one_of_the_three(given, named):
    with pytest.raises(ProblemError, match=f"got {named}"):
        criterion_of(**{"loss": None, "objective": None, "terms": None, "reduction": None} | given)
