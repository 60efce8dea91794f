"""The command `hessian spectrum`, as a table and as JSON."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from finished import RAGGED, P, stored, symmetric

from pipeline.analysis.spectrum_summary import decades
from pipeline.cli import cli

W = np.r_[-0.5, np.zeros(10), np.logspace(-2, 1, P - 11)]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("spectrum")
    stored(symmetric(W), RAGGED, url=path)
    return str(path)


def run(*arguments):
    found = CliRunner().invoke(cli, ["spectrum", *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_few(url):
    found = json.loads(run(url, "--k", "3", "--json"))
    np.testing.assert_allclose(found["eigenvalues"], W[-3:], rtol=1e-10)
    assert found["trace"] == pytest.approx(W.sum())
    assert (found["P"], found["parameters"]) == (P, list(RAGGED))
    assert len(json.loads(run(url, "--json"))["eigenvalues"]) == 20
    assert "10" in run(url, "--k", "1")


def test_whole(url):
    found = json.loads(run(url, "--whole", "--json"))
    np.testing.assert_allclose(found["eigenvalues"], np.sort(W), atol=1e-12)
    assert found["inertia"] == {"positive": P - 11, "zero": 10, "negative": 1}
    assert found["rank"] == P - 10
    counts = {(row["from"], row["to"]): row["count"] for row in found["bins"]}
    assert counts[-1.0, -0.1] == 1
    assert sum(counts.values()) == P
    table = run(url, "--whole")
    assert all(word in table for word in ("positive", "condition number", "rank"))


def test_an_exact_zero(tmp_path):
    """A dead parameter's row."""
    stored(np.diag([0.0, 1.0, 2.0]), url=tmp_path, chunk=2)
    found = json.loads(run(str(tmp_path), "--whole", "--json"), parse_constant=pytest.fail)
    assert found["condition_number"] is None
    assert found["rank"] == 2
    assert "infinite" in run(str(tmp_path), "--whole")


def test_density(url):
    found = json.loads(run(url, "--density", "--json"))
    assert sum(row["count"] for row in found["bins"]) == pytest.approx(P)
    for row in found["bins"]:
        known = ((row["from"] <= W) & (row["to"] > W)).sum()
        assert abs(row["count"] - known) < 4 * row["error"] + 1e-9
    top = [row for row in found["bins"] if row["from"] >= 1]
    assert abs(sum(row["count"] for row in top) - (W >= 1).sum()) < 4 * sum(row["error"] for row in top)
    assert "error" in run(url, "--density")


def test_of_some_parameters(url):
    found = json.loads(run(url, "--params", "*.bias", "--params", "!0.*", "--whole", "--json"))
    assert found["parameters"] == ["1.bias"]
    np.testing.assert_allclose(found["eigenvalues"], symmetric(W)[-1, -1], rtol=1e-10)


def test_one_way_at_a_time(url):
    found = CliRunner().invoke(cli, ["spectrum", url, "--density", "--whole"])
    assert found.exit_code == 2
    assert "exclude each other" in found.stderr


def test_progress_and_errors_go_to_standard_error(url):
    command = [sys.executable, "-m", "pipeline", "spectrum", url]
    found = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["P"] == P
    assert "chunks 10/10" in found.stderr
    found = subprocess.run([*command, "--params", "2.*"], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert (
        found.stderr == "error: `2.*` matches no parameter; expected one of 0.weight, 0.bias, empty, 1.weight, 1.bias\n"
    )


@pytest.mark.parametrize("w", [[1.0], [-1.0, 1e-12], [0.0], [123.0, -0.2], [9.99]])
def test_every_eigenvalue_has_a_bin(w):
    edges = decades(np.array(w))
    assert (np.diff(edges) > 0).all()
    assert np.histogram(w, edges)[0].sum() == len(w)
