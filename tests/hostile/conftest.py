import shutil

import numpy as np
import pytest
import torch
from attempts import Attempts
from torch import nn

from pipeline import Problem, compute_hessian


def tiny():
    """Ten parameters, so that nothing takes long but what should not."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64)
    return Problem(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double(), nn.MSELoss(), (x, x[:, :1]))


@pytest.fixture(scope="session")
def attempts(request):
    made = Attempts.begin()
    yield made
    made.end()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nhostile data: {made.told()}")


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
