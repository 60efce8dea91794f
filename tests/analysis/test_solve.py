"""Systems, log-determinants and inverses beside NumPy's of the dense matrix, directly and by MINRES."""

import numpy as np
import pytest
import scipy.sparse.linalg
from finished import RAGGED, P, pair, stored, symmetric
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import BlockError, ConvergenceError, IncompleteError, IndefiniteError, MemoryRefusedError
from pipeline.analysis.minres import minres

RIGHT = np.random.default_rng(3).standard_normal((P, 3))
DEFINITE = np.linspace(0.5, 5, P)


@pytest.mark.parametrize("method", ["direct", "minres"])
@pytest.mark.parametrize("w", [np.linspace(-2, 5, P), DEFINITE], ids=["indefinite", "definite"])
def test_solve(kind, w, method):
    H, full = pair(w, **kind)
    b = RIGHT[: len(full)]
    for damping in (0.0, 0.3):
        matrix = full + damping * np.eye(len(full))
        x = H.solve(b, damping, method=method)
        assert np.linalg.norm(matrix @ x - b) <= 1e-7 * np.linalg.norm(b)
        np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(H.solve(b[:, 0], damping, method=method), x[:, 0], rtol=1e-5, atol=1e-5)


def test_of_a_definite_matrix(kind):
    H, full = pair(DEFINITE, **kind)
    for damping in (0.0, 2.0):
        matrix = full + damping * np.eye(len(full))
        inverse = np.linalg.inv(matrix)
        assert H.logdet(damping) == pytest.approx(np.linalg.slogdet(matrix)[1], rel=1e-10)
        np.testing.assert_allclose(H.inverse_diagonal(damping), inverse.diagonal(), rtol=1e-9)
        for a in H.parameters:
            for b in H.parameters:
                found = H.inverse_block(a.name, b.name, damping)
                assert found.shape == a.shape + b.shape
                np.testing.assert_allclose(found.reshape(a.size, b.size), inverse[a.place, b.place], atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("w", [np.linspace(-2, 5, P), np.r_[np.zeros(5), np.linspace(1, 2, P - 5)]])
def test_what_is_not_definite_says_which_damping_would_do(w, dtype):
    H, full = pair(w, dtype=dtype)
    for asked in (H.logdet, H.inverse_diagonal):
        with pytest.raises(IndefiniteError, match=r"smallest eigenvalue of H found is .*; damping=.* would do") as told:
            asked()
        assert told.value.smallest == pytest.approx(np.linalg.eigvalsh(full)[0], abs=1e-6)
        assert 0 < told.value.damping < 2.1
        asked(told.value.damping)


@pytest.mark.parametrize("seed", range(6))
def test_rounding_does_not_make_definite(seed):
    """Of rank 30: Cholesky's last pivots are rounding, of either sign."""
    half = np.random.default_rng(seed).standard_normal((P, 30))
    H = stored(half @ half.T, RAGGED)
    for asked in (H.logdet, H.inverse_diagonal, lambda: H.solve(RIGHT)):
        with pytest.raises(IndefiniteError, match="would do"):
            asked()


def test_a_singular_system_is_refused():
    H, full = pair(np.r_[np.zeros(5), np.linspace(1, 2, P - 5)])
    with pytest.raises(IndefiniteError, match="would do") as told:
        H.solve(RIGHT, method="direct")
    x = H.solve(RIGHT, told.value.damping)
    assert np.isfinite(x).all()
    b = full @ RIGHT  # in its range there is a solution
    np.testing.assert_allclose(full @ H.solve(b, method="minres"), b, atol=1e-6)


def test_beyond_memory(beyond_memory):
    full = symmetric(np.linspace(-2, 5, P))
    H = stored(full, RAGGED)
    np.testing.assert_allclose(full @ H.solve(RIGHT), RIGHT, atol=1e-6)  # by MINRES, the store read step by step
    directly = lambda: H.solve(RIGHT, method="direct"), lambda: H.inverse_diagonal(method="direct")
    for asked in (H.logdet, *directly):
        with pytest.raises(MemoryRefusedError, match=r"P = 51 needs .* are free: take solve\(b, method='minres'\)"):
            asked()


def test_too_few_steps():
    H, _ = pair()
    with pytest.raises(ConvergenceError, match=r"after \d reads of H .*raise `damping`"):
        H.solve(RIGHT, method="minres", steps=3)


def test_blocks_precondition(monkeypatch):
    """Of a matrix that is nearly its chunks on the diagonal, with scales far apart, a few reads are enough."""
    same = np.arange(P) // 16
    scales = 10.0**same
    full = np.sqrt(np.outer(scales, scales)) * symmetric(DEFINITE)
    full = np.where(same[:, None] == same, full, full / 30)
    H = stored(full, RAGGED)
    b = RIGHT[:, 0]
    calls = []
    plain = scipy.sparse.linalg.LinearOperator((P, P), lambda v: calls.append(1) or full @ v)
    scipy.sparse.linalg.minres(plain, b, rtol=1e-8, maxiter=1000)
    monkeypatch.setattr("pipeline.analysis.products.available_bytes", lambda: 0)
    reads = []
    of_pieces = type(H).of_pieces
    monkeypatch.setattr(type(H), "of_pieces", lambda self, *a, **o: reads.append(1) or of_pieces(self, *a, **o))
    np.testing.assert_allclose(full @ H.solve(b, method="minres"), b, atol=1e-6)
    assert 0 < 3 * len(reads) < len(calls)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 3))
def test_minres_beside_scipys(seed, size, k):
    random = np.random.default_rng(seed)
    full, b = symmetric(random.standard_normal(size), seed), random.standard_normal((size, k))
    scale = np.exp(random.standard_normal(size))[:, None]
    found, steps = minres(lambda v: full @ v, lambda v: scale * v, b, tol=1e-10, steps=5)
    assert steps <= 5
    M = np.diag(scale[:, 0])
    for column in range(k):
        known, _ = scipy.sparse.linalg.minres(full, b[:, column], M=M, rtol=1e-30, maxiter=min(steps, size))
        if steps < size:  # then neither has stopped early
            np.testing.assert_allclose(found[:, column], known, rtol=1e-6, atol=1e-6 * np.abs(known).max())


def test_of_diagonal_blocks():
    full = symmetric(DEFINITE)
    H = stored(full, RAGGED, chunk=3, blocks="diagonal")
    for asked in (lambda: H.solve(RIGHT), lambda: H.solve(RIGHT, method="minres"), H.logdet, H.inverse_diagonal):
        with pytest.raises(IncompleteError, match="does not hold all of H"):
            asked()
    place = H.parameters["1.weight"].place
    assert H.select("1.weight").logdet() == pytest.approx(np.linalg.slogdet(full[place, place])[1])


def test_wrong_requests():
    H, _ = pair()
    for wrong in (lambda: H.solve(np.ones(3)), lambda: H.solve(RIGHT, method="lu"), lambda: H.inverse_block("x", "x")):
        with pytest.raises(BlockError, match=r"expected|no parameter"):
            wrong()
