"""Preflight, engines, worker and proof on a CUDA device that is not there: the CPU's numbers, and few stops."""

import numpy as np
import pretended_cuda
import pytest
import torch
import zoo
from hazards import HAZARDS
from pretended_cuda import MixedDevicesError, RaceError
from pretended_streams import Stream
from torch import nn

from pipeline import HessianError, IncompleteError, Problem, compute_hessian, verify_hessian
from pipeline.engines.jacrev import Jacrev
from pipeline.execution.way_out import FromDevice, WayOut
from pipeline.execution.worker import Worker
from pipeline.problem.problem import PlacedProblem
from pipeline.results import reference
from pipeline.storage.receipts import read_receipt

SETTINGS = {"executor": "serial", "microbatch": 3, "row_group": 4, "chunk": 16, "tile": (2, 2)}
LAST_BITS = 4 * np.finfo(np.float64).eps  # of the largest entry: some of the CPU's kernels look at addresses
# What the pretence itself does not stand: it asks for a wrapped tensor's device below Python.
UNPRETENDED = {"outside: Gaussian prior on the vector of all"}
HUNDRED = [name for name in list(HAZARDS)[::7] if name not in UNPRETENDED]


@pytest.fixture
def device():
    with pretended_cuda.pretended_cuda() as device:
        yield device


def attention():
    """Tied embedding, norms, and attention, applied at positions."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.norm = (
                nn.Embedding(7, 4),
                nn.MultiheadAttention(4, 2, batch_first=True),
                nn.LayerNorm(4),
            )

        def forward(self, tokens):
            x = self.embed(tokens)
            x = self.norm(x + self.mix(x, x, x, need_weights=False)[0])
            return x @ self.embed.weight.T

    def loss(logits, target):
        return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"), target.numel()

    tokens = torch.randint(0, 7, (5, 3))
    return Problem(Net().eval(), loss, (tokens, tokens.roll(1, 1)))


def sequence():
    """An embedding and a dense layer at positions: sums at tokens."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3))
    return Problem(net, nn.CrossEntropyLoss(), (torch.randint(0, 7, (9, 2)), torch.randint(0, 3, (9,))))


NETWORKS = {"dense": lambda: zoo.mlp().problem, "convolutions": lambda: zoo.conv().problem, "attention": attention}


@pytest.mark.parametrize("name", NETWORKS)
def test_same_as_on_the_cpu(name):
    problem = NETWORKS[name]()
    known = compute_hessian(problem, dtype="float32", verify=False, **SETTINGS)
    with pretended_cuda.pretended_cuda():
        found = compute_hessian(problem, dtype="float32", device="cuda", **SETTINGS)  # its proof with it
    np.testing.assert_array_equal(found.to_numpy(), known.to_numpy())
    for tile in known.manifest.plan.tiles():
        a, b = (read_receipt(H.output, H.manifest, tile) for H in (known, found))
        assert b.device == "cuda"
        np.testing.assert_allclose([b.max_abs, b.norm, b.asymmetry], [a.max_abs, a.norm, a.asymmetry], rtol=1e-5)


@pytest.mark.full("once more for each")
@pytest.mark.parametrize(
    "storing", [{"symmetry": "upper"}, {"store_dtype": "float32"}, {"formats": ("zarr", "parquet")}]
)
def test_stored_in_other_ways(storing, tmp_path):
    problem, settings = sequence(), {"dtype": "float64", "engine": "factored", **SETTINGS, **storing}
    known = compute_hessian(problem, str(tmp_path / "host"), verify=False, **settings)
    with pretended_cuda.pretended_cuda():
        found = compute_hessian(problem, str(tmp_path / "device"), device="cuda", **settings)
    np.testing.assert_array_equal(found.to_numpy(), known.to_numpy())


def outcome(hazard, **settings):
    try:
        with hazard.around():
            H = compute_hessian(hazard.problem, executor="serial", dtype="float64", microbatch=3, **settings)
        return H.to_numpy(), H.manifest.engines
    except HessianError as refusal:
        return None, str(refusal)


@pytest.mark.full("hazards once more")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        n if k % 3 == 0 and "checkpoint" not in n else pytest.param(n, marks=pytest.mark.long)
        for k, n in enumerate(HUNDRED)
    ],
)
def test_hazards_as_on_the_cpu(name):
    known, on_host = outcome(HAZARDS[name]())
    hazard = HAZARDS[name]()
    try:
        _ = hazard.problem  # made on the host
    except HessianError:
        return
    with pretended_cuda.pretended_cuda():
        found, on_device = outcome(hazard, device="cuda")
    if (
        known is not None and found is None
    ):  # tensors that the model holds unregistered stay where they are, as in torch
        assert "on the same device" in on_device
    elif known is None:
        assert found is None
        assert on_device[:40] == on_host[:40]
    else:
        assert on_device == on_host
        np.testing.assert_allclose(found, known, rtol=0, atol=LAST_BITS * np.abs(known).max(initial=0.0))


def test_there_are_a_hundred():
    assert len(HUNDRED) >= 100


def counted(problem, **sizes):
    """What a worker's tiles cost once it knows each pair of layers: by kind, for each tile."""
    planned = compute_hessian(problem, dtype="float32", verify=False, **SETTINGS | sizes)
    with pretended_cuda.pretended_cuda() as device:
        worker = Worker(problem, planned.manifest, planned.output, "cuda")
        tiles = planned.manifest.plan.tiles()[:3]
        for _ in range(2):
            device.seen.clear()
            for tile in tiles:
                worker.compute(tile)
            worker.flush()
        worker.close()
    kinds = ("stop", "wait", "to host", "to host later", "to device", "host index", "host scalar")
    return {kind: device.count(kind) / len(tiles) for kind in kinds}


LEAST = {  # of each tile, however many micro-batches and groups of rows it takes
    "stop": 1.0,  # is it finite?
    "wait": 1.0,  # of the writer's thread, for the copy
    "to host": 0.0,
    "to host later": 2.0,  # its chunks, and what is to be known of them
    "to device": 0.0,
    "host index": 0.0,
    "host scalar": 0.0,
}


SMALLER = pytest.param({"row_group": 2, "microbatch": 2}, marks=pytest.mark.full("once more, smaller"))


@pytest.mark.parametrize("make", [NETWORKS["dense"], sequence, attention])
@pytest.mark.parametrize("sizes", [{"row_group": 4}, SMALLER])
def test_one_stop_for_each_tile(make, sizes):
    assert counted(make(), **sizes) == LEAST


def test_a_stop_in_an_engine_is_counted(monkeypatch):
    add = Jacrev.add

    def careless(self, batch, rows, cols, out):
        add(self, batch, rows, cols, out)
        _ = out.sum().item()

    monkeypatch.setattr(Jacrev, "add", careless)
    assert counted(NETWORKS["dense"](), engine="jacrev")["stop"] > LEAST["stop"]


def test_a_bound_that_is_exceeded():
    """The first micro-batch has units that are dead, which live in the others: the tile is computed anew."""
    torch.manual_seed(0)
    mix = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), Mixed(), nn.Linear(12, 3))
    x = torch.randn(9, 3)
    x[:3] = 0.0
    problem = Problem(mix, nn.CrossEntropyLoss(), (x, torch.randint(0, 3, (9,))))
    known = compute_hessian(problem, dtype="float64", engine="factored", verify=False, **SETTINGS)
    with pretended_cuda.pretended_cuda():
        found = compute_hessian(problem, dtype="float64", engine="factored", device="cuda", **SETTINGS)
    np.testing.assert_allclose(found.to_numpy(), known.to_numpy(), rtol=0, atol=1e-15)


class Mixed(nn.Module):
    """Adds a neighbour where the sample is not zero: how many inputs depend on a unit differs from sample to sample."""

    def forward(self, x):
        return x + torch.relu(x - 0.3).roll(1, 1)


def test_the_proof_is_near_the_device(device, monkeypatch):
    """Reference products are computed there, in float64, of a matrix that the CPU computed."""
    H = compute_hessian(zoo.mlp().problem, dtype="float64", verify=False, device="cpu", **SETTINGS)
    seen = []
    multiply = reference.hessian_vector_products

    def noted(placed, vectors, *arguments):
        seen.append((placed.device.type, placed.dtype))
        return multiply(placed, vectors, *arguments)

    monkeypatch.setattr(reference, "hessian_vector_products", noted)
    assert verify_hessian(H, zoo.mlp().problem).ok
    assert set(seen) == {("cuda", torch.float64)}


def test_the_proof_takes_fewer_samples_where_there_is_little_memory(device, monkeypatch):
    H = compute_hessian(zoo.mlp().problem, dtype="float64", verify=False, device="cpu", **SETTINGS)
    multiply, samples = reference.hessian_vector_products, []

    def narrow(placed, vectors, weight, microbatch):
        samples.append(microbatch)
        if microbatch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return multiply(placed, vectors, weight, microbatch)

    monkeypatch.setattr(reference, "hessian_vector_products", narrow)
    assert verify_hessian(H, zoo.mlp().problem).ok
    assert samples[:4] == [32, 16, 8, 4]
    assert set(samples[4:]) == {4}


def test_smaller_groups_where_memory_runs_out():
    """Planned on the CPU, as for a device that others hold since."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))
    problem = Problem(net, nn.CrossEntropyLoss(), (torch.randn(64, 16), torch.randint(0, 4, (64,))))
    sizes = {"engine": "jacrev", "row_group": 64, "microbatch": 64, "chunk": 128, "tile": (1, 2)}
    planned = compute_hessian(problem, executor="serial", dtype="float64", verify=False, **sizes)
    known = planned.to_numpy()
    with pretended_cuda.pretended_cuda(total=4_000_000) as device:
        worker = Worker(problem, planned.manifest, planned.output, "cuda")
        receipts = [r for tile in planned.manifest.plan.tiles() for r in worker.compute(tile)] + worker.flush()
        worker.close()
        assert device.peak <= 4_000_000
    assert min(receipt.halvings for receipt in receipts) > 0
    np.testing.assert_allclose(planned.to_numpy(), known, rtol=0, atol=1e-14)


@pytest.mark.parametrize("asked", [True, False])
def test_sums_in_a_fixed_order(asked, monkeypatch):
    """Where a run asks for it; the manifest says so, and one that does not is as ever."""
    seen, add = set(), Jacrev.add

    def noted(self, batch, rows, cols, out):
        seen.add(torch.are_deterministic_algorithms_enabled())
        add(self, batch, rows, cols, out)

    monkeypatch.setattr(Jacrev, "add", noted)
    H = compute_hessian(zoo.mlp().problem, engine="jacrev", deterministic=asked, **SETTINGS)
    assert seen == {asked}
    assert not torch.are_deterministic_algorithms_enabled()
    assert H.manifest.deterministic == asked
    assert (b"deterministic" in H.manifest.to_bytes()) == asked
    assert type(H.manifest).model_validate_json(H.manifest.to_bytes()).digest == H.manifest.digest


# Faults, one of each kind, and what the device says to them.


def test_mixed_devices(device):
    a = torch.zeros(3, device="cuda")
    with pytest.raises(MixedDevicesError, match="same device"):
        a + torch.zeros(3)
    with pytest.raises(MixedDevicesError):
        torch.mm(a[None], torch.zeros(3, 1))
    with pytest.raises(MixedDevicesError):
        a[torch.arange(2)] = torch.ones(2)
    assert (a + torch.tensor(1.0)).tolist() == [1, 1, 1]  # a number is taken


def test_numpy_and_addresses(device):
    a = torch.zeros(3, device="cuda")
    for refused in (a.numpy, lambda: np.asarray(a)):
        with pytest.raises(TypeError, match="host"):
            refused()
    with pytest.raises(RuntimeError, match="address"):
        a.data_ptr()


@pytest.mark.parametrize(
    ("kind", "careless"),
    [
        ("stop", lambda a: float(a.sum())),
        ("stop", lambda a: a[a > 0]),
        ("stop", lambda a: a.nonzero()),
        ("stop", lambda a: torch.cuda.synchronize()),
        ("to host", lambda a: a.cpu()),
        ("to host", lambda a: torch.empty(4).copy_(a, non_blocking=True)),  # not pinned: it blocks
        ("to device", lambda a: a.new_tensor(2.0)),
        ("to device", lambda a: torch.ones(3).to("cuda")),
        ("host index", lambda a: a[torch.arange(2)]),
        ("host scalar", lambda a: a * torch.tensor(2.0)),
        ("atomic", lambda a: a.index_add_(0, torch.zeros(4, dtype=torch.long, device="cuda"), a.clone())),
    ],
)
def test_each_kind_of_event_is_seen(kind, careless, device):
    a = torch.ones(4, device="cuda")
    device.seen.clear()
    careless(a)
    assert device.count(kind) == 1, device.seen


def test_a_batch_that_is_not_moved(device, monkeypatch):
    monkeypatch.setattr(PlacedProblem, "cast", lambda self, batch: batch)
    with pytest.raises(HessianError, match="devices"):
        compute_hessian(zoo.mlp().problem, device="cuda", dtype="float32", **SETTINGS)


def planted():
    with pretended_cuda.pretended_cuda():
        return compute_hessian(zoo.mlp().problem, device="cuda", dtype="float64", verify=False, **SETTINGS).to_numpy()


def test_a_copy_that_is_not_waited_for(monkeypatch):
    """By the writer: it stores what is not there yet."""
    monkeypatch.setattr(FromDevice, "wait", lambda self: None)
    with pytest.raises(IncompleteError, match="not numbers"):
        planted()


def test_chunks_that_are_written_over_while_they_are_copied(monkeypatch):
    """The stream that computes does not wait for the copy of what it packs anew."""
    problem = zoo.mlp().problem
    known = compute_hessian(problem, dtype="float64", verify=False, **SETTINGS)
    with pretended_cuda.pretended_cuda():
        for is_waited_for in (True, False):
            if not is_waited_for:
                monkeypatch.setattr(Stream, "wait_event", lambda self, event: setattr(self, "waited", event.written))
            way = WayOut(known.manifest.plan, known.parameters, torch.float64, torch.device("cuda"), is_mirrored=True)
            worker = Worker(problem, known.manifest, known.output, "cuda")
            tile = known.manifest.plan.tiles()[0]
            out, products = worker._computed(tile)
            leaving = way.send(tile, out, products)
            way.turn()
            way.send(tile, 2 * out, products)
            leaving.wait()
            i, j = known.manifest.plan.chunks(tile)[0]
            stored = known.store.read_chunk(i, j)
            assert np.array_equal(leaving.chunk(i, j).entries, stored) == is_waited_for


def test_a_copy_that_begins_too_early(monkeypatch):
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    with pytest.raises(RaceError, match="way_out"):
        planted()


def test_memory_of_the_device_is_counted():
    with pretended_cuda.pretended_cuda(total=10_000) as device:
        before = device.allocated
        a = torch.zeros(100, device="cuda")
        view = a[:10]
        assert torch.cuda.memory_allocated() - before == 400
        del a
        assert torch.cuda.memory_allocated() - before == 400
        del view
        assert torch.cuda.memory_allocated() == before
        assert torch.cuda.max_memory_allocated() == before + 400
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(10_000, device="cuda")
