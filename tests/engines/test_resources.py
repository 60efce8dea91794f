"""Work and memory: what the upper triangle saves, and that workers stay under the plan."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory
import work

from pipeline.planning.torch_environment import TRANSPARENT_PAGES

pytestmark = pytest.mark.full("measures work and memory of whole runs")

WORKER = """
from pathlib import Path
from pipeline.cluster.actors import set_up
from pipeline.spec import Settings
set_up(Settings())
import torch
some = torch.ones(2**24)
print(Path("/proc/self/smaps_rollup").read_text())
"""


def test_upper_triangle_costs_less_than_the_square():
    placed = work.equal_layers(layers=6, width=8, samples=16).place(torch.float64)
    upper, square = work.upper_triangle(placed), work.full_square(placed)
    np.testing.assert_allclose(np.triu(upper), np.triu(square), atol=1e-6)
    assert work.flops(work.upper_triangle, placed) <= 0.7 * work.flops(work.full_square, placed)


@pytest.mark.skipif(
    not TRANSPARENT_PAGES.exists() or "[madvise]" not in TRANSPARENT_PAGES.read_text(),
    reason="the system gives them to all, or to none",
)
def test_workers_take_large_pages_unless_the_environment_says_no():
    def large_kilobytes(**said):
        environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | said
        command = [sys.executable, "-c", WORKER]
        shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        return int(re.search(r"AnonHugePages: +(\d+) kB", shown)[1])

    most = large_kilobytes()
    assert most > 32 * 1024
    assert most - large_kilobytes(THP_MEM_ALLOC_ENABLE="0") > 32 * 1024


@pytest.fixture(scope="module")
def measured():
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield memory.measure_all()
    ray.shutdown()


@pytest.mark.long
def test_workers_stay_under_the_plan(measured):
    for case in measured:
        assert case["peak_bytes"] <= case["planned_bytes"], case


@pytest.mark.long
def test_memory_does_not_grow_with_the_matrix(measured):
    """With chunks as tiles, sixty-four times the matrix takes a few buffers more; with bands, the band more."""
    small, *_, large = [case for case in measured if case["tile"] == (1, 1) and case["formats"] == ("zarr",)]
    assert large["matrix_bytes"] >= 60 * small["matrix_bytes"]
    assert large["peak_bytes"] - small["peak_bytes"] < large["matrix_bytes"] / 2
    assert large["planned_bytes"] - small["planned_bytes"] < large["matrix_bytes"] / 4
