"""Eigenvalues beside LAPACK's of the dense matrix, in memory and beyond it, and densities beside the truth."""

import numpy as np
import pytest
import scipy.sparse.linalg
from finished import RAGGED, P, pair, stored, symmetric
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import BlockError, ConvergenceError, IncompleteError, MemoryRefusedError
from pipeline.analysis.lanczos import extreme_eigenpairs

LARGE = 300  # rows: more than are handed to LAPACK at once
# A Hessian's: a bulk about zero, some far above it, few below.
LIKE_A_HESSIAN = np.r_[-0.3, -0.2, -0.1, np.linspace(-1e-3, 1e-2, LARGE - 13), np.logspace(-1, 1, 10)]


@pytest.fixture(scope="module")
def large():
    full = symmetric(LIKE_A_HESSIAN)
    return stored(full, {"a": (100,), "b": (LARGE - 100,)}, chunk=64), full


def few(w, k, which):
    """Choose among all eigenvalues as SciPy does."""
    w = np.sort(w)
    if which == "BE":
        return np.r_[w[: k // 2], w[len(w) - (k + 1) // 2 :]]
    keys = {"LM": -np.abs(w), "SM": np.abs(w), "LA": -w, "SA": w}
    return np.sort(w[np.argsort(keys[which])[:k]])


@pytest.fixture
def streamed(monkeypatch):
    """No matrix is held in memory."""
    monkeypatch.setattr("pipeline.analysis.products.available_bytes", lambda: 0)


def test_all_in_memory(case):
    H, full = case
    known = np.linalg.eigvalsh(full)
    np.testing.assert_allclose(H.eigvalsh(), known, atol=1e-12)
    w, U = H.eigh()
    np.testing.assert_allclose(w, known, atol=1e-12)
    np.testing.assert_allclose(full @ U, U * w, atol=1e-12)
    np.testing.assert_allclose(U.T @ U, np.eye(len(w)), atol=1e-12)
    assert H.condition_number() == pytest.approx(np.linalg.cond(full), rel=1e-6)
    assert H.rank() == len(full)
    assert H.inertia() == ((known > 0).sum(), 0, (known < 0).sum())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("w", "signs"),
    [
        (np.linspace(1, 2, P), (P, 0, 0)),
        (np.r_[np.zeros(20), np.linspace(1, 2, P - 20)], (P - 20, 20, 0)),
        (np.r_[-1, np.zeros(10), np.linspace(1, 2, P - 11)], (P - 11, 10, 1)),
    ],
)
def test_signs_and_ranks(w, signs, dtype):
    """Definite, singular, indefinite: rounding of what is stored is no rank."""
    H, full = pair(w, dtype=dtype)
    assert H.inertia() == signs
    assert H.rank() == P - signs[1] == np.linalg.matrix_rank(full.astype(dtype))
    assert (H.condition_number() > 1e6) == (signs[1] > 0)
    assert H.inertia(tol=3.0) == (0, P, 0)
    assert H.rank(tol=1.51) == (np.abs(w) > 1.51).sum()


def test_layers():
    H, full = pair()
    found = H.layer_spectra()
    assert set(found) == set(RAGGED)
    for p in H.parameters:
        np.testing.assert_allclose(found[p.name], np.linalg.eigvalsh(full[p.place, p.place]), atol=1e-12)


def test_of_diagonal_blocks():
    full = symmetric(np.linspace(-1, 1, P))
    H = stored(full, RAGGED, chunk=3, blocks="diagonal")
    for p in H.parameters:
        np.testing.assert_allclose(H.layer_spectra()[p.name], np.linalg.eigvalsh(full[p.place, p.place]), atol=1e-12)
    for asked in (H.eigvalsh, H.eigh, H.eigsh, H.spectral_density, H.inertia):
        with pytest.raises(IncompleteError, match="does not hold all of H"):
            asked()


def test_what_does_not_fit(beyond_memory):
    H = stored(symmetric(np.ones(P)), RAGGED)
    for asked in (H.eigvalsh, H.eigh, H.inertia, lambda: H.eigsh(which="SM")):
        with pytest.raises(MemoryRefusedError, match=r"P = 51 needs .* are free: take H.eigsh"):
            asked()


@pytest.mark.parametrize("which", ["LM", "SM", "LA", "SA", "BE"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_few_as_scipy_gives_them(case, which, k):
    H, full = case
    found, U = H.eigsh(k, which)
    np.testing.assert_allclose(found, few(np.linalg.eigvalsh(full), k, which), atol=1e-12)
    np.testing.assert_allclose(full @ U, U * found, atol=1e-9)


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_few_out_of_core(large, which, streamed):
    H, full = large
    found, U = H.eigsh(5, which)
    known = np.sort(scipy.sparse.linalg.eigsh(full, 5, which=which, return_eigenvectors=False))
    np.testing.assert_allclose(found, known, atol=1e-10)
    assert np.linalg.norm(full @ U - U * found, axis=0).max() < 1e-7
    np.testing.assert_allclose(U.T @ U, np.eye(5), atol=1e-10)
    finest = H.eigsh(5, which, tol=0)[1]
    assert np.linalg.norm(full @ finest - finest * found, axis=0).max() < 1e-11


def test_a_block_is_one_read(large, streamed, monkeypatch):
    """ARPACK reads a store once for each vector."""
    H, _ = large
    reads = []
    of_pieces = type(H).of_pieces
    monkeypatch.setattr(type(H), "of_pieces", lambda self, *a, **o: reads.append(1) or of_pieces(self, *a, **o))
    H.eigsh(10, "LA")
    ours = len(reads)
    reads.clear()
    scipy.sparse.linalg.eigsh(H, 10, which="LA", tol=1e-8)
    assert 3 * ours < len(reads)
    reads.clear()
    H.spectral_density(6, 9)
    assert len(reads) == 9


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4), st.sampled_from(["LM", "LA", "SA", "BE"]), st.booleans())
def test_multiple_eigenvalues_and_restarts(seed, k, which, twice):
    """Each eigenvalue may be there several times; the basis is renewed again and again."""
    random = np.random.default_rng(seed)
    w = random.standard_normal(40)
    w[:20] = w[20:] if twice else w[:20]
    full, width = symmetric(w, seed), k + 2
    found, U = extreme_eigenpairs(
        lambda V: full @ V, random.standard_normal((40, width)), k, which, most=4 * width, tol=1e-9, steps=500
    )
    np.testing.assert_allclose(found, few(w, k, which), atol=1e-8)
    np.testing.assert_allclose(full @ U, U * found, atol=1e-7)


def test_too_few_steps(large, streamed):
    with pytest.raises(ConvergenceError, match=r"after 2 reads of H .* raise `steps`"):
        large[0].eigsh(5, "SA", steps=2)


def test_the_whole_space_is_reached(streamed):
    """Of rank 3: after one step no new direction is left, and zeros are found too."""
    full = symmetric(np.r_[np.zeros(LARGE - 3), 1, 2, 3])
    found, _ = stored(full, chunk=64).eigsh(6, "LA")
    np.testing.assert_allclose(found, [0, 0, 0, 1, 2, 3], atol=1e-10)


def test_wrong_requests():
    H, _ = pair()
    for wrong in (
        lambda: H.eigsh(0),
        lambda: H.eigsh(P + 1),
        lambda: H.eigsh(which="XX"),
        lambda: H.spectral_density(0),
    ):
        with pytest.raises(BlockError, match="expected"):
            wrong()


def test_density_is_within_its_errors(large):
    H, _ = large
    found = H.spectral_density(probes=40, steps=60)
    w = LIKE_A_HESSIAN
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-12)
    for f, known in ((lambda x: x, w.sum()), (np.square, (w**2).sum()), (np.exp, np.exp(w).sum())):
        value, error = found.trace_of(f)
        assert abs(value - known) < 4 * error
        assert error < 0.5 * abs(known)
    for x in (-0.05, 0.05, 0.5):
        value, error = found.count_below(x)
        assert abs(value - (w < x).sum()) < 4 * error + 1e-9
    edges = [-1, -0.05, 0.05, 0.5, 20]
    counts, errors = found.histogram(edges)
    assert (np.abs(counts - np.histogram(w, edges)[0]) < 4 * errors).all()
    assert counts.sum() == pytest.approx(LARGE)


@pytest.mark.parametrize("steps", [3, 8, 20])
def test_errors_cover_what_few_steps_do_not_resolve(steps):
    """Eigenvalues over many decades: most lie closer to zero than the nodes tell apart."""
    w = np.r_[np.logspace(-8, 1, LARGE - 40), -np.logspace(-8, -1, 40)]
    found = stored(symmetric(w), chunk=64).spectral_density(probes=20, steps=steps)
    edges = np.r_[-(10.0 ** np.arange(0, -8, -1)), 10.0 ** np.arange(-7, 3)]
    counts, errors = found.histogram(edges)
    assert (np.abs(counts - np.histogram(w, edges)[0]) <= 3 * errors).all()
    assert errors.max() > 10
    for x in edges:
        value, error = found.count_below(x)
        assert abs(value - (w < x).sum()) <= 3 * error + 1e-9


def test_each_probe_is_exact_for_polynomials(case):
    """Gauss's quadrature of `steps` nodes is exact to degree 2 steps - 1, rounding and all."""
    H, full = case
    n, steps = len(full), 4
    found = H.spectral_density(probes=3, steps=steps, seed=5)
    z = (np.random.default_rng(5).integers(0, 2, (n, 3)) * 2.0 - 1) / np.sqrt(n)
    for power in range(2 * steps):
        known = np.einsum("ij,ij->j", z, np.linalg.matrix_power(full, power) @ z)
        np.testing.assert_allclose(
            (found.weights * found.nodes**power).sum(1), known, atol=1e-9 * np.linalg.norm(full, 2) ** power
        )


def test_more_steps_than_the_matrix_has():
    """Once a probe's own space is spanned, the rest has no weight: the density is that of the matrix."""
    H, _ = pair(np.r_[np.zeros(P - 2), 1.0, 4.0])
    found = H.spectral_density(probes=4, steps=30)
    inside = found.nodes[found.weights > 1e-12]
    assert np.abs(inside[:, None] - [0, 1, 4]).min(1).max() < 1e-8
    assert np.isnan(H.spectral_density(probes=1, steps=2).count_below(0)[1])  # of one probe no error is known
