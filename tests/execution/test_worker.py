"""The worker where memory runs out, and where tiles are of different sizes."""

import shutil
import threading
import time

import numpy as np
import pytest
import torch
import zoo
from torch import nn

from pipeline import NotFiniteError, OutputError, Problem, compute_hessian
from pipeline.engines.jacrev import Jacrev
from pipeline.engines.registry import ENGINES
from pipeline.execution.worker import Worker
from pipeline.problem.batches import sample_count
from pipeline.storage.receipts import read_receipt

SETTINGS = {"executor": "serial", "engine": "jacrev", "dtype": "float64", "chunk": 16, "verify": False}


class Narrow(Jacrev):
    """An engine on a device with room for six rows of one sample, two of three, and so on."""

    room = 6

    def add(self, batch, rows, cols, out):
        if self.row_group * sample_count(batch) > self.room:
            out.fill_(torch.nan)  # what was begun is lost
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().add(batch, rows, cols, out)


class Nowhere(Narrow):
    """One without room for anything."""

    room = 0


def after_planning(monkeypatch, engine):
    """Have memory there while the run is planned, and gone afterwards."""

    class Late(Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            monkeypatch.setitem(ENGINES, "jacrev", engine)

    monkeypatch.setattr("pipeline.execution.executors.Worker", Late)


def test_smaller_groups_where_memory_runs_out(monkeypatch):
    known = compute_hessian(zoo.mlp().problem, **SETTINGS).to_numpy()
    after_planning(monkeypatch, Narrow)
    H = compute_hessian(zoo.mlp().problem, **SETTINGS, row_group=16, microbatch=7)
    np.testing.assert_allclose(H.to_numpy(), known, rtol=0, atol=1e-14)
    halvings = [read_receipt(H.output, H.manifest, tile).halvings for tile in H.manifest.plan.tiles()]
    assert set(halvings) == {5}  # 16 rows of 7 samples, 8, 4, 2, 1, then of 3; found once and remembered


def test_no_room_at_all(monkeypatch):
    after_planning(monkeypatch, Nowhere)
    with pytest.raises(torch.OutOfMemoryError):
        compute_hessian(zoo.mlp().problem, **SETTINGS)


def test_memory_of_tiles_is_used_again():
    """Ragged tiles, large ones first: nothing of a tile is left in the next."""
    options = {"executor": "serial", "dtype": "float64", "chunk": 16, "verify": False}
    known = compute_hessian(zoo.mlp().problem, **options, tile=(1, 1)).to_numpy()
    for tile in ((2, 2), (1, 3), (4, 4)):
        H = compute_hessian(zoo.mlp().problem, **options, tile=tile).to_numpy()
        np.testing.assert_allclose(H, known, rtol=0, atol=1e-14)


def test_a_tile_that_is_being_written_is_left_alone(tmp_path, monkeypatch):
    """Where the next one fails, and the one after that is computed all the same."""
    options = {"executor": "serial", "dtype": "float64", "chunk": 16, "tile": (1, 1), "verify": False}
    known = compute_hessian(zoo.mlp().problem, str(tmp_path), **options)
    manifest, output, matrix = known.manifest, known.output, known.to_numpy()
    first, second, third = manifest.plan.tiles()[:3]
    output.delete(f"hessian.zarr/c/{first.rows.start}/{first.cols.start}")
    worker, may_write = Worker(zoo.mlp().problem, manifest, output), threading.Event()
    write = worker._write_chunk
    monkeypatch.setattr(worker, "_write_chunk", lambda *arguments: may_write.wait(60) and write(*arguments))
    worker.compute(first)
    with monkeypatch.context() as broken:
        broken.delattr(Worker, "_finish")
        with pytest.raises(AttributeError):
            worker.compute(second)
    worker.values(third)
    may_write.set()
    assert [receipt.tile for receipt in worker.flush()] == [first.id]
    worker.close()
    rows, cols = manifest.plan.span(first.rows), manifest.plan.span(first.cols)
    found = known.store.read_chunk(first.rows.start, first.cols.start)
    np.testing.assert_array_equal(found, matrix[rows.start : rows.stop, cols.start : cols.stop])


def test_an_entry_that_is_not_finite_is_named(monkeypatch):
    class Broken(Jacrev):
        def add(self, batch, rows, cols, out):
            super().add(batch, rows, cols, out)
            if rows.start <= 17 < rows.stop and 20 in cols:
                out[17 - rows.start, 20 - cols.start] = torch.inf

    after_planning(monkeypatch, Broken)
    with pytest.raises(NotFiniteError, match=r"the first at row 17, column 20: H\["):
        compute_hessian(zoo.mlp().problem, **SETTINGS)


@pytest.mark.full("waits for a disk")
def test_nothing_is_computed_on_where_a_tile_cannot_be_kept(tmp_path):
    """The second tile is broken off when the first cannot be written; it would take 70 micro-batches or more."""
    calls, slow = [], []

    def loss(out, y):
        calls.append(y)
        time.sleep(0.02 * len(slow))
        return nn.functional.cross_entropy(out, y)

    problem = Problem(zoo.tanh_net(), loss, zoo.data(n=70))
    options = {**SETTINGS, "microbatch": 1, "tile": (2, 4)}
    compute_hessian(problem, str(tmp_path), **options)
    for receipt in (tmp_path / "receipts").iterdir():
        receipt.unlink()
    calls.clear()
    compute_hessian(problem, str(tmp_path), **options)
    undisturbed = len(calls)
    for receipt in (tmp_path / "receipts").iterdir():
        receipt.unlink()
    chunks = tmp_path / "hessian.zarr" / "c"
    shutil.rmtree(chunks)
    chunks.write_text("a file where a folder is needed")
    calls.clear()
    slow.append(True)
    with pytest.raises(OutputError, match=r"cannot write hessian.zarr/c/\d/\d .* run the same command again to go on"):
        compute_hessian(problem, str(tmp_path), **options)
    assert len(calls) < undisturbed - 35


def test_what_the_stored_type_cannot_hold_is_refused():
    model, (x, y) = zoo.tanh_net(), zoo.data()
    steep = Problem(model, lambda out, target: 1e41 * nn.functional.cross_entropy(out, target), (x, y))
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        compute_hessian(steep, executor="serial", dtype="float64", store_dtype="float32", verify=False)
