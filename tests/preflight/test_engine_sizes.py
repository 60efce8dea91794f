"""Sizes chosen by calls that are measured; by smaller ones where calls take long."""

from dataclasses import replace

import pytest
import torch
import zoo
from torch import nn

from pipeline import Problem
from pipeline.engines.cost import Segment
from pipeline.engines.registry import applications
from pipeline.preflight import engine_sizes
from pipeline.preflight.engine_sizes import CALL_SECONDS, LEAST_SIZE, choose_sizes


def measured(monkeypatch, row_seconds):
    """Have calls take so long for each row and sample; note them."""
    calls, measure = [], engine_sizes.measure

    def noted(placed, segment, samples, row_group, *, counted=False):
        found = measure(placed, segment, samples, row_group)
        calls.append(replace(found, seconds=row_seconds * found.rows * found.samples))
        return calls[-1]

    monkeypatch.setattr(engine_sizes, "measure", noted)
    return calls


def segments(placed, engine):
    known = applications(placed, None)
    return [Segment.of(p, range(p.offset, placed.layout.size), engine, known) for p in placed.layout]


@pytest.mark.parametrize("row_seconds", [1e-6, 0.08])
def test_what_takes_long_is_measured_with_less(monkeypatch, row_seconds):
    placed = zoo.mlp().problem.place(torch.float64)
    calls = measured(monkeypatch, row_seconds)
    found = choose_sizes(placed, segments(placed, "jacrev"), 2**30, None, None)
    assert all(call.seconds <= CALL_SECONDS or call.samples <= LEAST_SIZE for call in calls)
    widest = max(p.size for p in placed.layout)  # a group has room for all
    assert (max(call.rows for call in calls) == widest) == (row_seconds < 1e-3)
    assert found.sizes["jacrev"].microbatch == placed.problem.sample_count  # memory has room for all
    assert found.engine_bytes >= max(call.peak_bytes for call in calls)


def test_a_call_that_computes_all_rows_has_few_samples(monkeypatch):
    """Units of an embedding share their rows: a group of one unit takes as long as all."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(40, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    problem = Problem(net, nn.CrossEntropyLoss(), (torch.randint(0, 40, (30, 3)), torch.randint(0, 3, (30,))))
    placed = problem.place(torch.float64)
    calls = measured(monkeypatch, 1e-3)
    embedding = [s for s in segments(placed, "factored") if s.parameter.name == "0.weight"]
    found = choose_sizes(placed, embedding, 2**30, None, None)
    assert embedding[0].shares_rows
    assert {call.rows for call in calls} == {160}
    assert max(call.seconds for call in calls) <= CALL_SECONDS < 30 * 160e-3
    assert found.sizes["factored"].microbatch == 30
