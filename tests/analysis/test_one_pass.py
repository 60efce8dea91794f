"""Sums over the entries, beside NumPy's of the dense matrix; and how often the store is read for them."""

import numpy as np
import pytest
from finished import RAGGED, P, pair, stored, symmetric
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import BlockError, IncompleteError


def test_against_numpy(case):
    H, full = case
    np.testing.assert_array_equal(H.diagonal(), full.diagonal())
    assert H.trace() == pytest.approx(full.trace(), rel=1e-12)
    for kind in (None, "fro", 1, np.inf, -1, -np.inf):
        assert H.norm(kind) == pytest.approx(np.linalg.norm(full, kind or "fro"), rel=1e-12), kind
    np.testing.assert_allclose(H.row_norms(), np.linalg.norm(full, axis=1), rtol=1e-12)
    np.testing.assert_allclose(H.row_norms(1), np.abs(full).sum(0), rtol=1e-12)
    np.testing.assert_array_equal(H.diagonal(), full.diagonal())  # now from the sums
    for (a, b), norm in H.block_norms().items():
        p, q = H.parameters[a], H.parameters[b]
        assert norm == pytest.approx(np.linalg.norm(full[p.place, q.place]), rel=1e-12)
    assert len(H.block_norms()) == len(H.parameters) ** 2
    low, high = H.gershgorin_bounds()
    w = np.linalg.eigvalsh(full)
    assert low <= w[0] <= w[-1] <= high
    off = np.abs(full).sum(1) - np.abs(full.diagonal())
    assert (low, high) == pytest.approx(((full.diagonal() - off).min(), (full.diagonal() + off).max()), rel=1e-12)


@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_extreme_entries(case, k):
    H, full = case
    found = H.extreme_entries(k)
    upper = np.abs(full[np.triu_indices(len(full))])
    np.testing.assert_array_equal(np.abs(found.values), np.sort(upper[upper > 0])[::-1][:k])
    np.testing.assert_array_equal(found.values, full[found.rows, found.cols])
    assert (found.rows <= found.cols).all()


def test_several_cost_one_read(monkeypatch):
    H, _ = pair()
    read = []
    chunk = H.store.read_chunk
    monkeypatch.setattr(H.store, "read_chunk", lambda *key, **options: read.append(key) or chunk(*key, **options))
    H.trace()
    assert sorted(read) == [(i, i) for i in range(4)]
    read.clear()
    H.norm(), H.norm(1), H.block_norms(), H.row_norms(), H.gershgorin_bounds(), H.diagonal(), H.trace()
    assert len(read) == 4 * 5 // 2


def test_unknown_norms():
    H, _ = pair()
    for wrong in (lambda: H.norm(2), lambda: H.norm("nuc"), lambda: H.row_norms(3)):
        with pytest.raises(BlockError, match="expected"):
            wrong()


def test_of_diagonal_blocks():
    full = symmetric(np.linspace(-1, 1, P))
    H = stored(full, RAGGED, chunk=1, blocks="diagonal")
    np.testing.assert_array_equal(H.diagonal(), full.diagonal())
    assert {a for a, b in H.block_norms() if a == b} == set(RAGGED)
    assert ("0.weight", "1.weight") not in H.block_norms()
    for (a, b), norm in H.block_norms().items():
        p, q = H.parameters[a], H.parameters[b]
        assert norm == pytest.approx(np.linalg.norm(full[p.place, q.place]), rel=1e-12)
    H.trace()
    for asked in (H.norm, H.row_norms, H.gershgorin_bounds, H.extreme_entries):
        with pytest.raises(IncompleteError, match="selected blocks='diagonal'"):
            asked()
    assert H.select("1.weight").norm() == pytest.approx(H.block_norms()["1.weight", "1.weight"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(0, 99))
def test_blocks_sum_up_to_the_whole(chunk, sizes, seed):
    full = symmetric(np.random.default_rng(seed).standard_normal(sum(sizes)), seed)
    H = stored(full, {f"p{k}": (n,) for k, n in enumerate(sizes)}, chunk=chunk)
    assert sum(norm**2 for norm in H.block_norms().values()) == pytest.approx(H.norm() ** 2, rel=1e-12)
    assert (H.row_norms() ** 2).sum() == pytest.approx(np.linalg.norm(full) ** 2, rel=1e-12)
    assert H.trace() == pytest.approx(full.trace(), rel=1e-12, abs=1e-12)
