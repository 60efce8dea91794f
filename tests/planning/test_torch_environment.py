"""What a command sets before torch is imported."""

import os
import subprocess
import sys

import pytest

WAITING = """
from pipeline.planning.torch_environment import prepare_environment
prepare_environment()
import time, torch
torch.set_num_threads(2)
some = torch.ones(2**20)
for _ in range(100):
    some.add_(1)
    time.sleep(0.01)
print(time.process_time())
"""


def cpu_seconds(**said):
    """Of a process that mostly waits, its second thread too."""
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in names} | said
    return float(
        subprocess.run([sys.executable, "-c", WAITING], env=environment, check=True, capture_output=True).stdout
    )


@pytest.mark.full("imports torch in processes of their own")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a second thread spins on a core of its own")
def test_a_thread_that_waits_leaves_its_core_to_others_unless_the_environment_says_no():
    spinning = cpu_seconds(OMP_WAIT_POLICY="active")
    assert cpu_seconds() < spinning - 0.1
