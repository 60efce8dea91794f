"""Where to compute when nobody said."""

from contextlib import ExitStack

import pytest

from pipeline.execution.executors import Serial
from pipeline.runs.executor_choice import SERIAL_SECONDS, decided, executor_of
from pipeline.spec import Settings


@pytest.mark.parametrize(
    ("settings", "seconds", "in_memory", "executor"),
    [
        ({}, 0.0, False, "serial"),
        ({}, SERIAL_SECONDS, False, "serial"),
        ({}, SERIAL_SECONDS + 1, False, "ray"),
        ({}, 1e6, True, "serial"),  # no worker could write there
        ({"device": "cuda"}, 1e6, False, "serial"),
        ({"workers": 2}, 0.0, False, "ray"),
        ({"gpus_per_worker": 1.0}, 0.0, False, "ray"),
        ({"address": "ray://head:10001"}, 0.0, False, "ray"),
        ({"executor": "serial"}, 1e6, False, "serial"),
        ({"executor": "ray"}, 0.0, True, "ray"),
    ],
)
def test_decided(monkeypatch, settings, seconds, in_memory, executor):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = Settings(**settings)
    found = decided(given, seconds, in_memory=in_memory)
    assert found == given.model_copy(update={"executor": executor})


def test_a_cluster_in_the_environment_asks_for_workers(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert decided(Settings()).executor == "ray"


def test_this_process_joins_nothing():
    with ExitStack() as joined:
        assert isinstance(executor_of(Settings(executor="serial"), joined), Serial)
        assert joined.pop_all()._exit_callbacks == type(joined._exit_callbacks)()
