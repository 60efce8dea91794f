"""One pass over a store: products of all of it, and what is wrong with it, each once."""

import finished
import numpy as np
import pytest

from pipeline.results import chunk_scan
from pipeline.results.chunk_scan import Scan
from pipeline.storage.chunk_formats import store_chunk
from pipeline.storage.receipts import read_receipt, record_files
from pipeline.storage.tile_products import StoredProducts, as_text, check_vectors
from pipeline.storage.zarr_store import MatrixStore, StoredObject

P, B = 40, 16
HALF = np.random.default_rng(0).standard_normal((P, P))
FULL = HALF + HALF.T
VECTORS = np.random.default_rng(1).standard_normal((3, P))
VECTORS[1, :B] = 0  # not all of them everywhere


@pytest.fixture(params=["mirrored", "upper"])
def hessian(request):
    return finished.stored(FULL, symmetry=request.param)


def part(i, j, of=FULL):
    return np.ascontiguousarray(of[i * B : (i + 1) * B, j * B : (j + 1) * B])


def replaced(hessian, i, j, values):
    return MatrixStore(hessian.output, hessian.manifest).write_chunk(i, j, values)


def test_products_and_counts(hessian):
    scan = Scan(hessian, VECTORS)
    np.testing.assert_allclose(scan.products, VECTORS @ FULL)
    assert not scan.faults
    assert scan.chunks == (9 if hessian.manifest.symmetry == "mirrored" else 6)
    assert scan.files == 0


def test_products_in_some_rows_alone(hessian, monkeypatch):
    """Chunks that they do not cross are not read."""
    read = []
    whole = MatrixStore.read_chunk
    monkeypatch.setattr(
        MatrixStore, "read_chunk", lambda self, i, j, **o: read.append((i, j)) or whole(self, i, j, **o)
    )
    only = np.zeros(P, bool)
    only[[B, B + 3]] = True
    scan = Scan(hessian, VECTORS, only=only)
    np.testing.assert_allclose(scan.products[:, only], (VECTORS @ FULL)[:, only])
    assert not scan.faults
    assert scan.chunks == len(read) > 0
    assert all(1 in key for key in read)


def test_a_missing_chunk(hessian):
    hessian.output.delete("hessian.zarr/c/0/1")
    assert Scan(hessian, VECTORS).faults == ["chunk c/0/1 is missing"]


def test_a_chunk_that_is_not_symmetric(hessian):
    replaced(hessian, 1, 1, HALF[:B, :B].copy())
    assert Scan(hessian, VECTORS).faults == ["c/1/1 is not symmetric"]


def test_a_mirror_image_that_is_none():
    hessian = finished.stored(FULL, symmetry="mirrored")
    replaced(hessian, 2, 0, part(2, 0) + 1)
    assert Scan(hessian, VECTORS).faults == ["c/2/0 is not the mirror image of c/0/2"]


def with_products(hessian, of=FULL, run=None):
    """Receipts as a worker leaves them, which has computed a given matrix."""
    manifest = hessian.manifest
    vectors = check_vectors(manifest.digest, P)
    for tile in manifest.plan.tiles():
        rows, cols = manifest.plan.span(tile.rows), manifest.plan.span(tile.cols)
        products = StoredProducts(vectors, rows, cols)
        products.add(of[rows.start : rows.stop, cols.start : cols.stop], rows, cols)
        text = as_text(np.concatenate([products.right, products.down]))
        receipt = finished.replace(read_receipt(hessian.output, manifest, tile), products=text)
        receipt = finished.replace(receipt, run=run or receipt.run)
        hessian.output.put(finished.receipt_name(tile.id), receipt.to_bytes())


def test_entries_that_are_not_those_that_were_computed(hessian):
    with_products(hessian)
    assert not Scan(hessian, VECTORS).faults
    other = FULL.copy()
    other[3, 20] = other[20, 3] = 0.0
    with_products(hessian, other)
    (fault,) = Scan(hessian, VECTORS).faults
    assert fault.startswith("tile r0-1_c1-2: its stored entries are not those that were computed")
    with_products(hessian, other, run="another")  # of another run: nothing to compare with
    assert not Scan(hessian, VECTORS).faults


def with_files(hessian):
    """Parquet files beside the chunks, listed in the receipts, as an export leaves them."""
    manifest = hessian.manifest
    files = chunk_scan.ParquetFiles(hessian.output, manifest)
    for tile in manifest.plan.tiles():
        put = [f for i, j in manifest.plan.chunks(tile) for f in store_chunk([files], manifest, i, j, part(i, j))]
        record_files(hessian.output, manifest, tile, put)
    return files


def test_files_are_read_and_compared(hessian):
    files = with_files(hessian)
    scan = Scan(hessian, VECTORS, parquet=True)
    assert not scan.faults
    assert scan.files == scan.chunks
    tile = hessian.manifest.plan.tiles()[1]
    wrong = files.write_chunk(0, 1, part(0, 1) + 1)
    others = [s for s in read_receipt(hessian.output, hessian.manifest, tile).chunks if s.key != wrong.key]
    assert Scan(hessian, VECTORS, parquet=True).faults == [f"hessian.parquet/{wrong.key} does not match its checksum"]
    record_files(hessian.output, hessian.manifest, tile, [*others, wrong])
    assert Scan(hessian, VECTORS, parquet=True).faults == [
        f"hessian.parquet/{wrong.key} differs from c/0/1 in 256 entries"
    ]


def test_files_of_something_else_and_files_that_nobody_listed(hessian):
    with_files(hessian)
    hessian.output.put("hessian.parquet/row_chunk=9/col_chunk=9/chunk.parquet", b"")
    tile = hessian.manifest.plan.tiles()[0]
    receipt = read_receipt(hessian.output, hessian.manifest, tile)
    zarr = tuple(s for s in receipt.chunks if s.key.startswith("c/"))
    hessian.output.put(finished.receipt_name(tile.id), finished.replace(receipt, chunks=zarr).to_bytes())
    assert Scan(hessian, VECTORS, parquet=True).faults == [
        "hessian.parquet/row_chunk=9/col_chunk=9/chunk.parquet is not of this Hessian",
        "hessian.parquet/row_chunk=0/col_chunk=0/chunk.parquet is in no receipt",
    ]


def test_receipts_are_read_once(hessian, monkeypatch):
    with_files(hessian)
    asked = []

    def counted(output, manifest, tile):
        asked.append(tile.id)
        return read_receipt(output, manifest, tile)

    monkeypatch.setattr(chunk_scan, "read_receipt", counted)
    Scan(hessian, VECTORS, parquet=True)
    assert sorted(asked) == sorted(tile.id for tile in hessian.manifest.plan.tiles())


def test_what_a_stored_object_says():
    expected = StoredObject("c/0/0", 10, 1)
    assert "has 9 bytes" in StoredObject("c/0/0", 9, 1).differs_from(expected)
    assert "checksum" in StoredObject("c/0/0", 10, 2).differs_from(expected)
