"""The examples of what a Hessian is for: each shows what it says."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"


def run(name):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    return runpy.run_path(str(path))


def test_standard_errors_are_statsmodels():
    pytest.importorskip("statsmodels")
    found = run("standard_errors")
    np.testing.assert_allclose(found["errors"], found["theirs"], rtol=1e-7)


def test_influence_is_what_retraining_shows():
    """To first order: one sample of sixty."""
    found = run("influence")
    assert np.corrcoef(found["predicted"].ravel(), found["retrained"].ravel())[0, 1] > 0.99
    assert np.abs(found["predicted"]).max() == pytest.approx(np.abs(found["retrained"]).max(), rel=0.2)


def test_newton_goes_down_faster_than_the_gradient():
    steps = run("newton")["steps"]
    assert all(newton < descent < loss for loss, newton, descent in steps)


def test_the_surgeon_costs_less_than_pruning_by_magnitude():
    losses = run("pruning")["losses"]
    assert all(surgeon < magnitude for surgeon, magnitude in losses)
    assert losses[-1][0] < 0.2 * losses[-1][1]
