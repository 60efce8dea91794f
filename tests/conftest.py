import os

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported: no word leaves the machine from a test
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # before gcsfs is: it would ask Google about a bucket
os.environ["NO_GCE_CHECK"] = "true"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"

import pytest
import torch
import zoo


@pytest.fixture(params=zoo.CASES, ids=lambda make: make.__name__)
def case(request):
    return request.param()


if "PYTEST_XDIST_WORKER" in os.environ:  # one of two processes, which would stand in each other's way
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)
