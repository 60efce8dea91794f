"""Entries down-sampled to a picture."""

import numpy as np
import pytest
from finished import RAGGED, P, store

from pipeline.analysis.raster import Raster
from pipeline.planning.parameters import ParameterLayout


def known(raster, full):
    """The same from the whole matrix."""
    pairs = list(zip(raster.edges, raster.edges[1:], strict=False))
    return [[np.sqrt(np.mean(np.square(full[a:b, c:d]))) for c, d in pairs] for a, b in pairs]


@pytest.mark.parametrize("most", [1024, 20, 9, 4])  # exact; by roots of sizes; more parameters than there is room for
def test_equals_what_the_matrix_gives(case, most):
    raster = Raster(case.H.parameters, most)
    case.H.scan(raster.add)
    assert len(raster.edges) - 1 <= most
    np.testing.assert_allclose(raster.values(), known(raster, case.full), rtol=1e-6)
    smaller = raster.merged(4)
    np.testing.assert_allclose(smaller.values(), known(smaller, case.full), rtol=1e-6)


def test_no_rectangle_lies_across_a_border_and_small_parameters_are_seen():
    layout = ParameterLayout.of({"weight": (100, 100), "bias": (9,), "none": (0,), "head": (40, 25)})
    raster = Raster(layout, 200)
    assert {p.offset for p in layout} <= set(raster.edges)
    rows = dict(zip(layout.names, np.diff(raster.starts), strict=True))
    assert rows["bias"] == 4  # true to scale it would have a sixth of one
    assert rows["none"] == 0
    assert 150 < sum(rows.values()) <= 200
    assert rows["weight"] == pytest.approx(rows["head"] * np.sqrt(10), rel=0.1)


def test_what_was_not_computed_stays_empty():
    full = np.random.default_rng(0).standard_normal((P, P))
    H = store(lambda rows, cols: (full + full.T)[rows, cols], RAGGED, chunk=1, blocks="diagonal")
    raster = Raster(H.parameters)
    H.scan(raster.add)
    own = np.zeros((P, P), bool)
    for p in H.parameters:
        own[p.place, p.place] = True
    np.testing.assert_array_equal(np.isfinite(raster.values()), own)
