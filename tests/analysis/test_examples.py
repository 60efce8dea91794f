"""The examples of what a Hessian is for: each shows what it says."""

import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"


@cache
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


def test_few_directions_matter():
    found = run("sloppiness")
    w, (stiff, middling) = found["w"], found["rises"]
    assert (np.abs(w) < 1e-6 * w[-1]).sum() > len(w) / 4
    assert (w > 1e-2 * w[-1]).sum() < len(w) / 4
    assert stiff == pytest.approx(w[-1] * 0.05**2 / 2, rel=0.5)
    assert middling < 1e-4 * stiff


@pytest.mark.full("trains a net, and takes its top eigenvalues")
def test_sharpness_rises_to_two_over_the_rate():
    found = run("sharpness")
    sharpness, edge = found["sharpness"], 2 / found["RATE"]
    assert sharpness[0] < 0.8 * edge
    assert all(0.9 * edge < s < 1.1 * edge for s in sharpness[-2:])
    assert found["losses"][-1] < 0.1 * found["losses"][0]


@pytest.mark.full("trains nets to the last digit")
def test_evidence_chooses_a_width():
    found = run("evidence")
    assert min(found["variances"]) < found["best"] < max(found["variances"])
    inside, between, outside = (found["variances"][found["best"]][k] for k in (8, 16, 0))
    assert inside < between / 9
    assert inside < outside / 9


@pytest.mark.full("trains nets to the last digit")
def test_evidence_is_laplace_torchs():
    pytest.importorskip("laplace")
    found = run("evidence")
    noise, width = found["NOISE"], max(found["evidences"])
    posterior = found["H"].to_laplace(
        found["model"],
        "regression",
        found["x"],
        prior_precision=found["PRIOR"],
        sigma_noise=noise,
    )
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(found["evidences"][width], rel=1e-9)
    _, variances = posterior(found["grid"])
    np.testing.assert_allclose(variances[:, 0, 0], found["variances"][width], rtol=1e-6)
