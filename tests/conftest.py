import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: no word leaves the machine from a test
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # before gcsfs is: it would ask Google about a bucket
os.environ["NO_GCE_CHECK"] = "true"
# Workers must not starve beside the other process that runs tests.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # One of two processes, which would stand in each other's way; commands that a test starts are to train the same
    # weights to the last bit, as they do with the same number of threads.
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch
import zoo
from fault_table import FaultTable


def pytest_addoption(parser):
    parser.addoption("--fault-table", type=Path, metavar="FILE", help="write what the tests of faults found, as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep together what shares a fixture of its module; other tests go one by one to whichever process is free."""
    for item in items:
        if shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def shares_a_fixture(item):
    """Whether a test uses a fixture of these files that outlives it."""
    fixtures = (definitions[-1] for definitions in item._fixtureinfo.name2fixturedefs.values())
    return any(f.scope != "function" and f.baseid for f in fixtures)


def pytest_configure(config):
    path = config.getoption("--fault-table")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to this process
        config.pluginmanager.register(FaultTable(path))


@pytest.fixture(params=zoo.CASES, ids=lambda make: make.__name__)
def case(request):
    return request.param()


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
