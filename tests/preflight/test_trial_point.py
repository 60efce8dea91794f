"""The few samples that engines are tried on, and the point nearby at which they are."""

import pytest
import torch
import zoo
from torch import nn

from pipeline import Problem
from pipeline.preflight.trial_point import SHIFTS, SPREAD, TrialPoint, representative, two_parts, uneven_parts
from pipeline.problem.batches import sample_count

COUNT = 50


def problem(**options):
    """Samples are told apart by their first input; the rare ones lie in the middle."""
    inputs = torch.stack([torch.arange(float(COUNT)), torch.ones(COUNT)], 1)
    target = torch.ones(COUNT, dtype=torch.long)
    target[17], target[23] = -100, 2
    return Problem(nn.Linear(2, 3), nn.CrossEntropyLoss(), (inputs, target), **options)


def samples(found):
    return [int(k) for batch in found.batches for k in batch[0][:, 0]]


def test_rare_values_and_both_ends_are_among_the_few():
    picked = samples(representative(problem(l2=0.1)))
    assert {0, COUNT - 1, 17, 23} <= set(picked)
    assert SPREAD <= len(picked) <= SPREAD + 3
    assert picked == sorted(picked, reverse=True)  # a model that sorts its samples changes that
    assert representative(problem(l2=0.1)).l2 == 0.0


def test_all_of_what_is_not_separable():
    assert samples(representative(problem(separable=False))) == list(range(COUNT))


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [1, 1]), (3, [1, 2]), (10, [3, 7])])
def test_uneven_parts(count, sizes):
    batch = torch.randn(count, 2), torch.randn(count)
    assert [sample_count(part) for part in two_parts(batch)] == sizes


def test_parts_are_all_of_a_problem():
    whole = problem()
    assert samples(uneven_parts(whole)) == samples(whole)
    assert len(uneven_parts(whole).batches) == 2


@pytest.mark.parametrize("attempt", range(len(SHIFTS)))
def test_the_same_point_in_both_types(attempt):
    few = representative(zoo.mlp().problem)
    point = TrialPoint(few, few.batches, attempt, torch.float32, "cpu")
    assert [placed.dtype for placed in point.types] == [torch.float64, torch.float32]
    assert point.type_name == "float32"
    for name, exact in point.exact.parameters.items():
        torch.testing.assert_close(point.in_run.parameters[name].double(), exact, rtol=0, atol=0)
        own = few.tensors()[name].double()
        moved = float((exact - own).square().mean().sqrt())
        assert moved == pytest.approx(SHIFTS[attempt] * max(float(own.square().mean().sqrt()), 0.1), rel=1.0, abs=1e-7)


def test_one_point_where_the_run_is_in_double_precision():
    few = representative(zoo.mlp().problem)
    point = TrialPoint(few, few.batches, 0, torch.float64, "cpu")
    assert point.types == [point.exact]
