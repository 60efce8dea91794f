"""The same matrix for every cut: tile, chunk, micro-batch, row group, symmetry, executor, workers, engine, history."""

from itertools import product

import numpy as np
import pytest
import ray
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import block_error
from torch import nn

from pipeline import Problem, compute_hessian, open_hessian
from pipeline.storage.output import SUCCESS, Output
from pipeline.storage.receipts import missing_tiles
from pipeline.storage.run_files import read_manifest

MORE_OF_RAY = pytest.mark.full("one run on Ray is of the default tier")

TRUTH = {make: make().truth() for make in (zoo.layer_norm, zoo.weighted_ignored, zoo.uneven_batches)}


@settings(max_examples=10, deadline=None)
@given(
    make=st.sampled_from(sorted(TRUTH, key=lambda make: make.__name__)),
    engine=st.sampled_from(["auto", "jacrev", "rows"]),
    chunk=st.integers(3, 70),
    tile=st.one_of(st.none(), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    microbatch=st.integers(1, 9),
    row_group=st.integers(1, 20),
    symmetry=st.sampled_from(["mirrored", "upper"]),
)
def test_any_cut(make, **options):
    H = compute_hessian(make().problem, executor="serial", dtype="float64", **options)
    assert block_error(H.to_numpy(), TRUTH[make], H.parameters) < 1e-10


@pytest.fixture(scope="module")
def cluster():
    """A Ray that runs already: runs join it and leave it running."""
    ray.init("local", num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("workers", "symmetry"),
    [
        case if case == (3, "upper") else pytest.param(*case, marks=MORE_OF_RAY)
        for case in product([1, 3, 4], ["mirrored", "upper"])
    ],
)  # 4: one more than there is room for
def test_ray_equals_serial_bit_for_bit(cluster, tmp_path, workers, symmetry):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = {"chunk": 16, "microbatch": 4, "row_group": 8, "symmetry": symmetry}
        serial = compute_hessian(zoo.attention().problem, executor="serial", **options)
        H = compute_hessian(zoo.attention().problem, str(tmp_path), workers=workers, **options)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(H.to_numpy(), serial.to_numpy())
    assert ray.is_initialized()


@MORE_OF_RAY
def test_result_in_memory_from_ray(cluster):
    H = compute_hessian(zoo.mlp().problem, dtype="float64", workers=2)
    assert block_error(H.to_numpy(), zoo.mlp().truth(), H.parameters) < 1e-10
    assert H.output.get(SUCCESS) is not None
    assert H.url.startswith("memory://")
    assert Output(H.url).sizes() == {}  # nobody else sees it


@pytest.mark.parametrize("executor", ["serial", pytest.param("ray", marks=MORE_OF_RAY)])
def test_resumed_equals_undisturbed_bit_for_bit(cluster, tmp_path, executor):
    url = str(tmp_path / "out")
    options = {"executor": executor, "chunk": 16, "tile": (1, 4), "verify": False, "dtype": "float64"}
    whole = compute_hessian(zoo.mlp().problem, url, **options).to_numpy()
    output = Output(url)
    (tmp_path / "out" / "hessian.zarr" / "c" / "0" / "2").unlink()  # an object is missing
    (tmp_path / "out" / "hessian.zarr" / "c" / "3" / "1").write_bytes(b"")  # a mirror is empty
    (tmp_path / "out" / "receipts" / "r2-3_c2-4.json").write_text('{"tile": "r2')  # a receipt is cut off
    H = open_hessian_anyway(url)
    assert [t.id for t in missing_tiles(output, H.manifest)] == ["r0-1_c0-4", "r1-2_c1-4", "r2-3_c2-4"]
    again = compute_hessian(zoo.mlp().problem, url, **options)
    np.testing.assert_array_equal(again.to_numpy(), whole)
    assert missing_tiles(output, again.manifest) == []


def open_hessian_anyway(url):
    from pipeline.analysis.hessian import Hessian

    return Hessian(Output(url), read_manifest(Output(url)))


def test_verification_is_made_up_for(tmp_path):
    url, options = str(tmp_path), {"executor": "serial", "microbatch": 1000}
    compute_hessian(zoo.mlp().problem, url, verify=False, **options)
    assert not (tmp_path / "verify.json").exists()
    compute_hessian(zoo.mlp().problem, url, **options)
    assert (tmp_path / "verify.json").exists()


def test_finished_output_is_left_alone(tmp_path):
    url = str(tmp_path)
    compute_hessian(zoo.mlp().problem, url, executor="serial", chunk=16)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    H = compute_hessian(zoo.mlp().problem, url, executor="serial")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    np.testing.assert_array_equal(open_hessian(url).to_numpy(), H.to_numpy())


def test_a_tile_with_rows_all_below_the_diagonal():
    """They are there for the other rows' sake, where only some blocks are wanted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Tanh(), nn.Linear(4, 16, bias=False))
    problem = Problem(model, nn.MSELoss(), (torch.randn(9, 16), torch.randn(9, 16)))
    options = {"executor": "serial", "dtype": "float64", "chunk": 64}
    part = compute_hessian(problem, **options, tile=(2, 2), blocks=[("0.weight", "0.weight")])
    known = compute_hessian(problem, **options).to_numpy()
    np.testing.assert_allclose(part["0.weight", "0.weight"].reshape(64, 64), known[:64, :64], rtol=0, atol=1e-14)
