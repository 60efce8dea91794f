"""Engines are known to plans, to specs and to workers by the same names; what plans know of them decides tiles."""

from typing import get_args

import pytest

from pipeline.engines.registry import ENGINES
from pipeline.planning.costs import work
from pipeline.planning.engine_traits import TRAITS, candidates
from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.tile_shapes import choose_tiling
from pipeline.spec import EngineName, Settings


def test_one_set_of_names():
    assert list(TRAITS) == list(ENGINES) == [name for name in get_args(EngineName) if name != "auto"]


def test_engines_that_may_be_taken():
    general = ["jacrev", "rows", "differences"]
    assert candidates("auto") == ["factored", *general]
    assert candidates("factored_tf32x3") == ["factored_tf32x3", *general]
    assert candidates("jacrev") == ["jacrev"]


@pytest.mark.parametrize("engine", TRAITS)
def test_work_of_rows_on_the_diagonal(engine):
    rows, cols = range(10, 14), range(30)
    below = 4 * 4 / 2  # of the square on the diagonal
    assert work(engine, rows, cols, range(0)) == (4 * 20 - below if TRAITS[engine].by_units else 4)
    assert work(engine, rows, range(10), range(0)) == 0  # nothing of it is right of the diagonal


def test_half_the_entries_with_itself_are_mirror_images():
    rows, own = range(10, 12), range(10, 20)
    everything, halved = (work("factored", rows, range(40), symmetric) for symmetric in (range(0), own))
    # Of ten columns with itself less the half square on the diagonal, half are computed.
    assert everything - halved == 2 * (10 - 1) / 2


@pytest.mark.parametrize("engine", TRAITS)
def test_tiles_are_squares_by_units_and_bands_by_rows(engine):
    layout = ParameterLayout.of({"weight": (64, 16)})
    settings = Settings(chunk=32)
    made = choose_tiling(layout, {"weight": engine}, settings, 4, 2**31, workers=1)
    assert made.tile_shape == ((32, 32) if TRAITS[engine].by_units else (1, 32))
