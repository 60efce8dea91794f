"""Finished outputs: each kind of run is computed once for a file of tests."""

import functools
import itertools
import shutil
from pathlib import Path

import pytest
from outputs import BOTH, compute


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Compute each kind of run once."""

    @functools.cache
    def make(symmetry="mirrored", dtype="float32", formats=BOTH):
        path = tmp_path_factory.mktemp("run") / "out"
        return compute(path, symmetry=symmetry, store_dtype=dtype, formats=formats)

    return make


@pytest.fixture(params=itertools.product(["mirrored", "upper"], ["float32", "float64"]), name="H", ids="-".join)
def hessian(made, request):
    return made(*request.param)


@pytest.fixture(params=["float32", "float64"])
def whole(made, request):
    return made("mirrored", request.param)


@pytest.fixture
def out(made, tmp_path):
    """Give a copy, to be damaged."""
    return Path(shutil.copytree(made().url, tmp_path / "out"))


@pytest.fixture
def zarr_only(made, tmp_path):
    return Path(shutil.copytree(made(formats=("zarr",)).url, tmp_path / "zarr"))
