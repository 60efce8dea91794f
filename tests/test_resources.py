"""Work and memory: what the upper triangle saves, and that workers stay under the plan."""

import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import memory
import work


def test_upper_triangle_costs_less_than_the_square():
    placed = work.equal_layers(layers=6, width=8, samples=16).place(torch.float64)
    upper, square = work.upper_triangle(placed), work.full_square(placed)
    np.testing.assert_allclose(np.triu(upper), np.triu(square), atol=1e-6)
    assert work.flops(work.upper_triangle, placed) <= 0.7 * work.flops(work.full_square, placed)


@pytest.fixture(scope="module")
def measured():
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield memory.measure_all()
    ray.shutdown()


def test_workers_stay_under_the_plan(measured):
    for case in measured:
        assert case["peak_bytes"] <= case["planned_bytes"], case


def test_memory_does_not_grow_with_the_matrix(measured):
    """With chunks as tiles, sixteen times the matrix takes no more than a few buffers more."""
    square = [case for case in measured if case["tile"] == (1, 1)]
    grown = square[-1]["peak_bytes"] - square[0]["peak_bytes"]
    assert square[-1]["matrix_bytes"] > 10 * square[0]["matrix_bytes"]
    assert grown < square[-1]["matrix_bytes"] / 2
    planned = {case["planned_bytes"] - case["engine_bytes"] for case in square}
    assert max(planned) - min(planned) < 0.1 * max(planned)
