"""Jobs on a Ray cluster, from a machine that needs neither torch nor a GPU: sent once, followed, ended.

The cluster's own job server runs them, over HTTP. A job is named by what is sent, so that sending it again finds it.
"""

import asyncio
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.cluster.job_package import JOB, Parcel, pack
from pipeline.errors import RESUMABLE, ClusterError, FollowError, SpecError, in_words, nearest

DASHBOARD = "http://127.0.0.1:8265"  # where Ray puts it, and where a tunnel to it ends
CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 30.0
QUIET_SECONDS = 30.0  # without a word, after which the connection is made anew: it may be dead
PATIENCE_SECONDS = 600.0  # with a dashboard that does not answer
GLANCE_SECONDS = 1.0
LAST_LOOKS = 3  # at the log of a job that has ended, where it breaks off
_FOLDER = "job"  # a job's files lie in it, so that none can stand before a module of the same name
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray follows these whatever it is told


@dataclass(frozen=True)
class Submitted:
    """A job on a cluster.

    Attributes:
        id: of it.
        output: where its Hessian goes.
        found: its state when it was found there; None where it was sent now.
    """

    id: str
    output: str
    found: JobStatus | None

    @property
    def done(self) -> bool:
        """Whether it was found done."""
        return self.found == JobStatus.SUCCEEDED

    @property
    def state(self) -> str:
        """Its state in words."""
        if self.found is None:
            return "submitted"
        return "done before (give another output to compute anew)" if self.done else f"{self.found.lower()} already"


class Cluster:
    """A Ray cluster, by its dashboard.

    Args:
        address: `http://host:port`; RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this machine's when None.
        say: is told what happens.

    Raises:
        SpecError: the address is none of a dashboard, or the environment has another.
        ClusterError: it does not answer.
    """

    def __init__(self, address: str | None, say: Callable[[str], None]) -> None:
        self.address, self._say = _address(address), say
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._asking():
            self._client = _Client(self.address)

    def submit(self, path: Path, overrides: Sequence[str] = (), output: str | None = None) -> Submitted:
        """Send a job, unless it is there and at work or done.

        Args:
            path: of the job spec.
            overrides: see `load_job`.
            output: replaces the spec's output.

        Returns:
            The job.

        Raises:
            SpecError: see `pack`.
            ClusterError: the cluster refuses.
        """
        parcel = pack(path, overrides, output, here=self._is_here)
        states, name = self._states(), f"hessian-{parcel.digest[:12]}"
        for attempt in count(1):
            job = name if attempt == 1 else f"{name}-{attempt}"
            if job not in states:
                return self._send(parcel, job)
            if states[job] not in {JobStatus.FAILED, JobStatus.STOPPED}:
                return Submitted(job, str(parcel.spec.output), states[job])
        raise AssertionError

    def follow(self, job: str, write: Callable[[str], None]) -> int:
        """Write what a job writes, until it ends.

        Args:
            job: its id.
            write: given pieces of its output.

        Returns:
            Exit status: that of the job's own process; 75 where that was ended, or cannot be known.

        Raises:
            FollowError: the cluster does not answer, or has forgotten the job.
        """
        details = asyncio.run(self._follow(job, write))
        if details.status == JobStatus.SUCCEEDED:
            return 0
        code = details.driver_exit_code
        said = " ".join((details.message or "").split("last available logs")[0].split())[:300]
        self._say(f"job {job} is {details.status.lower()}: {said}")
        return code if code is not None and code > 0 else RESUMABLE

    def cancel(self, job: str) -> str:
        """End a job.

        Args:
            job: its id.

        Returns:
            What became of it, in words.

        Raises:
            SpecError: there is no such job.
            FollowError: the cluster does not answer.
        """
        states = self._states()
        if job not in states:
            raise SpecError(f"cluster {self.address}: has no job {job}{nearest(job, list(states))}")
        if states[job].is_terminal():
            return f"job {job} has {states[job].lower()} before"
        with self._asking():
            self._client.stop_job(job)
        while not self._details(job).status.is_terminal():
            time.sleep(GLANCE_SECONDS)
        return f"job {job} is {self._details(job).status.lower()}; finished tiles are kept, submit it again to go on"

    def left(self, submitted: Submitted) -> FollowError:
        """Return the error that says a job is no longer followed, and what can be done."""
        return FollowError(
            f"no longer following job {submitted.id}; {self._again(submitted.id)}, `hessian status {submitted.output}` "
            "tells how far it is"
        )

    def _send(self, parcel: Parcel, job: str) -> Submitted:
        with tempfile.TemporaryDirectory(prefix="hessian-") as folder:
            parcel.unpack(Path(folder) / _FOLDER)
            try:
                self._client.submit_job(
                    entrypoint=f"python3 -m pipeline run {_FOLDER}/{JOB}",
                    submission_id=job,
                    runtime_env={"working_dir": folder},
                    metadata={"output": str(parcel.spec.output)},
                )
            except Exception as error:
                found = self._states().get(job)  # another may have sent it meanwhile
                if found is None:
                    raise ClusterError(f"cluster {self.address}: {_reason(error)}") from error
                return Submitted(job, str(parcel.spec.output), found)
        return Submitted(job, str(parcel.spec.output), None)

    async def _follow(self, job: str, write: Callable[[str], None]) -> Any:
        """Read a job's log to its end, over as many connections as that takes; gives the job's details."""
        log, broken = _Log(write), 0
        while True:
            whole = await self._read(job, log)
            details = self._details(job)
            if details.status.is_terminal():
                broken += 1
                if whole or broken > LAST_LOOKS:
                    return details
            await asyncio.sleep(GLANCE_SECONDS)

    async def _read(self, job: str, log: "_Log") -> bool:
        """Read a job's log over one connection; says whether that came to its end."""
        log.rewind()
        tail: Any = self._client.tail_job_logs(job)
        async with aclosing(tail) as pieces:
            while True:
                try:
                    text = await asyncio.wait_for(anext(pieces, None), QUIET_SECONDS)
                except Exception:  # of whatever kind: whether the cluster is there is asked next
                    return False
                if text is None:
                    return True
                log.take(text)

    def _details(self, job: str) -> Any:
        """Ask about a job, again and again while there is no answer."""
        end, told = time.monotonic() + PATIENCE_SECONDS, False
        while True:
            try:
                found = self._jobs()
                break
            except Exception as error:
                if time.monotonic() > end or isinstance(error, AuthenticationError):
                    raise FollowError(f"cluster {self.address}: {_reason(error)}; {self._again(job)}") from error
                if not told:
                    self._say(f"{self.address} does not answer, asking again for {PATIENCE_SECONDS / 60:.0f} minutes")
                told = True
            time.sleep(GLANCE_SECONDS)
        if job not in found:
            raise FollowError(
                f"cluster {self.address}: knows no job {job} any more, so its head was started anew; finished tiles "
                "are kept: submit the job again to go on"
            )
        if told:
            self._say(f"{self.address} answers again")
        return found[job]

    def _again(self, job: str) -> str:
        return f"the job goes on: submit it again to follow it, `hessian cancel {job} --address {self.address}` ends it"

    def _states(self) -> dict[str, JobStatus]:
        """Return the states of all jobs that were ever sent."""
        with self._asking():
            return {job: details.status for job, details in self._jobs().items()}

    def _jobs(self) -> dict[str, Any]:
        return {details.submission_id: details for details in self._client.list_jobs() if details.submission_id}

    def _is_here(self) -> bool:
        """Whether this machine is the whole cluster; an address cannot tell, which may be a tunnel's."""
        end = time.monotonic() + ANSWER_SECONDS
        with self._asking():
            while not (names := self._client.hostnames()) and time.monotonic() < end:  # a head that has just begun
                time.sleep(GLANCE_SECONDS)
        return names == {platform.node()}

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn what a dashboard that is not there, or not one, leads to into one error in one line."""
        try:
            yield
        except Exception as error:
            raise ClusterError(f"cluster {self.address}: {_reason(error)}") from error


class _Client(JobSubmissionClient):
    """Ray's client, which would wait for an answer without end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": (CONNECT_SECONDS, ANSWER_SECONDS), **options})

    def hostnames(self) -> set[str]:
        """Name the machines of the cluster's nodes."""
        answer = self._do_request("GET", "/nodes?view=summary")
        answer.raise_for_status()
        return {node["hostname"] for node in answer.json()["data"]["summary"] if node.get("hostname")}


class _Log:
    """What was written of a log that comes from its beginning over each connection."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._written, self._read = write, 0, 0

    def rewind(self) -> None:
        """Begin a connection."""
        self._read = 0

    def take(self, text: str) -> None:
        """Write what is new."""
        new = text[max(0, self._written - self._read) :]
        self._read += len(text)
        self._written = max(self._written, self._read)
        if new:
            self._write(new)


def _address(given: str | None) -> str:
    """Return the dashboard's address."""
    said = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    for name, value in said.items():
        if given is not None and value.rstrip("/") != given.rstrip("/"):
            raise SpecError(f"--address got {given}, but {name} is {value}, which Ray follows: unset it, or agree")
    address = (given or next(iter(said.values()), DASHBOARD)).rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise SpecError(f"--address got {address}, expected that of the dashboard, as {DASHBOARD}")
    return address


def _reason(error: Exception) -> str:
    """Return in one line why there is no answer, or what the answer is."""
    if isinstance(error, AuthenticationError):
        return (
            "refuses without the right token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, as "
            "on the cluster"
        )
    if "ray[default]" in str(error):
        return "Ray's job client is not installed: python3 -m pip install 'ray[default]'"
    return f"no answer as of a Ray dashboard ({in_words(error)}): check the address, and the tunnel if there is one"
