"""The same matrix for dask and xarray, from either symmetry, whole or a view."""

import sys

import dask.array
import numpy as np
import pytest
from finished import RAGGED, P, pair, stored, symmetric

from pipeline import IncompleteError, SpecError


def test_dask(case):
    H, full = case
    lazy = H.to_dask()
    assert lazy.dtype == H.dtype
    assert lazy.chunks[0] == lazy.chunks[1]
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), full)
    np.testing.assert_allclose((lazy @ lazy).trace().compute(), (full @ full).trace(), rtol=1e-5)


def test_dask_factorises():
    """Its chunks are to be of one size: 3 x 17."""
    H, full = pair(np.linspace(0.5, 5, P))
    factor = dask.array.linalg.cholesky(H.to_dask().rechunk(17), lower=True)
    assert 2 * dask.array.log(dask.array.diag(factor)).sum().compute() == pytest.approx(H.logdet())
    np.testing.assert_allclose(factor.compute(), np.linalg.cholesky(full), atol=1e-12)


def test_arrays_of_different_views_have_different_names():
    H, _ = pair()
    both = [H.select("0.weight").to_dask(), H.select("1.weight").to_dask()]
    first, second = dask.compute(*both)
    assert first.shape != second.shape


def test_xarray(case):
    H, full = case
    found = H.to_xarray()
    assert found.dims == ("row", "col")
    assert found.attrs["loss"] == H.loss
    np.testing.assert_array_equal(found.values, full)
    a = H.parameters["1.weight"] if "1.weight" in H.parameters.names else H.parameters["0.weight"]
    rows = found.set_xindex("row_parameter").sel(row_parameter=a.name)
    np.testing.assert_array_equal(rows.values, full[a.place])


def test_diagonal_blocks():
    H = stored(symmetric(np.ones(P)), RAGGED, chunk=3, blocks="diagonal")
    with pytest.raises(IncompleteError, match="selected blocks='diagonal'"):
        H.to_dask().compute()
    assert H.select("0.weight").to_dask().compute().shape == (21, 21)


@pytest.mark.parametrize("library", ["dask", "xarray"])
def test_what_is_not_installed(library, monkeypatch):
    H, _ = pair()
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(SpecError, match=rf"{library} is not installed: python3 -m pip install .*{library}"):
        getattr(H, f"to_{library}")()


def test_laplace_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(SpecError, match=r"laplace-torch is not installed: python3 -m pip install laplace-torch"):
        pair()[0].to_laplace(None, "classification", None)
