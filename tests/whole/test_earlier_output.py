"""An output that earlier code left is opened, verified and gone on with."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import dense_hessian
from torch import nn

from pipeline import Problem, compute_hessian, open_hessian, verify_hessian

KEPT = Path(__file__).parents[1] / "data" / "flat_package_output"
# Of the bytes that to_numpy() returned when it was written.
READ_THEN = "aca38acfe701c16db4fe345f32a56ea358e4a1fa1d3c181ca4bd8ba8ce19fa40"
LOST = ("_SUCCESS", "hessian.zarr/c/0/1", "receipts/r1-2_c1-2.json")
COMPLETE = (
    "hessian.zarr/c/0/0",
    "hessian.parquet/row_chunk=0/col_chunk=0/chunk.parquet",
    "receipts/r0-1_c0-1.json",
    "weights.safetensors",
)


def steps(*shape):
    """Numbers of both signs, the same on every machine."""
    return ((torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 37) % 17 - 8).reshape(shape) / 10


DATA = (steps(10, 3), steps(10, 2).flip(0))


def problem():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(steps(*parameter.shape))
    return Problem(model, nn.MSELoss(), DATA)


def go_on(out):
    return compute_hessian(
        problem(),
        str(out),
        chunk=16,
        tile=(1, 1),
        microbatch=5,
        row_group=2,
        engine="factored",
        executor="serial",
        formats=("zarr", "parquet"),
    )


@pytest.fixture
def out(tmp_path):
    return Path(shutil.copytree(KEPT, tmp_path / "out"))


def written(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }


def test_reads_what_was_read_then(out):
    matrix = open_hessian(str(out)).to_numpy()
    assert hashlib.sha256(matrix.tobytes()).hexdigest() == READ_THEN
    truth = dense_hessian(problem().model, lambda model, batch: nn.MSELoss()(model(batch[0]), batch[1]), DATA)
    np.testing.assert_allclose(matrix, truth, rtol=1e-10, atol=1e-12)


def test_verifies(out):
    found = verify_hessian(str(out), problem())
    assert found.ok
    assert found.files == 4  # of Parquet


def test_is_finished(out):
    before = written(out)
    go_on(out)
    assert before == written(out)


def test_goes_on_where_it_is_incomplete(out):
    matrix = open_hessian(str(out)).to_numpy()
    for name in LOST:
        (out / name).unlink()
    before = written(out)
    resumed = go_on(out)
    np.testing.assert_allclose(resumed.to_numpy(), matrix, rtol=1e-12, atol=1e-15)
    after = written(out)
    assert set(LOST) <= after.keys()
    assert all(after[name] == before[name] for name in COMPLETE)
    assert verify_hessian(resumed, problem()).ok
