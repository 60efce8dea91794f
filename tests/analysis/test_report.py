"""The picture of a finished Hessian."""

import subprocess
import sys

import numpy as np
import pytest
import zoo

from pipeline import IncompleteError, SpecError, compute_hessian, open_hessian
from pipeline.analysis.report import entry_sizes, write_report

SETTINGS = {"executor": "serial", "dtype": "float64", "chunk": 16, "verify": False}


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
def test_sizes_are_those_of_the_blocks(tmp_path, symmetry):
    H = compute_hessian(zoo.mlp().problem, str(tmp_path), symmetry=symmetry, **SETTINGS)
    names = [p.name for p in H.parameters]
    known = [[np.sqrt(np.mean(H[a, b] ** 2)) for b in names] for a in names]
    np.testing.assert_allclose(entry_sizes(H), known, rtol=1e-12)


def test_blocks_that_were_not_computed(tmp_path):
    H = compute_hessian(zoo.mlp().problem, str(tmp_path), blocks="diagonal", **{**SETTINGS, "chunk": 1})
    sizes = entry_sizes(H)
    np.testing.assert_array_equal(np.isfinite(sizes), np.eye(len(sizes), dtype=bool))


def test_the_command_draws(tmp_path):
    compute_hessian(zoo.mlp().problem, str(tmp_path), **SETTINGS)
    found = subprocess.run([sys.executable, "-m", "pipeline", "report", str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    picture = tmp_path / "report" / "block_norms.png"
    assert found.stdout.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert open_hessian(str(tmp_path)).shape == (59, 59)


def test_unfinished(tmp_path):
    compute_hessian(zoo.mlp().problem, str(tmp_path), **SETTINGS)
    (tmp_path / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError, match="not finished"):
        write_report(str(tmp_path))


def test_without_matplotlib(tmp_path, monkeypatch):
    compute_hessian(zoo.mlp().problem, str(tmp_path), **SETTINGS)
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(SpecError, match="matplotlib is not installed"):
        write_report(str(tmp_path))
