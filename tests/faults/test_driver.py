"""Drivers that are ended, killed, followed, and kept apart: real processes, each with its own Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import trouble

from pipeline import LeaseError, open_hessian
from pipeline.runs.api import run
from pipeline.runs.lease import LEASE_SECONDS, Lease
from pipeline.runs.status import status
from pipeline.spec import Settings
from pipeline.storage.output import Output

pytestmark = pytest.mark.full("kills drivers of Ray")

JOB = Path(__file__).parent / "trouble.yaml"
TILES = 45


def command(output, orders, *extra, pause=0.05):
    sets = [f"problem_args.orders={orders}", f"problem_args.pause={pause}", *extra]
    return [
        sys.executable, "-m", "pipeline", "run", str(JOB), "--output", str(output),
        *(word for setting in sets for word in ("--set", setting)),
    ]  # fmt: skip


def started(*arguments, **options):
    return subprocess.Popen(command(*arguments, **options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stored(output):
    return {path.name: path.read_text() for path in (output / "receipts").glob("*.json")}


def wait_for(output, count, process):
    while len(stored(output)) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def tree(process):
    return [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]


def kill(processes):
    for process in processes:
        if process.is_running():
            process.kill()
    psutil.wait_procs(processes, timeout=30)


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known")
    problem, _ = trouble.problem(folder / "orders")
    settings = Settings(dtype="float64", chunk=16, engine="jacrev", row_group=16, microbatch=8, executor="serial")
    return run(problem, settings, str(folder / "out")).hessian.to_numpy()


@pytest.fixture
def survived(known, faults):
    """Notes what runs survived; their matrix must be that of an undisturbed one."""

    def note(fault, H, *, recomputed=0):
        equal = np.array_equal(H.to_numpy(), known)
        faults(fault, "driver", times=1, recomputed=recomputed, tiles=TILES, equal=equal)

    return note


def goes_on(output, orders, before, survived, fault):
    """Run the same command again: what was there is left as it is, and the matrix is right."""
    found = subprocess.run(command(output, orders, pause=0), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert f"{len(before)} of {TILES} tiles are there, going on" in found.stderr
    after = stored(output)
    assert {name: after[name] for name in before} == before
    survived(fault, open_hessian(str(output)), recomputed=TILES - len(before))


@pytest.mark.parametrize("executor", ["ray", "serial"])
def test_sigterm_ends_a_run_in_seconds(tmp_path, survived, executor):
    """What was being written is kept, the lease is given back, and nothing of Ray is left."""
    output, orders = tmp_path / "out", tmp_path / "orders"
    with started(output, orders, f"executor={executor}", *(["workers=1"] if executor == "serial" else [])) as process:
        wait_for(output, 5, process)
        processes = tree(process)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while not json.loads(next((output / "lease").glob("*.json")).read_text())["released"]:
            time.sleep(0.01)
        flushed = time.monotonic() - begun
        _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "run the same command again" in errors
    assert flushed < 3  # after which Ray kills a job that it stops
    before = stored(output)
    assert 5 <= len(before) < TILES
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    goes_on(output, orders, before, survived, f"SIGTERM to a driver ({executor})")


def test_head_and_driver_are_killed(tmp_path, survived):
    output, orders = tmp_path / "out", tmp_path / "orders"
    with started(output, orders) as process:
        wait_for(output, 5, process)
        kill(tree(process))
    goes_on(output, orders, stored(output), survived, "head, workers and driver killed")


def test_a_second_driver_is_refused(tmp_path, survived):
    output, orders = tmp_path / "out", tmp_path / "orders"
    gate = trouble.Orders(orders).gate
    with started(output, orders) as first:
        wait_for(output, 3, first)
        gate.touch()
        try:
            second = subprocess.run(command(output, orders), capture_output=True, text=True)
            told = status(str(output))
        finally:
            gate.unlink()
        _, errors = first.communicate()
    assert second.returncode == 75
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("error")]
    assert f"(process {first.pid}) is at work on it since" in line
    assert f"process {first.pid}" in told["lease"]
    assert "heard" in told["lease"]
    assert first.returncode == 0, errors
    survived("second driver", open_hessian(str(output)))


def of_another_machine(output, silent_seconds, **changes):
    """The lease of a driver on another machine, whose last sign of life is so old by the store's clock."""
    path = output / "lease" / "00000007.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = {"token": "theirs", "host": "elsewhere", "machine": "another", "pid": 1, "born": 0.0, "since": time.time()}
    path.write_text(json.dumps(holder | {"released": False, "state": {}} | changes))
    then = time.time() - silent_seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("skew", [-86_400, 0, 86_400])
def test_a_lease_ends_by_the_clock_of_the_store(tmp_path, survived, skew):
    """Whatever the clocks of drivers say."""
    problem, _ = trouble.problem(tmp_path / "orders")
    output = tmp_path / "out"
    settings = Settings(dtype="float64", chunk=16, engine="jacrev", row_group=16, microbatch=8, executor="serial")
    of_another_machine(output, LEASE_SECONDS - 20, since=time.time() + skew)
    with pytest.raises(LeaseError, match=r"elsewhere \(process 1\) is at work on it since .* ends after 60 s"):
        run(problem, settings, str(output))
    of_another_machine(output, LEASE_SECONDS + 20, since=time.time() + skew)
    H = run(problem, settings, str(output)).hessian
    assert [path.name for path in (output / "lease").iterdir()] == ["00000008.json"]
    survived(f"lease of a dead driver, its clock {skew / 3600:+.0f} h off", H)


def test_a_damaged_lease_ends_like_any(tmp_path):
    problem, _ = trouble.problem(tmp_path / "orders")
    output = tmp_path / "out"
    settings = Settings(chunk=16, executor="serial", verify=False)
    of_another_machine(output, 0)
    (output / "lease" / "00000007.json").write_text("{")
    with pytest.raises(LeaseError, match="somebody"):
        run(problem, settings, str(output))
    of_another_machine(output, LEASE_SECONDS + 20)
    run(problem, settings, str(output))


def test_one_of_many_takes_a_lease(tmp_path):
    """All at the same moment."""
    import threading

    output, held, refused, ready = Output(str(tmp_path)), [], [], threading.Barrier(8)

    def take():
        lease = Lease(output, dict)
        ready.wait()
        try:
            lease.__enter__()
            held.append(lease)
        except LeaseError:
            refused.append(lease)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for lease in held:
        lease.__exit__(None, None, None)
    assert (len(held), len(refused)) == (1, 7)


def test_a_driver_that_was_taken_over_stops(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.runs.lease.BEAT_SECONDS", 0.05)
    output = Output(str(tmp_path))
    with Lease(output, dict) as lease:
        lease.check()
        of_another_machine(tmp_path, 0)
        lease._beat.join(10)
        with pytest.raises(LeaseError, match="another driver took it over"):
            lease.check()
    assert json.loads((tmp_path / "lease" / "00000007.json").read_text())["token"] == "theirs"


def test_a_log_of_what_happened(tmp_path):
    """JSON lines, with the fields of each event."""
    output, log = tmp_path / "out", tmp_path / "log"
    subprocess.run([*command(output, tmp_path / "orders", pause=0), "--log", str(log)], check=True, capture_output=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    done = [line for line in lines if line.get("event") == "tile done"]
    assert {line["tile"] for line in done} == {name.removesuffix(".json") for name in stored(output)}
    assert all(line["bytes"] > 0 and line["seconds"] > 0 and line["asctime"] for line in done)
