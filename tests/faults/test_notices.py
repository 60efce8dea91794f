"""Notices that a cloud takes a machine away: from a metadata service over HTTP to a Ray node that is really drained."""

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import psutil
import pytest
import ray
import trouble
from test_workers import SETTINGS, At, Nodes, receipts

from pipeline.cluster.preemption import CLOUDS, MetadataService
from pipeline.runs.api import run
from pipeline.spec import Settings

pytestmark = pytest.mark.full("starts nodes of Ray, and takes them away")

TOKEN = "AQAEALongToken"


class Machine:
    """What the metadata services of three clouds say to a machine, and what they ask of its requests."""

    def __init__(self):
        self.pages = {
            "PUT /latest/api/token": TOKEN,
            "GET /computeMetadata/v1/instance/preempted": "FALSE",
            "GET /metadata/instance/compute/name?api-version=2021-02-01&format=text": "vm_3",
            "GET /metadata/scheduledevents?api-version=2020-07-01": json.dumps({"Events": []}),
        }
        self.needed = {
            "PUT /latest/": ("X-aws-ec2-metadata-token-ttl-seconds", None),
            "GET /latest/": ("X-aws-ec2-metadata-token", TOKEN),
            "GET /computeMetadata/": ("Metadata-Flavor", "Google"),
            "GET /metadata/": ("Metadata", "true"),
        }

    def give_notice(self, other=False):
        """Announce this machine's end, or another's where a cloud tells everybody."""
        self.end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=120)
        taken = {"EventType": "Preempt", "Resources": ["vm_4" if other else "vm_3"]}
        taken["NotBefore"] = format_datetime(self.end, usegmt=True)
        events = {"Events": [taken, {"EventType": "Reboot", "Resources": ["vm_3"]}]}
        self.pages["GET /metadata/scheduledevents?api-version=2020-07-01"] = json.dumps(events)
        if not other:
            notice = {"action": "terminate", "time": self.end.strftime("%Y-%m-%dT%H:%M:%SZ")}
            self.pages["GET /latest/meta-data/spot/instance-action"] = json.dumps(notice)
            self.pages["GET /computeMetadata/v1/instance/preempted"] = "TRUE"

    def answer(self, request, headers):
        """Status and text."""
        header, value = next(need for start, need in self.needed.items() if request.startswith(start))
        if headers.get(header) is None or (value is not None and headers[header] != value):
            return 401, "unauthorized"
        page = self.pages.get(request)
        return (404, "not found") if page is None else (200, page)


@contextmanager
def served(machine):
    """The service's URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, text = machine.answer(f"{self.command} {self.path}", self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET  # noqa: N815 - the server's name for it

        def log_message(self, *_):
            """Not to the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def watching(*arguments):
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "pipeline", "drain-on-notice", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120), ("azure", 120), ("gcp", 30)])
def test_what_each_cloud_says(cloud, seconds):
    machine, (notice, _) = Machine(), CLOUDS[cloud]
    with served(machine) as url:
        assert notice(MetadataService(url)) is None
        machine.give_notice(other=True)
        assert notice(MetadataService(url)) is None
        now = time.time()
        machine.give_notice()
        end = notice(MetadataService(url))
    if cloud == "gcp":
        assert now + seconds <= end <= time.time() + seconds
    else:
        assert end == machine.end.timestamp()


def test_a_machine_of_no_cloud():
    """Said at once, and not watched for ever."""
    with watching("--cloud", "aws", "--metadata-url", "http://127.0.0.1:9") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no metadata service at http://127.0.0.1:9" in errors


def test_a_cluster_that_does_not_answer():
    """It is tried until the end, and said then."""
    machine = Machine()
    notice = {"action": "terminate", "time": (datetime.now(UTC) + timedelta(seconds=3)).isoformat()}
    machine.pages["GET /latest/meta-data/spot/instance-action"] = json.dumps(notice)
    node = ("--address", "127.0.0.1:9", "--node-id", "a" * 56)
    with served(machine) as url, watching("--cloud", "aws", "--metadata-url", url, *node) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Ray did not drain the node before its end: no answer from 127.0.0.1:9" in " ".join(errors.split())


def test_a_run_survives_a_spot_notice(tmp_path, monkeypatch):
    """The node gets no more tiles from the driver's next look on, and nothing that was begun there is lost."""
    monkeypatch.setattr("pipeline.execution.driver.LOOK_SECONDS", 0.0)  # it looks at once: twenty fit into two seconds
    nodes, machine = Nodes(), Machine()
    address, drained = nodes.cluster.address, {}
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    try:
        nodes.at_least(2)
        taken = nodes.workers[0].node_id
        (raylet,) = (found.process.pid for found in nodes.workers[0].all_processes["raylet"])
        problem, _ = trouble.problem(tmp_path / "orders", pause=0.05)
        known = run(problem, Settings(**SETTINGS, executor="serial", verify=False), str(tmp_path / "known"))
        arguments = ("--cloud", "aws", "--address", address, "--node-id", taken, "--interval", 0.1)
        with served(machine) as url, watching(*arguments, "--metadata-url", url) as watcher:

            def take():
                assert watcher.poll() is None
                assert not ray._private.state.state.get_draining_nodes()
                machine.give_notice()
                drained["said"], drained["errors"] = watcher.communicate(timeout=60)
                drained.update(ray._private.state.state.get_draining_nodes())
                drained["there"] = {process.pid for process in psutil.Process(raylet).children(recursive=True)}
                drained["at"] = time.time()

            settings = Settings(**SETTINGS, workers=2, verify=False)
            outcome = run(problem, settings, str(tmp_path / "out"), report=At(6, take))
        assert watcher.returncode == 0, drained["errors"]
        assert "the node is drained" in drained["said"]
        assert drained[taken] / 1000 == pytest.approx(machine.end.timestamp(), abs=3)  # milliseconds
        assert not outcome.lost
        later = [receipt.pid for receipt in receipts(outcome.hessian) if receipt.finished > drained["at"]]
        # Those begun there were finished: the one computed, the one waiting and the one being written.
        assert sum(pid in drained["there"] for pid in later) <= 3 < len(later)
        np.testing.assert_array_equal(outcome.hessian.to_numpy(), known.hessian.to_numpy())
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()
