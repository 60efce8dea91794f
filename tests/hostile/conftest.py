import shutil
from collections import Counter

import numpy as np
import pytest
from attempts import Attempts
from hostile_table import PROPERTY, kind_of
from tiny import tiny

from pipeline import compute_hessian


@pytest.fixture(scope="session")
def attempts(request):
    made = Attempts.begin()
    yield made
    made.end()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nhostile data: {made.told()}")


@pytest.fixture(autouse=True)
def _tabled(request, record_property):
    """Tell the table what a test tried."""
    if "attempts" not in request.fixturenames:
        yield
        return
    made = request.getfixturevalue("attempts")
    made.of_test.clear()
    yield
    if made.of_test:
        counts = dict(Counter(came.kind for came in made.of_test))
        worst = {"seconds": max(c.seconds for c in made.of_test), "bytes": max(c.bytes for c in made.of_test)}
        record_property(PROPERTY, {"kind": kind_of(request), "counts": counts, **worst})


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A finished output in both formats, nine chunks in six tiles."""
    folder = tmp_path_factory.mktemp("store") / "out"
    compute_hessian(tiny(), str(folder), executor="serial", chunk=4, tile=(1, 1), formats=("zarr", "parquet"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def answer(store, attempts):
    """What a store in order answers."""
    came = attempts.make("look", url=str(store))
    assert came.kind == "answer", came
    assert np.array(came.said[0]).shape == (9, 9)
    return came.said
