"""cluster.yaml with another provider: its head really starts here, with its own command and the token, and scales."""

import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import yaml
from clouds import free_port
from ray.autoscaler._private.util import prepare_config

from pipeline import open_hessian

pytestmark = pytest.mark.full("starts nodes of Ray by its autoscaler")

ROOT = Path(__file__).parents[2]
JOB = [
    str(ROOT / "jobs" / "digits_mlp.yaml"),
    *("--set", "problem_args.hidden=8", "--set", "problem_args.steps=5", "--set", "chunk=64", "--set", "dtype=float64"),
]
ON_MACHINES = ("--set", "workers=2", "--set", "gpus_per_worker=1", "--set", "device=cpu")


def on_this_machine(folder, address, sold_out):
    """The file with the provider swapped, and only what must: what AWS would say of its machines, and waits."""
    config = prepare_config(
        yaml.safe_load((ROOT / "cluster.yaml").read_text())
    )  # with Ray's defaults, as `ray up` does
    config["provider"] = {
        "type": "external",
        "module": "machines.Machines",
        "disable_node_updaters": True,  # there is no SSH to such machines
        "use_node_id_as_ip": True,  # all have one address
        "gcs_address": address,
        "sold_out": sold_out,
        "events": str(folder / "events"),
    }
    for name in ("gpu_spot", "gpu_on_demand"):
        config["available_node_types"][name]["resources"] = {"CPU": 4, "GPU": 1}
    config["idle_timeout_minutes"] = 0.1
    config["file_mounts"] = {}
    return config


def head_command(config, port, scratch):
    """The file's own, in the foreground, on free ports."""
    *_, start = config["head_start_ray_commands"]
    swaps = {
        "~/venv/bin/ray": f"exec {shlex.quote(sys.executable)} -m ray.scripts.scripts",
        "--port=6379": f"--port={port} --dashboard-port={free_port()} --ray-client-server-port={free_port()}",
        "~/ray_bootstrap_config.yaml": str(scratch / "cluster.yaml"),
    }
    assert start.startswith("ulimit -n 65536; ")
    start = start.removeprefix("ulimit -n 65536; ")
    for old, new in swaps.items():
        assert old in start
        start = start.replace(old, new)
    variables, command = start.split("exec ", 1)
    return f"export {variables}; exec {command} --block --temp-dir={scratch}"


class Head:
    """A head that runs."""

    def __init__(self, address, environment, events):
        self.address, self.environment, self._events = address, environment, events

    def events(self):
        """How often what happened to machines."""
        lines = self._events.read_text().splitlines() if self._events.exists() else []
        return Counter(map(tuple, map(json.loads, lines)))

    def hessian(self, *arguments):
        """The command, with the token at hand."""
        command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment, timeout=240)

    def status_without_token(self):
        """What Ray tells somebody who found the port."""
        stranger = {**self.environment, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", self.address]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=stranger, timeout=60).stderr


@contextmanager
def head(folder, sold_out=()):
    """Start the cluster's head; end it, and all that it started, by process."""
    port, token = free_port(), folder / "token"
    address = f"{ray.util.get_node_ip_address()}:{port}"
    token.write_text(secrets.token_hex(32))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ADDRESS": address,
    }
    config = on_this_machine(folder, address, list(sold_out))
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        (Path(scratch) / "cluster.yaml").write_text(yaml.safe_dump(config))
        command = head_command(config, port, Path(scratch))
        starting = {**environment, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        starting["RAY_enable_autoscaler_v2"] = "1"  # as `ray up` sets it; that one knows no rating of machines
        del starting["RAY_ADDRESS"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(["bash", "-c", command], stdout=log, stderr=log, env=starting)
        try:
            wait_for(lambda: "Ray runtime started" in (folder / "log").read_text(), process)
            yield Head(address, environment, folder / "events")
        finally:
            processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in processes:
                one.kill()
            psutil.wait_procs(processes, timeout=30)


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the head ended"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The job's matrix, by a plain loop."""
    output = tmp_path_factory.mktemp("known") / "out"
    command = [sys.executable, "-m", "pipeline", "run", *JOB, "--output", str(output), "--set", "executor=serial"]
    subprocess.run(command, check=True, capture_output=True)
    return open_hessian(str(output)).to_numpy()


def test_from_no_machine_and_back_without_spot(tmp_path, known):
    """Spot machines are asked for first, and refused; on-demand ones come, do the work, and go."""
    with head(tmp_path, sold_out=["gpu_spot"]) as cluster:
        assert not cluster.events()
        assert "token" in cluster.status_without_token()
        done = cluster.hessian("run", *JOB, *ON_MACHINES, "--output", tmp_path / "out")
        assert done.returncode == 0, done.stderr
        seen = cluster.events()
        assert seen["refused", "gpu_spot"] >= 1
        assert seen["started", "gpu_on_demand"] == 2
        assert not seen["started", "gpu_spot"]
        wait_for(lambda: cluster.events()["ended", "gpu_on_demand"] == 2)
        H = open_hessian(str(tmp_path / "out"))
        np.testing.assert_allclose(H.to_numpy(), known, rtol=0, atol=1e-12 * np.abs(known).max())
