"""Buckets over HTTP on real servers: the same contract for each, what is asked of them, and what goes wrong."""

import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import clouds
import numpy as np
import pytest
import ray
import zoo
from commands import command, refused

from pipeline import OutputError, compute_hessian, export_hessian, open_hessian, verify_hessian
from pipeline.runs.status import status
from pipeline.storage import filesystems, retries
from pipeline.storage.output import Output
from pipeline.storage.parquet_store import file_key

JOB = Path(__file__).parents[2] / "jobs" / "digits_mlp.yaml"
SMALL = ["problem_args.hidden=6", "problem_args.steps=5", "chunk=128", "workers=2", "formats=[zarr, parquet]"]
SMALL = [word for setting in SMALL for word in ("--set", setting)]
SERIAL = {"executor": "serial", "dtype": "float64", "chunk": 16}


TIERED = [
    name if name == "moto" else pytest.param(name, marks=pytest.mark.full("one emulated cloud is of the default tier"))
    for name in clouds.CLOUDS
]


@pytest.fixture(scope="module", params=TIERED)
def cloud(request):
    yield from clouds.started(clouds.CLOUDS[request.param])


@pytest.fixture(scope="module")
def s3():
    yield from clouds.started(clouds.moto)


@pytest.fixture
def url(cloud, request):
    return f"{cloud.url}/{request.node.name.split('[')[0]}"


def test_objects(url):
    output = Output(url)
    Output(f"{url}2").put("x", b"of a neighbour whose name begins the same")
    assert output.get("a/b") is None
    assert output.sizes() == {}
    output.put("a/b", b"1234")
    output.put("a/b", b"12345")
    output.put("c", b"")
    output.delete("not there")
    assert output.get("a/b") == b"12345"
    assert output.sizes() == {"a/b": 5, "c": 0}
    assert output.sizes("a") == {"b": 5}
    output.delete("c")
    assert output.sizes() == {"a/b": 5}


@pytest.fixture(scope="module")
def ran(cloud):
    """The main job, made small, by the command and on Ray: where it is, and all that was said and logged."""
    url = f"{cloud.url}/main"
    with tempfile.TemporaryDirectory(prefix="ray-") as logs:
        shown = subprocess.run(
            [sys.executable, "-m", "pipeline", "run", str(JOB), "--output", url, *SMALL],
            env={**os.environ, "RAY_TMPDIR": logs},
            capture_output=True,
            text=True,
        )
        assert shown.returncode == 0, shown.stderr
        files = [path for path in Path(logs).rglob("*") if path.is_file()]
        assert any("worker" in path.name for path in files)
        logged = [path.read_bytes().decode(errors="replace") for path in files]
    return url, shown.stdout, [shown.stderr, *logged]


@pytest.mark.full("a run on Ray in each cloud")
def test_the_main_job(ran):
    """Run, found finished, verified with and without the problem, and read."""
    url, shown, _ = ran
    assert "error" in shown
    assert "nothing to do" in command("run", JOB, "--output", url, *SMALL)[2]
    assert "error" in command("verify", url, "--job", JOB, *SMALL[:4])[1]
    code, shown, _ = command("status", url)
    assert (code, shown.splitlines()[0]) == (0, "state: finished")
    H = open_hessian(url)
    full, v = H.to_numpy(), np.random.default_rng(0).standard_normal(H.shape[0])
    np.testing.assert_allclose(H @ v, full @ v, rtol=1e-4, atol=1e-6)
    a, b = (H.parameters[name].place for name in ("0.bias", "2.bias"))
    np.testing.assert_array_equal(H["0.bias", "2.bias"], full[a, b])


def test_a_bucket_that_is_not_there(cloud):
    """It is said to be missing, and not to hold no Hessian; one that is there holds none."""
    url = f"{cloud.url}-not-there/out"
    said = f"there is no bucket `{url.split('/')[2]}`: create it, or correct the URL", "access denied"  # SeaweedFS
    assert any(words in refused("status", url) for words in said)
    assert "holds no Hessian" in refused("status", f"{cloud.url}/nothing")
    assert status(f"{cloud.url}/nothing") == {"state": "absent"}


@pytest.mark.full("a run on Ray in each cloud")
def test_no_secret_anywhere(cloud, ran):
    """Not in what is stored, said, logged or pickled, when all goes well and when it does not."""
    secrets = [value for name, value in cloud.environment.items() if "SECRET" in name]
    if "AZURE_STORAGE_CONNECTION_STRING" in cloud.environment:
        secrets.append(clouds.AZURE_KEY)
    url, shown, logged = ran
    output, hessian = Output(url), open_hessian(url)
    said = [shown, *logged, repr(output), repr(hessian), refused("status", f"{cloud.url}-not-there/out")]
    said += [(output.get(name) or b"").decode(errors="replace") for name in output.sizes()]
    for sent in (output, hessian):
        said += [dumps(sent).decode(errors="replace") for dumps in (pickle.dumps, ray.cloudpickle.dumps)]
    for secret in secrets:
        assert not [text[:200] for text in said if secret in text]


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
def test_damage_is_found_and_mended(url, symmetry):
    url = f"{url}/{symmetry}"
    known = compute_hessian(zoo.mlp().problem, url, symmetry=symmetry, tile=(1, 2), **SERIAL).to_numpy()
    output = Output(url)
    output.delete("hessian.zarr/c/1/2")
    assert "c/1/2 is missing" in verify_hessian(url).faults[0]
    output.delete("_SUCCESS")
    before = output.sizes("receipts")
    mended = compute_hessian(zoo.mlp().problem, url, symmetry=symmetry, tile=(1, 2), **SERIAL)
    np.testing.assert_array_equal(mended.to_numpy(), known)
    assert output.sizes("receipts").keys() == before.keys()
    whole = output.get("hessian.zarr/c/0/1")
    output.put("hessian.zarr/c/0/1", whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    assert "c/0/1 cannot be decoded" in verify_hessian(url).faults[0]


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
def test_one_put_per_chunk_and_no_listing_between(s3, symmetry):
    s3.requests.clear()
    H = compute_hessian(
        zoo.mlp().problem, f"{s3.url}/{symmetry}", symmetry=symmetry, tile=(1, 2), verify=False, **SERIAL
    )
    chunks = [k for k, (method, path) in enumerate(s3.requests) if method == "PUT" and "/hessian.zarr/c/" in path]
    side = H.manifest.plan.side
    assert len(chunks) == (side * side if symmetry == "mirrored" else side * (side + 1) // 2)
    assert len({s3.requests[k] for k in chunks}) == len(chunks)
    between = {(method, path.split("/")[3]) for method, path in s3.requests[chunks[0] : chunks[-1]]}
    assert between == {("PUT", "hessian.zarr"), ("PUT", "receipts")}


def test_endpoint_from_the_spec(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{clouds.free_port()}")  # where nobody answers
    clouds.forget_clients()
    url = f"{s3.url}/endpoint"
    H = compute_hessian(zoo.mlp().problem, url, endpoint_url=s3.endpoint, verify=False, **SERIAL)
    np.testing.assert_array_equal(open_hessian(url, s3.endpoint).to_numpy(), H.to_numpy())
    assert "unproven" in command("status", url, "--endpoint-url", s3.endpoint)[1]
    export_hessian(url, "parquet", f"{s3.url}/exported", endpoint_url=s3.endpoint)  # in the same cloud
    files = Output(f"{s3.url}/exported", s3.endpoint).sizes()
    assert set(files) == {file_key(*place) for tile in H.manifest.plan.tiles() for place in H.manifest.places(tile)}


@pytest.mark.full("waits for a store")
def test_throttling_is_waited_out(s3, monkeypatch, caplog):
    """More refusals than the client, as it is set here, bears by itself."""
    clouds.impatient_client(monkeypatch)
    s3.troubles.extend([503] * 5)
    H = compute_hessian(zoo.mlp().problem, f"{s3.url}/throttled", concurrent_puts=1, verify=False, **SERIAL)
    assert not s3.troubles
    assert "trying again" in caplog.text
    np.testing.assert_allclose(H.to_numpy(), zoo.mlp().truth(), atol=1e-13)


@pytest.mark.full("waits for a store")
def test_a_store_that_stays_away_leaves_a_run_to_go_on_with(s3, monkeypatch):
    clouds.impatient_client(monkeypatch)
    monkeypatch.setattr(retries, "PATIENCE_SECONDS", 0)
    s3.troubles.extend([503] * 10_000)
    try:
        with pytest.raises(OutputError, match="run the same command again") as error:
            compute_hessian(zoo.mlp().problem, f"{s3.url}/away", verify=False, **SERIAL)
    finally:
        s3.troubles.clear()
    assert error.value.exit_code == 75
    H = compute_hessian(zoo.mlp().problem, f"{s3.url}/away", verify=False, **SERIAL)
    np.testing.assert_allclose(H.to_numpy(), zoo.mlp().truth(), atol=1e-13)


@pytest.mark.parametrize(("module", "url"), [("s3fs", "s3"), ("gcsfs", "gs"), ("adlfs", "az")])
def test_missing_client(module, url, monkeypatch):
    """It is named as an index has it, which this package is not on."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, url, raising=False)
    assert f"python3 -m pip install {module}" in refused("status", f"{url}://bucket/out")


def test_wrong_bucket(cloud):
    wrong = cloud.url.replace("bucket", "no-such-bucket")
    line = refused("run", JOB, "--output", f"{wrong}/out")
    assert "no such bucket or container" in line or "access denied" in line


@pytest.mark.full("waits for a store")
def test_no_permission(monkeypatch):
    """SeaweedFS checks signatures."""
    for cloud in clouds.started(clouds.seaweed):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-somebody-else")
        clouds.forget_clients()
        assert "access denied" in refused("run", JOB, "--output", f"{cloud.url}/out")
        assert "access denied" in refused("status", f"{cloud.url}/out")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, "/nowhere")
        clouds.forget_clients()
        assert "access denied" in refused("run", JOB, "--output", f"{cloud.url}/out")


@pytest.mark.full("waits for a store")
def test_wrong_endpoint(cloud, monkeypatch):
    port = clouds.free_port()
    there = cloud.endpoint.split("/")[2]
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value.replace(there, f"127.0.0.1:{port}"))
    clouds.forget_clients()
    monkeypatch.setattr(
        filesystems, "ANSWER_SECONDS", 3
    )  # some clients try again by themselves for as long as they may
    assert "no answer" in refused("run", JOB, "--output", f"{cloud.url}/out")
    assert "no answer" in refused("status", f"{cloud.url}/out")


def test_credentials_in_urls_are_refused():
    assert "carries credentials" in refused("status", f"s3://key:{clouds.SECRET}@bucket/out")
    assert "carries credentials" in refused("status", f"s3://key:a/{clouds.SECRET}@bucket/out")
    assert "carries credentials" in refused("status", "s3://bucket/out", "--endpoint-url", "http://a:b@127.0.0.1")
    for url in (f"s3://key:a/{clouds.SECRET}@bucket/out", f"simplecache::s3://key:{clouds.SECRET}@bucket/out"):
        assert clouds.SECRET not in refused("status", url)


def test_a_malformed_url(s3):
    assert "s3://[bad/out" in refused("status", "s3://[bad/out")
