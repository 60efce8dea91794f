import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: no word leaves the machine from a test
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # before gcsfs is: it would ask Google about a bucket
os.environ["NO_GCE_CHECK"] = "true"
os.environ["HESSIAN_CACHE"] = ""  # what was measured in one test is measured anew in the next
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
from hostile_table import HostileTable
from xdist.scheduler import LoadScopeScheduling


def pytest_addoption(parser):
    parser.addoption("--fault-table", type=Path, metavar="FILE", help="write what the tests of faults found, as JSON")
    parser.addoption("--hostile-table", type=Path, metavar="FILE", help="write what came of hostile data, as a page")


# Files of many tests that share nothing: each goes to whichever process is free. Of others all go to one, which sets up
# once what they share.
ONE_BY_ONE = {
    "test_engines.py",
    "test_hazards.py",
    "test_peers.py",
    "test_pretended_cuda.py",
    "test_problem.py",
    "test_verify.py",
}


# Where tests wait most of the time: for processes that start, and leave.
WAITING = (
    "tests/cluster/",
    "tests/faults/",
    "tests/planning/test_placement.py",
    "tests/runs/test_sweep.py",
    "tests/storage/test_clouds.py",
    "tests/whole/test_invariance.py",
)


class Scheduling(LoadScopeScheduling):
    """By files, but for those above. Every other process takes first what waits, beside one that computes."""

    def _split_scope(self, nodeid):
        path = nodeid.partition("::")[0]
        return nodeid if Path(path).name in ONE_BY_ONE else path

    def _assign_work_unit(self, node):
        waits = self.nodes.index(node) % 2 == 1
        chosen = next((scope for scope in self.workqueue if scope.startswith(WAITING) == waits), None)
        if chosen is not None:
            self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config, log):
    return Scheduling(config, log)


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # xdist's workers report to another process
        return
    for option, table in (("--fault-table", FaultTable), ("--hostile-table", HostileTable)):
        if (path := config.getoption(option)) is not None:
            config.pluginmanager.register(table(path))


@pytest.fixture(params=zoo.CASES, ids=lambda make: make.__name__)
def case(request):
    return request.param()


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
