"""Hessians held against the first: equal to what NumPy says of the whole matrices."""

import json

import numpy as np
import pytest
import scipy.linalg
from finished import RAGGED, P, pair, stored, symmetric

from pipeline import IncompleteError, SpecError
from pipeline.analysis.comparison import SUBSPACE, compare


@pytest.fixture(
    params=[{}, {"chunk": 7, "symmetry": "mirrored", "dtype": "float32"}], ids=["alike", "stored otherwise"]
)
def two(request):
    first, second = pair(), symmetric(np.linspace(-3, 4, P), seed=1)
    dtype = request.param.get("dtype", "float64")
    other = stored(second.astype(dtype), RAGGED, **request.param)
    return first.H, other, first.full, other.to_numpy().astype(np.float64)


def test_distances(two):
    A, B, a, b = two
    same, other = compare([A, B]).differences
    assert (same.distance, same.cosine, same.overlap) == pytest.approx((0, 1, 1))
    assert other.distance == pytest.approx(np.linalg.norm(a - b))
    assert other.cosine == pytest.approx(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    assert (other.trace, other.norm) == pytest.approx((np.trace(b), np.linalg.norm(b)))
    places = [p.place for p in A.parameters]
    known = [[np.linalg.norm((a - b)[i, j]) for j in places] for i in places]
    np.testing.assert_allclose(other.blocks, known, rtol=1e-6)
    relative = [
        [np.linalg.norm((a - b)[i, j]) / np.linalg.norm(a[i, j]) if a[i, j].size else np.nan for j in places]
        for i in places
    ]
    np.testing.assert_allclose(other.relative, relative, rtol=1e-6)


def test_top_eigenspaces(two):
    A, B, a, b = two

    def top(full):
        w, U = np.linalg.eigh(full)
        return U[:, np.argsort(-np.abs(w))[:SUBSPACE]]

    other = compare([A, B]).differences[1]
    known = np.degrees(np.sort(scipy.linalg.subspace_angles(top(a), top(b))))
    np.testing.assert_allclose(other.angles, known, atol=1e-3)
    assert other.overlap == pytest.approx(np.linalg.norm(top(a).T @ top(b)) ** 2 / SUBSPACE, rel=1e-5)


def test_what_moved_is_the_block_that_was_changed():
    A, a = pair()
    place = A.parameters["1.weight"].place
    changed = a.copy()
    changed[place, place] *= 1.5
    found = compare([A, stored(changed, RAGGED)])
    assert found.moved()[0] == ("1.weight", [pytest.approx(0.5)])
    assert {name for name, row in found.moved() if row == [0.0]} == {"0.weight", "0.bias", "1.bias"}
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert said["hessians"][1]["moved"]["1.weight"] == pytest.approx(0.5)
    assert said["hessians"][1]["moved"]["empty"] is None


def test_refused():
    A, full = pair()
    with pytest.raises(SpecError, match="expected two or more"):
        compare([A])
    with pytest.raises(SpecError, match=r"other parameters .*`w`, \[51\]"):
        compare([A, stored(full, {"w": (P,)})])
    with pytest.raises(SpecError, match="`more`"):
        compare([A, stored(symmetric(range(P + 1)), RAGGED | {"more": (1,)})])
    with pytest.raises(IncompleteError, match="does not hold all of H"):
        compare([A, stored(full, RAGGED, chunk=1, blocks="diagonal")])
