"""Cholesky's factor on a disk beside NumPy's in memory, in one panel and in many, and what is left of it."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from finished import RAGGED, P, pair, stored, symmetric

from pipeline import BlockError, IncompleteError, IndefiniteError, MemoryRefusedError, OutputError, SpecError
from pipeline.analysis import cholesky
from pipeline.progress import Reporter

RIGHT = np.random.default_rng(3).standard_normal((P, 3))
DEFINITE = np.linspace(0.5, 5, P)


@pytest.mark.parametrize("free", [2**30, 2**16, 2**15])
def test_against_numpy(kind, free, monkeypatch, tmp_path):
    monkeypatch.setattr(cholesky, "available_bytes", lambda: free)
    monkeypatch.setattr(cholesky, "FEWEST", 3)
    H, full = pair(DEFINITE, **kind)
    b, matrix = RIGHT[: len(full)], full + 0.3 * np.eye(len(full))
    known = np.linalg.slogdet(matrix)[1]
    with H.cholesky(0.3, tmp_path) as factor:
        assert factor.logdet == pytest.approx(known, rel=1e-12)
        np.testing.assert_allclose(factor.solve(b), np.linalg.solve(matrix, b), atol=1e-12)
        np.testing.assert_allclose(factor.inverse_diagonal(), np.linalg.inv(matrix).diagonal(), rtol=1e-12)
    assert H.logdet(0.3, method="cholesky", scratch=tmp_path) == factor.logdet
    x = H.solve(b[:, 0], 0.3, method="cholesky", scratch=tmp_path)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b[:, 0]), atol=1e-12)
    assert list(tmp_path.iterdir()) == []


class Told(Reporter):
    """Counts what it is told."""

    def __init__(self):
        self.units, self.advances = [], 0

    @contextmanager
    def tiles(self, total, done, unit="tiles"):
        self.units.append((unit, total))
        yield self

    def advance(self, tile_bytes):
        self.advances += 1


def test_each_panel_is_told_of(monkeypatch, tmp_path):
    monkeypatch.setattr(cholesky, "available_bytes", lambda: 2**16)
    monkeypatch.setattr(cholesky, "FEWEST", 3)
    H, _ = pair(DEFINITE)
    H.report = told = Told()
    with H.cholesky(0.3, tmp_path) as factor:
        panels = told.advances
        factor.inverse_diagonal()
    assert told.units == [("panels factorised", panels), ("panels inverted", panels)]
    assert told.advances == 2 * panels > 2


def test_variances_where_memory_is_short(monkeypatch, tmp_path):
    H, full = pair(DEFINITE)
    variances = np.linalg.inv(full).diagonal()
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.analysis.solve.available_bytes", lambda: 8 * P * P - 1)
        patch.setattr(H, "_definite", None)  # in memory
        np.testing.assert_allclose(H.inverse_diagonal(scratch=tmp_path), variances, rtol=1e-12)
    np.testing.assert_allclose(H.inverse_diagonal(), variances, rtol=1e-12)
    with pytest.raises(BlockError, match="expected 'auto', 'direct' or 'cholesky'"):
        H.inverse_diagonal(method="lu")


def test_panels_are_as_wide_as_memory_allows(monkeypatch):
    for free, (side, width) in {2**40: (64, 960), 2**23: (64, 192), 2**19: (16, 16)}.items():
        monkeypatch.setattr(cholesky, "available_bytes", lambda free=free: free)
        monkeypatch.setattr(cholesky, "FEWEST", 16)
        monkeypatch.setattr(cholesky.os, "cpu_count", lambda: 2)
        assert cholesky._sizes(950, 64) == (side, width)
    monkeypatch.setattr(cholesky, "available_bytes", lambda: 2**12)
    with pytest.raises(MemoryRefusedError, match=r"a panel of 16 columns of P = 950 needs .* take solve"):
        cholesky._sizes(950, 64)


@pytest.mark.parametrize("w", [np.linspace(-2, 5, P), np.r_[np.zeros(5), np.linspace(1, 2, P - 5)]])
def test_what_is_not_definite(w, tmp_path):
    H, _ = pair(w)
    for asked in (H.cholesky, lambda: H.solve(RIGHT, method="cholesky"), lambda: H.logdet(method="cholesky")):
        with pytest.raises(IndefiniteError, match=r"damping=.* would do") as told:
            asked()
    assert np.isfinite(H.logdet(told.value.damping, method="cholesky", scratch=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_of_diagonal_blocks(tmp_path):
    H = stored(symmetric(DEFINITE), RAGGED, chunk=3, blocks="diagonal")
    with pytest.raises(IncompleteError, match="selected blocks='diagonal'"):
        H.cholesky(scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_room(monkeypatch, tmp_path):
    monkeypatch.setattr(cholesky.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match=r"factor needs .* 1.00 kB are free: give `scratch`"):
        pair(DEFINITE)[0].cholesky(scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_dask(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.array", None)
    with pytest.raises(SpecError, match=r"dask is not installed: .*pip install"):
        pair(DEFINITE)[0].cholesky()
