"""A Hessian drawn in a notebook."""

import matplotlib as mpl
import numpy as np
import pytest
from finished import P, pair
from matplotlib.figure import Figure

from pipeline.analysis.view import MatrixView

mpl.use("agg")


def axes():
    return Figure().add_subplot()


def test_blocks(case):
    ax = axes()
    assert case.H.plot_blocks(ax) is ax
    (image,) = ax.images
    places = [p.place for p in case.H.parameters]
    known = [
        [np.sqrt(np.mean(case.full[a, b] ** 2)) if case.full[a, b].size else np.nan for b in places] for a in places
    ]
    drawn = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_allclose(drawn, known, rtol=1e-5)


def test_spectrum():
    H, full = pair()
    positive, negative, _ = H.plot_spectrum(axes()).lines
    w = np.linalg.eigvalsh(full)
    np.testing.assert_allclose(positive.get_ydata(), w[w > 0][::-1], rtol=1e-9)
    np.testing.assert_allclose(negative.get_ydata(), -w[w < 0], rtol=1e-9)


def test_density():
    bars = pair().H.plot_spectrum(axes(), density=True).patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(P, abs=1)


def test_entries(case):
    (image,) = case.H.imshow(axes()).images
    np.testing.assert_allclose(image.get_array(), np.maximum(np.abs(case.full), image.norm.vmin), rtol=1e-6)


def test_own_axes():
    from matplotlib import pyplot

    ax = pair().H.plot_blocks()
    assert ax.figure.number in pyplot.get_fignums()
    pyplot.close(ax.figure)


def test_a_cell_shows_a_small_map_where_it_is_cheap(monkeypatch):
    H = pair().H
    assert "data:image/png" in H._repr_html_()
    monkeypatch.setattr("pipeline.analysis.plots.CHEAP_BYTES", H.manifest.matrix_bytes - 1)
    monkeypatch.setattr(MatrixView, "pieces", None)  # nothing is read
    shown = H._repr_html_()
    assert "data:" not in shown
    assert "0.weight" in shown
