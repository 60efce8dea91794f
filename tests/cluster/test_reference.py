"""The proof's products in a worker's place: the same, and not lost with it."""

import os
import signal

import numpy as np
import psutil
import pytest
import ray
import torch
import zoo

from pipeline import compute_hessian
from pipeline.cluster import executor, reference
from pipeline.cluster.executor import Cluster
from pipeline.problem.contexts import exact_kernels
from pipeline.results.reference import Here
from pipeline.spec import Settings

pytestmark = pytest.mark.full("starts Ray")


@pytest.fixture
def better(monkeypatch):
    """Workers have what this machine lacks."""
    monkeypatch.setattr(executor, "_has_a_better_place", lambda settings: True)


def test_the_same_products_and_what_is_lost_is_computed_here(better):
    problem, told = zoo.mlp().problem, []
    vectors = np.random.default_rng(0).standard_normal((3, problem.layout.size))
    with Cluster(Settings(executor="ray", workers=1)) as cluster, exact_kernels(problem.model):
        cluster._nodes()
        there, here = cluster.reference(problem, 32, told.append), Here(problem, 32, "cpu")
        for order in ((vectors, 7.0), (vectors, 7.0, "float32"), (vectors, 7.0, "float64", 3)):
            np.testing.assert_allclose(there.multiply(*order), here.multiply(*order), rtol=1e-12)
        assert not told
        pid = ray.get(there._actor.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
        np.testing.assert_allclose(there.multiply(vectors, 7.0), here.multiply(vectors, 7.0), rtol=1e-12)
    assert len(told) == 1
    assert "going on here" in told[0]


def test_no_place_for_it(better, monkeypatch):
    """Workers with a GPU are asked for, and there is none any more."""
    monkeypatch.setattr(reference, "PLACE_SECONDS", 1.0)
    problem, told = zoo.mlp().problem, []
    vectors = np.ones((1, problem.layout.size))
    with Cluster(Settings(executor="ray", workers=1)) as cluster, exact_kernels(problem.model):
        cluster._nodes()
        cluster._settings = Settings(executor="ray", workers=1, resources={"gone": 1.0})
        there = cluster.reference(problem, 32, told.append)
        np.testing.assert_allclose(
            there.multiply(vectors, 7.0), Here(problem, 32, "cpu").multiply(vectors, 7.0), rtol=1e-12
        )
    assert len(told) == 1
    assert told[0].startswith("no worker multiplies for the proof (GetTimeoutError")


def test_a_run_is_proven_there(better, monkeypatch):
    """Nothing is multiplied in this process."""

    def multiply(*_):
        raise AssertionError("here")

    monkeypatch.setattr(Here, "multiply", multiply)
    H = compute_hessian(zoo.mlp().problem, dtype=torch.float64, executor="ray", workers=1)
    assert not ray.is_initialized()
    np.testing.assert_allclose(H.to_numpy(), zoo.mlp().truth(), atol=1e-12)
