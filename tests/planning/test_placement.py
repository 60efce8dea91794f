"""Which node a worker is on: real Ray nodes with resources of their own, GPUs by name only, an idle head."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import yaml
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations
from torch import nn

from pipeline import Problem, ProblemError, SpecError
from pipeline.cluster import executor
from pipeline.planning.job_plan import common_plan
from pipeline.planning.memory import MemoryRefusedError, WorkerMemory
from pipeline.planning.placement import ACCELERATOR, Node, Share, Staff, one_of_each_kind, staff_of
from pipeline.preflight.devices import worker_count
from pipeline.preflight.planner import make_plan
from pipeline.progress import Reporter
from pipeline.runs.api import plan, run
from pipeline.spec import Settings, load_job

ROOT = Path(__file__).parents[2]
SETTINGS = {"dtype": "float64", "chunk": 16, "tile": (1, 1), "engine": "jacrev", "row_group": 16, "microbatch": 8}
ON_GPUS = {"gpus_per_worker": 1, "device": "cpu"}  # GPUs that are names: what Ray does with them is real
BIG = {ACCELERATOR: "A100"}


class Model(nn.Sequential):
    """A small net that notes where it is evaluated, and there waits until as many workers as expected are."""

    def __init__(self, folder, workers=0):
        super().__init__(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 6))
        self.folder, self.workers = Path(folder), workers
        self.register_buffer("ballast", torch.zeros(300_000))  # too large to be sent in another way than an object

    def forward(self, x):
        stage = "work" if (self.folder / "planned").exists() else "plan"
        own = self.folder / f"{stage}-{os.getpid()}"
        if not own.exists():
            own.write_text(f"{ray.get_runtime_context().get_node_id()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        end = time.monotonic() + 300
        while stage == "work" and len(list(self.folder.glob("work-*"))) < self.workers:
            assert time.monotonic() < end, "the other workers do not come"
            time.sleep(0.02)
        return super().forward(x)


def problem(folder, workers=0, model=Model):
    """P = 132."""
    torch.manual_seed(0)
    Path(folder).mkdir()
    return Problem(model(folder, workers), nn.MSELoss(), (torch.randn(8, 7), torch.randn(8, 6)))


def places(folder, stage):
    """Where it was evaluated: pairs of node and GPU, one for each process."""
    return sorted(tuple(path.read_text().split()) for path in folder.glob(f"{stage}-*"))


class Notes(Reporter):
    """Tells the model that planning is over, and calls a function at the first tile."""

    def __init__(self, folder, at_first=lambda: None):
        self.folder, self.at_first = folder, at_first

    def say(self, text):
        if text.startswith("P = "):
            (self.folder / "planned").touch()

    def advance(self, tile_bytes):
        self.at_first()
        self.at_first = lambda: None


OF_RAY = pytest.mark.full("starts a cluster of Ray")


@pytest.fixture(scope="module")
def nodes():
    """A head without CPUs, and three nodes: their ids by a name."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made = {
        "even": cluster.add_node(num_cpus=2, num_gpus=2, labels=BIG),
        "few CPUs": cluster.add_node(num_cpus=1, num_gpus=4, labels=BIG),
        "small": cluster.add_node(num_cpus=2, num_gpus=1, labels={ACCELERATOR: "T4"}, resources={"own": 1}),
    }
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        yield {name: node.node_id for name, node in made.items()} | {"address": cluster.address}
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        settings = Settings(**SETTINGS, executor="serial", verify=False)
        return run(problem(folder / "log"), settings, str(folder / "out")).hessian.to_numpy()
    finally:
        torch.set_num_threads(threads)


def computed(problem, url, report=None, **settings):
    return run(problem, Settings(**SETTINGS | ON_GPUS | settings), str(url), report=report)


@OF_RAY
def test_one_worker_on_each_gpu(nodes, tmp_path, serial, monkeypatch):
    """Of three nodes with different resources; what they need is sent once to each."""
    sent, put, located = [], ray.put, {}
    monkeypatch.setattr(ray, "put", lambda value: sent.append(put(value)) or sent[-1])
    log = tmp_path / "log"
    report = Notes(log, lambda: located.update(get_object_locations(sent)))
    outcome = computed(problem(log, 4), tmp_path / "out", report)
    np.testing.assert_array_equal(outcome.hessian.to_numpy(), serial)
    assert outcome.verification.ok

    worked = places(log, "work")
    driver = ray.get_runtime_context().get_node_id()
    of_workers = [place for place in worked if place[0] != driver]  # verification is the driver's
    assert len(of_workers) == len(set(of_workers)) == 4
    on = [node for node, _ in of_workers]
    assert {name: on.count(nodes[name]) for name in ("even", "few CPUs", "small")} == {
        "even": 2,
        "few CPUs": 1,
        "small": 1,
    }

    planned = {node for node, _ in places(log, "plan")}  # one of each kind, and nothing on the head
    assert len(planned) == 2
    assert nodes["small"] in planned
    assert planned <= set(nodes.values()) - {driver}

    (object_,) = located.values()
    assert sorted(object_["node_ids"]) == sorted([driver, *set(on)])
    assert object_["object_size"] > 300_000 * 4


@OF_RAY
def test_two_workers_share_a_gpu(nodes, tmp_path, serial):
    """Where labels and resources lead them."""
    log = tmp_path / "log"
    chosen = {"label_selector": {ACCELERATOR: "!in(A100, H100)"}, "resources": {"own": 0.5}, "verify": False}
    outcome = computed(problem(log, 2), tmp_path / "out", Notes(log), gpus_per_worker=0.5, **chosen)
    np.testing.assert_array_equal(outcome.hessian.to_numpy(), serial)
    assert places(log, "work") == [(nodes["small"], "0")] * 2


@OF_RAY
def test_a_gpu_that_is_not_there(nodes, tmp_path):
    """In planning, and in a worker that goes on with a run: final, whatever Ray says of the node."""
    with pytest.raises(SpecError, match=r"torch .* finds no CUDA device on .*: compute where there is one"):
        computed(problem(tmp_path / "log"), tmp_path / "out", device="auto")
    log = tmp_path / "log2"
    made = problem(log)
    run(made, Settings(**SETTINGS, executor="serial", verify=False), str(tmp_path / "out2"))
    (tmp_path / "out2" / "hessian.zarr" / "c" / "0" / "0").unlink()
    with pytest.raises(SpecError, match="finds no CUDA device"):
        computed(made, tmp_path / "out2", device="cuda", workers=1)
    assert not places(log, "work")


@OF_RAY
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus_per_worker": 1, "cpus_per_worker": 3}, "no node has room for a worker, which takes CPU 3, GPU 1 "),
        (
            {"resources": {"owm": 1}},
            r"takes CPU 1, GPU 1, owm 1 .*one with CPU 2, GPU 1, own 1, ray.io/accelerator-type: T4",
        ),
        (
            {"label_selector": {ACCELERATOR: "in(H100)"}, "workers": 2},
            r"takes .*accelerator-type: in\(H100\) \(nodes: ",
        ),
    ],
)
def test_what_no_node_has_is_refused_at_once(nodes, tmp_path, asked, message):
    start = time.monotonic()
    with pytest.raises(SpecError, match=message):
        computed(problem(tmp_path / "log"), tmp_path / "out", **asked)
    assert time.monotonic() - start < 60
    assert not (tmp_path / "out" / "manifest.json").exists()


JOB = """
import torch
from torch import nn
from pipeline import Problem

def plain():
    torch.manual_seed(0)
    return Problem(nn.Linear(5, 3), nn.MSELoss(), (torch.randn(6, 5), torch.randn(6, 3)))

def dropout():
    return Problem(nn.Sequential(nn.Linear(5, 3), nn.Dropout()), nn.MSELoss(), (torch.randn(6, 5), torch.randn(6, 3)))
"""


@pytest.fixture
def job(nodes, tmp_path):
    (tmp_path / "made.py").write_text(JOB)
    keys = {
        "problem": "made.py:plain",
        "output": "out",
        "address": nodes["address"],
        "label_selector": {ACCELERATOR: "T4"},
        **ON_GPUS,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "job.yaml"


@OF_RAY
def test_what_is_wrong_there_is_said_as_if_it_were_here(job):
    """By the command, in a process that joins the cluster."""
    found = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", "job.yaml", "--set", "problem=made.py:dropout"],
        capture_output=True,
        text=True,
        check=False,
        cwd=job.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith("error: ")
    assert "drawn in `1` (Dropout)" in found.stderr.splitlines()[-1]
    assert not (job.parent / "out" / "manifest.json").exists()


@OF_RAY
def test_a_job_that_names_a_cluster_is_planned_there(job, monkeypatch):
    monkeypatch.setattr("pipeline.runs.api.make_plan", None)
    made = plan(load_job(job, ["workers=3"], str(job.parent / "out")), job.parent)
    assert (made.workers, made.allowed_device_bytes) == (3, None)
    assert made.place.endswith(", CPU")
    assert not (job.parent / "out" / "manifest.json").exists()


def node(labels=None, memory=1.0, **resources):
    return Node("x", {**resources, "memory": memory}, labels or {})


@pytest.mark.parametrize(
    ("asked", "has", "room"),
    [
        ({}, {"CPU": 3}, 3),
        ({"cpus_per_worker": 2}, {"CPU": 3}, 1),
        ({"gpus_per_worker": 1}, {"CPU": 8, "GPU": 4}, 4),
        ({"gpus_per_worker": 1}, {"CPU": 8}, 0),
        ({"gpus_per_worker": 0.4}, {"CPU": 8, "GPU": 2}, 4),  # not five: none is on two GPUs
        ({"gpus_per_worker": 0.6}, {"CPU": 8, "GPU": 2}, 2),
        ({"gpus_per_worker": 0.1}, {"CPU": 99, "GPU": 1}, 10),
        ({"resources": {"own": 0.1}}, {"CPU": 99, "own": 0.3}, 3),
    ],
)
def test_room_on_a_node(asked, has, room):
    assert Share.of(Settings(**asked)).room(node(**has)) == room


@pytest.mark.parametrize(
    ("wanted", "values"),
    [("a", {"a"}), ("!a", {"b", None}), ("in(a, b)", {"a", "b"}), ("in(a,b)", {"a", "b"}), ("!in(a, b)", {"c", None})],
)
def test_labels_are_read_as_ray_reads_them(wanted, values):
    share = Share.of(Settings(label_selector={"kind": wanted}))
    labelled = {value: {"kind": value} if value else {} for value in ("a", "b", "c", None)}
    fits = {value for value, labels in labelled.items() if share.room(node(labels, CPU=1))}
    assert fits >= values
    assert not fits & {"a", "b"} - values


def test_this_machine_holds_as_many_as_a_node_like_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    for share, count in ((0.6, 2), (0.4, 4), (1, 2)):
        settings = Settings(gpus_per_worker=share)
        assert worker_count(settings) == Share.of(settings).room(node(CPU=8, GPU=2)) == count


@pytest.mark.parametrize(
    ("types", "fixed"),
    [
        ({"a1": "node_a1", "b2": "node_b2"}, True),  # made up by Ray's monitor, which adds nothing
        ({"10.0.0.1": "head"}, False),  # of a cluster's file: by address
        ({"10.0.0.1": "head", "10.0.0.2": "node_10.0.0.2"}, False),
        ({}, False),
    ],
)
def test_a_cluster_that_gets_no_more_nodes(monkeypatch, types, fixed):
    status = json.dumps({"autoscaler_report": {"node_type_mapping": types}})
    monkeypatch.setattr(executor, "_internal_kv_get", lambda _: status)
    assert executor._is_fixed() is fixed


def test_one_node_of_each_kind():
    """The one of least memory."""
    nodes = [node(BIG, 2, CPU=4), node(BIG, 1, CPU=2), node(None, 3, CPU=1), node({ACCELERATOR: "T4"}, 0.5)]
    assert one_of_each_kind(nodes, Settings()) == nodes[1:3]


def test_staff():
    nodes = [node(CPU=4), node(CPU=2)]
    assert staff_of(nodes, Settings()) == Staff(6, 4)
    assert staff_of(nodes, Settings(workers=3)) == Staff(3, 3)
    assert staff_of([], Settings(workers=3)) == Staff(3, 3)
    with pytest.raises(SpecError, match="`workers` is not given, and no node has room"):
        staff_of([], Settings())


def test_memory_of_a_gpu_is_refused_on_its_own():
    memory = WorkerMemory(10 * 2**20, 100 * 2**20, 0, 200 * 2**20, "r0-1_c0-1", on_gpu=True)
    memory.require(memory.total_bytes, memory.device_bytes)
    assert memory.total_bytes < WorkerMemory(10 * 2**20, 100 * 2**20, 0, 200 * 2**20, "r0-1_c0-1").total_bytes
    with pytest.raises(MemoryRefusedError, match=r"would need 388 MB on the GPU .*allowed are 315 MB"):
        memory.require(memory.total_bytes, 300 * 2**20)


def test_kinds_must_agree_on_engines():
    """The plan of least memory, unless another kind found its engines wrong."""
    torch.manual_seed(0)
    made = Problem(nn.Linear(5, 3), nn.MSELoss(), (torch.randn(6, 5), torch.randn(6, 3)))
    small, large = (
        make_plan(made, Settings(executor="serial", memory=memory * 2**30, engine="jacrev")) for memory in (1, 2)
    )
    assert common_plan([large, small]) is small
    other = make_plan(made, Settings(executor="serial", memory=3 * 2**30, engine="rows"))
    with pytest.raises(ProblemError, match=r"`weight`: engine jacrev is right on .*, but on .* rows was chosen"):
        common_plan([small, other])
