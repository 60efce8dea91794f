"""Notices of a cloud that it takes a machine away, and what is done about them: the node is drained.

Ray watches no cloud's notices. Told of one, it places nothing more on the node, the driver gives its workers no more
tiles (`pipeline.execution.driver`), and what they leave unfinished is not held against any tile.
"""

import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pipeline.errors import SpecError, WorkerError

ANSWER_SECONDS = 2.0  # of a metadata service, which is on the machine's own host
TOKEN_SECONDS = 21_600  # the longest AWS gives
GOOGLE_SECONDS = 30.0  # from notice to end
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MetadataService:
    """What a machine may ask about itself.

    Args:
        url: of the service.
    """

    url: str

    def ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str | None:
        """Ask for something.

        Args:
            path: what.
            headers: of the request.
            method: of the request.

        Returns:
            The answer; None where there is no such thing (404).

        Raises:
            OSError: there is no service, or it refuses.
        """
        request = urllib.request.Request(f"{self.url}{path}", headers=headers, method=method)  # noqa: S310 - plain HTTP
        # Whatever proxy the environment names is on the other side of the network.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise


def aws_notice(service: MetadataService) -> float | None:
    """Return the time at which AWS takes a spot machine, in seconds since 1970; None for none (two minutes' notice)."""
    token = service.ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}, "PUT")
    notice = service.ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    return None if notice is None else datetime.fromisoformat(json.loads(notice)["time"]).timestamp()


def google_notice(service: MetadataService) -> float | None:
    """The same for Google, which says that a machine is being taken, not when: it is thirty seconds."""
    notice = service.ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return time.time() + GOOGLE_SECONDS if (notice or "").strip() == "TRUE" else None


def azure_notice(service: MetadataService) -> float | None:
    """The same for Azure, which tells every machine of a group what is going to happen to each (30 s at least)."""
    headers = {"Metadata": "true"}
    name = service.ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text", headers)
    events = json.loads(service.ask("/metadata/scheduledevents?api-version=2020-07-01", headers) or "{}")
    times = [
        parsedate_to_datetime(event["NotBefore"]).timestamp() if event.get("NotBefore") else time.time()
        for event in events.get("Events", ())
        if event["EventType"] in {"Preempt", "Terminate"} and name in event.get("Resources", ())
    ]
    return min(times, default=None)


Notice = Callable[[MetadataService], float | None]
CLOUDS: dict[str, tuple[Notice, str]] = {
    "aws": (aws_notice, "http://169.254.169.254"),
    "azure": (azure_notice, "http://169.254.169.254"),
    "gcp": (google_notice, "http://metadata.google.internal"),
}


def drain_on_notice(
    cloud: str, url: str | None, address: str | None, node: str | None, interval_seconds: float
) -> float:
    """Wait until the cloud announces that it takes this machine away, then drain its node.

    Args:
        cloud: a key of `CLOUDS`.
        url: of the metadata service; the cloud's own when None.
        address: of the Ray cluster; the one that is running here when None.
        node: id of the node; this machine's when None.
        interval_seconds: between questions.

    Returns:
        The seconds that are left when the node is drained.

    Raises:
        SpecError: there is no such metadata service.
        WorkerError: Ray does not drain the node before its end.
    """
    notice, own_url = CLOUDS[cloud]
    service = MetadataService(url or own_url)
    end = _first(notice, service)
    while end is None:
        time.sleep(interval_seconds)
        try:
            end = notice(service)
        except (OSError, ValueError) as error:  # it did answer before
            logger.warning("metadata service %s: %s", service.url, error)
    logger.warning("notice: this machine is taken at %s", datetime.fromtimestamp(end, UTC).isoformat())
    while refusal := _drain(address, node, end - time.time()):
        if time.time() >= end:
            raise WorkerError(f"Ray did not drain the node before its end: {refusal}")
        time.sleep(1)
    return end - time.time()


def _first(notice: Notice, service: MetadataService) -> float | None:
    """Ask once, to find out whether there is anything to ask."""
    try:
        return notice(service)
    except (OSError, ValueError) as error:
        raise SpecError(
            f"no metadata service at {service.url} ({error}): this command is for virtual machines of a cloud, name "
            "another one with --cloud, or its service with --metadata-url"
        ) from error


def _drain(address: str | None, node: str | None, seconds: float) -> str:
    """Have Ray drain a node; gives its refusal, empty when there is none."""
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "drain-node",
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes this machine away",
        "--deadline-remaining-seconds", str(max(1, int(seconds))),
    ]  # fmt: skip
    command += ["--node-id", node] if node else []
    environment = {**os.environ, "RAY_ADDRESS": address} if address else None  # where Ray looks up this machine's node
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "timeout": max(1.0, seconds)}
    try:
        done = subprocess.run(command, check=False, **options)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"no answer from {address or 'the cluster'}"
    return (done.stderr.strip() or f"exit status {done.returncode}") if done.returncode else ""
