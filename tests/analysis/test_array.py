"""A Hessian beside the array that it is: indices, names, views, products, and what libraries do with it."""

import threading

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from finished import RAGGED, P, pair, stored, symmetric
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import BlockError, IncompleteError, MemoryRefusedError


def test_what_numpy_is_told(case):
    H, full = case
    assert (H.ndim, H.shape, len(H), H.size) == (2, full.shape, len(full), full.size)
    assert H.nbytes == H.to_numpy().nbytes
    assert H.T is H
    np.testing.assert_array_equal(np.asarray(H), full)
    assert np.asarray(H).dtype == H.dtype
    assert np.array(H, dtype=np.float32).dtype == np.float32
    with pytest.raises(ValueError, match="always a copy"):
        np.array(H, copy=False)


def test_what_does_not_fit_is_refused_with_numbers(beyond_memory):
    with pytest.raises(MemoryRefusedError, match=r"P = 51 needs 20\.8 kB, 20\.8 kB are free: read blocks"):
        np.asarray(stored(symmetric(np.ones(P)), RAGGED))


def test_rows_and_columns(case):
    H, full = case
    n = len(full)
    np.testing.assert_array_equal(H[0], full[0])
    np.testing.assert_array_equal(H[-2:], full[-2:])
    np.testing.assert_array_equal(H[...], full)
    np.testing.assert_array_equal(H[5, ::-3], full[5, ::-3])
    np.testing.assert_array_equal(H[[7, 2, 2], [n - 1, 0]], full[np.ix_([7, 2, 2], [n - 1, 0])])
    np.testing.assert_array_equal(H[np.arange(n) % 5 == 1, 1:4], full[np.arange(n) % 5 == 1, 1:4])
    assert H[3, 4] == full[3, 4]
    assert np.isscalar(H[3, 4])
    np.testing.assert_array_equal(list(H), full)


def test_names_and_globs():
    H, full = pair()
    place = {p.name: p.place for p in H.parameters}
    np.testing.assert_array_equal(H["0.weight"].reshape(21, P), full[place["0.weight"]])
    assert H["0.weight"].shape == (3, 7, P)
    assert H["0.weight", "1.weight"].shape == (3, 7, 13, 2)
    np.testing.assert_array_equal(H["1.weight", "0.bias"].reshape(26, 3), full[place["1.weight"], place["0.bias"]])
    np.testing.assert_array_equal(H[2, "0.bias"], full[2, place["0.bias"]])
    weights = np.r_[place["0.weight"], place["1.weight"]]
    np.testing.assert_array_equal(H["*.weight", ...], full[weights])
    np.testing.assert_array_equal(H["*.weight", "0.bias"], full[weights][:, place["0.bias"]])
    assert H["1.bias", "1.bias"] == full[-1, -1]  # a scalar parameter has no axes
    assert H["empty", "0.bias"].shape == (0, 3)
    for key in ("0.wieght", "nothing.*", ("0.bias", "1.wight")):
        with pytest.raises(BlockError, match=r"did you mean|matches no parameter"):
            H[key]


def test_views():
    H, full = pair()
    view = H.select("*.weight").select("1.*")
    assert view.parameters.names == ("1.weight",)
    assert view.parameters["1.weight"].offset == 0
    place = H.parameters["1.weight"].place
    np.testing.assert_array_equal(view.to_numpy(), full[place, place])
    np.testing.assert_array_equal(view.gradient, H.gradient[place])
    assert H.select("!*.weight").parameters.names == ("0.bias", "empty", "1.bias")
    assert "2 of 5 parameters" in repr(H.select("*.weight"))
    blocks = list(H.block_diagonal())
    assert [b.parameters.names for b in blocks] == [(name,) for name in H.parameters.names]
    for p, block in zip(H.parameters, blocks, strict=True):
        np.testing.assert_array_equal(block.to_numpy(), full[p.place, p.place])
    with pytest.raises(BlockError, match="matches no parameter"):
        H.select("2.*")
    with pytest.raises(BlockError, match="leave no parameter"):
        H.select("1.*", "!1.*")


def test_products(case):
    H, full = case
    random = np.random.default_rng(0)
    v, V = random.standard_normal(len(full)), random.standard_normal((len(full), 3))
    for found, known in [
        (H @ v, full @ v),
        (H @ V, full @ V),
        (v @ H, full @ v),
        (V.T @ H, V.T @ full),
        (np.matmul(H, V), full @ V),
        (torch.from_numpy(v) @ H, full @ v),
        (H.quadratic_form(v), v @ full @ v),
        (H.quadratic_form(V), V.T @ full @ V),
        (H @ H, full @ full),
    ]:
        np.testing.assert_allclose(found, known, atol=1e-5 if H.dtype == np.float32 else 1e-12)
    assert np.isscalar(H.quadratic_form(v))
    for wrong in (np.ones(2), np.ones((2, 2, 2)), 3.0):
        with pytest.raises(BlockError, match="expected"):
            H @ wrong
        with pytest.raises(BlockError, match="expected"):
            wrong @ H


def test_last_bits_do_not_hang_on_threads(case, monkeypatch):
    """Chunks come in any order, and are added in one."""
    H, _ = case
    V = np.random.default_rng(1).standard_normal((len(H), 5))
    known, read = H @ V, H.store.read_chunk
    waiting = threading.Semaphore(0)

    def late(i, j, **options):
        if i == j == 0:  # the first comes after the second
            assert waiting.acquire(timeout=60)
        found = read(i, j, **options)
        if j == 1:
            waiting.release()
        return found

    if H.manifest.plan.side > 1:
        monkeypatch.setattr(H.store, "read_chunk", late)
    np.testing.assert_array_equal(H @ V, known)


def test_products_of_a_type_stay_in_it(case):
    H, full = case
    assert (H @ np.ones(len(full), np.float32)).dtype == H.dtype
    assert (H @ np.ones(len(full))).dtype == np.float64


def test_arithmetic_reads_all(case):
    H, full = case
    np.testing.assert_array_equal(H - full, np.zeros_like(full))
    np.testing.assert_array_equal(full - H, np.zeros_like(full))
    np.testing.assert_array_equal(2 * H, 2 * H.to_numpy())
    np.testing.assert_array_equal(np.abs(H), np.abs(full))
    assert (full == H).all()
    with pytest.raises(ValueError, match="not written into"):
        H += 1
    np.testing.assert_allclose(np.linalg.norm(H), np.linalg.norm(full), rtol=1e-6)
    np.testing.assert_array_equal(torch.as_tensor(np.asarray(H)).numpy(), full)


def test_scipy_takes_it_for_an_operator(case):
    H, full = case
    operator, V = H.as_linear_operator(), np.random.default_rng(1).standard_normal((len(full), 2))
    tolerance = {"atol": 1e-5 if H.dtype == np.float32 else 1e-12}
    np.testing.assert_allclose(operator.matmat(V), full @ V, **tolerance)
    np.testing.assert_allclose(operator.adjoint() @ V, full @ V, **tolerance)
    np.testing.assert_allclose(operator.T.matvec(V[:, 0]), full @ V[:, 0], **tolerance)
    top = scipy.sparse.linalg.eigsh(H, k=1, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(top, np.linalg.eigvalsh(full)[-1:], rtol=1e-5)


def test_a_vector_by_name():
    H, _ = pair()
    parts = H.unflatten(np.arange(P))
    assert {name: part.shape for name, part in parts.items()} == {p.name: p.shape for p in H.parameters}
    np.testing.assert_array_equal(np.concatenate([part.ravel() for part in parts.values()]), np.arange(P))
    assert H.unflatten(np.ones((P, 2)))["1.weight"].shape == (13, 2, 2)
    with pytest.raises(BlockError, match=r"expected \(51,\)"):
        H.unflatten(np.ones(3))


def test_what_was_not_computed():
    """Of a store of diagonal blocks: each of them, and nothing that needs more."""
    H = stored(symmetric(np.linspace(-1, 1, P)), RAGGED, chunk=3, blocks="diagonal")
    for block in H.block_diagonal():
        assert block.is_complete
        block @ np.ones(len(block))
    assert not H.is_complete
    for asked in (lambda: H @ np.ones(P), H.to_numpy, lambda: H["0.weight", "1.weight"]):
        with pytest.raises(IncompleteError, match="selected blocks='diagonal'"):
            asked()


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_view_of_a_view_is_the_submatrix(data):
    H, full = PAIR
    first = data.draw(st.lists(st.sampled_from(H.parameters.names), min_size=1, unique=True))
    second = data.draw(st.lists(st.sampled_from(first), min_size=1, unique=True))
    view = H.select(*first).select(*second)
    kept = np.concatenate([np.arange(P)[H.parameters[name].place] for name in view.parameters.names]).astype(int)
    np.testing.assert_array_equal(view.to_numpy(), full[np.ix_(kept, kept)])
    u, v = np.random.default_rng(len(kept)).standard_normal((2, len(kept)))
    np.testing.assert_allclose(view @ (u + 2 * v), view @ u + 2 * (view @ v), atol=1e-12)
    np.testing.assert_allclose(u @ (view @ v), v @ (view @ u), atol=1e-12)


PAIR = pair(chunk=7)
