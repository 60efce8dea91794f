"""Real Ray processes that are really killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import zoo

from pipeline import ProblemError, SpecError, compute_hessian, open_hessian
from pipeline.cluster import executor
from pipeline.cluster.actors import Actor
from pipeline.spec import Settings
from pipeline.storage.output import Output
from pipeline.storage.run_files import write_manifest

pytestmark = pytest.mark.full("starts Ray, and kills what it started")

JOB = Path(__file__).parents[2] / "jobs" / "digits_mlp.yaml"
SMALL = ["--set", "problem_args.hidden=12", "--set", "problem_args.steps=5", "--set", "chunk=64", "--set", "workers=2"]


def command(output, *extra):
    return [sys.executable, "-m", "pipeline", "run", str(JOB), "--output", str(output), *SMALL, *extra]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    subprocess.run(command(output), check=True, capture_output=True)
    return open_hessian(str(output))


def receipts(output):
    return {path.name: json.loads(path.read_text()) for path in (output / "receipts").glob("*.json")}


def wait_for(output, count, process):
    while len(list((output / "receipts").glob("*.json"))) < count:
        assert process.poll() is None, "the run ended too early"
        time.sleep(0.005)


def tree(process):
    return [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]


def end(processes):
    for process in processes:
        if process.is_running():
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def test_killed_driver_goes_on(tmp_path, undisturbed):
    """SIGKILL to the driver: the same command computes what is missing, and nothing else."""
    output = tmp_path / "out"
    with subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(output, 3, process)
        processes = tree(process)
        os.kill(process.pid, signal.SIGKILL)
        end(processes)
    before = receipts(output)
    assert 3 <= len(before) < len(undisturbed.manifest.plan.tiles())
    found = subprocess.run(command(output), check=True, capture_output=True, text=True)
    after = receipts(output)
    assert f"{len(before)} of {len(after)} tiles are there, going on" in found.stderr
    assert {name: after[name] for name in before} == before
    H = open_hessian(str(output))
    np.testing.assert_array_equal(H.to_numpy(), undisturbed.to_numpy())


def test_killed_worker_is_replaced(tmp_path, undisturbed):
    output = tmp_path / "out"
    with subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for(output, 2, process)
        victim = next(iter(receipts(output).values()))["pid"]
        os.kill(victim, signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    H = open_hessian(str(output))
    np.testing.assert_array_equal(H.to_numpy(), undisturbed.to_numpy())
    repeated = [receipt for receipt in receipts(output).values() if receipt["attempt"] > 1]
    assert repeated
    assert all(receipt["pid"] != victim for receipt in repeated)


def test_a_problem_that_cannot_be_sent_is_refused_before_it_is_planned(monkeypatch):
    problem = zoo.mlp().problem
    problem.model.lock = threading.Lock()
    monkeypatch.setattr(executor, "make_plan", lambda *_: pytest.fail("planned"))
    with pytest.raises(ProblemError, match="define model and loss so that they can be pickled"):
        compute_hessian(problem, workers=1)


def test_a_folder_that_is_another_one_on_the_worker_s_node(tmp_path, undisturbed):
    settings = Settings(cpus_per_worker=torch.get_num_threads())
    manifest, elsewhere = undisturbed.manifest, Output(str(tmp_path))
    for other in (None, manifest.model_copy(update={"chunk": 2 * manifest.chunk})):
        if other:
            write_manifest(elsewhere, other)
        with pytest.raises(SpecError, match=r"not the same place on node .*, or a folder that all nodes share"):
            Actor(b"", manifest, elsewhere, settings).start()


def test_settings_reach_the_workers(undisturbed):
    found = receipts(Path(undisturbed.url))
    assert len(found) == len(undisturbed.manifest.plan.tiles())
    assert {receipt["device"] for receipt in found.values()} == {"cpu"}
    assert all(receipt["attempt"] == 1 for receipt in found.values())
    assert all(receipt["asymmetry"] < 1e-4 for receipt in found.values())
