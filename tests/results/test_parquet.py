"""Parquet: what readers make of the files, and every damage found."""

import io
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import crc32c as crc
import duckdb
import numpy as np
import polars as pl
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import zoo
from outputs import BOTH, CHUNK, compute, contents

from pipeline import (
    FingerprintError,
    IncompleteError,
    OutputError,
    SpecError,
    compute_hessian,
    export_hessian,
    open_hessian,
    verify_hessian,
)
from pipeline.planning.tiling import require_room_in_lists
from pipeline.runs.status import status
from pipeline.storage.output import Output
from pipeline.storage.parquet_store import decode
from pipeline.storage.receipts import read_receipt, record_files
from pipeline.storage.zarr_store import StoredObject


def with_pyarrow(folder):
    table = pyarrow.dataset.dataset(folder, format="parquet", partitioning="hive").to_table()
    return zip(*(table[name].to_pylist() for name in ("row", "col_chunk", "values")), strict=True)


def with_polars(folder):
    return pl.scan_parquet(folder, hive_partitioning=True).select("row", "col_chunk", "values").collect().rows()


def with_duckdb(folder):
    files = f"{folder}/*/*/*.parquet"
    return duckdb.sql(
        f"SELECT row, col_chunk, values FROM read_parquet('{files}', hive_partitioning = true)"
    ).fetchall()


@pytest.mark.parametrize("read", [with_pyarrow, with_polars, with_duckdb])
def test_readers_agree(H, read):
    """Every entry, once; with symmetry=upper none below the diagonal's chunks."""
    P = H.shape[0]
    found = np.full((P, P), np.nan, H.dtype)
    for row, col_chunk, values in read(f"{H.url}/hessian.parquet"):
        part = found[row, CHUNK * col_chunk : CHUNK * (col_chunk + 1)]
        assert len(part) == len(values)
        assert np.isnan(part).all()
        part[:] = values
    chunks = np.arange(P) // CHUNK
    stored = np.full((P, P), True) if H.manifest.symmetry == "mirrored" else chunks[:, None] <= chunks
    np.testing.assert_array_equal(found, np.where(stored, H.to_numpy(), np.nan))


def test_files_are_as_documented(H):
    path = f"{H.url}/hessian.parquet/row_chunk=2/col_chunk=3/chunk.parquet"
    schema = pq.read_schema(path)
    assert schema.field("row").type == pyarrow.int64()
    assert schema.field("values").type.value_type == pyarrow.from_numpy_dtype(H.dtype)
    assert pyarrow.types.is_list(schema.field("values").type)
    assert schema.metadata == {b"first_row": b"32", b"first_col": b"48", b"P": b"59", b"chunk": b"16"}
    values = pq.ParquetFile(path).metadata.row_group(0).column(1)
    assert "BYTE_STREAM_SPLIT" in values.encodings
    assert not values.has_dictionary_page


ENTRIES = """
CREATE VIEW chunks AS SELECT * FROM read_parquet('{files}');
CREATE VIEW entries AS
SELECT row, {side} * col_chunk + generate_subscripts(values, 1) - 1 AS col, unnest(values) AS value FROM chunks
"""


@pytest.fixture
def database(whole):
    with duckdb.connect() as database:
        database.execute(ENTRIES.format(files=f"{whole.url}/hessian.parquet/*/*/*.parquet", side=CHUNK))
        yield database


def test_block_query(whole, database):
    a, b = whole.parameters["4.weight"], whole.parameters["0.bias"]
    where = f"row >= {a.offset} AND row < {a.span.stop} AND col >= {b.offset} AND col < {b.span.stop}"
    found = database.sql(f"SELECT value FROM entries WHERE {where} ORDER BY row, col").fetchnumpy()["value"]
    np.testing.assert_array_equal(found.reshape(a.shape + b.shape), whole["4.weight", "0.bias"])


def test_largest_entries_query(whole, database):
    found = database.sql(
        "SELECT * FROM entries WHERE row <= col ORDER BY abs(value) DESC, row, col LIMIT 10"
    ).fetchall()
    full = np.triu(whole.to_numpy())
    order = np.argsort(-np.abs(full), axis=None, kind="stable")[:10]
    assert [(row, col) for row, col, _ in found] == [tuple(map(int, divmod(k, whole.shape[0]))) for k in order]
    np.testing.assert_array_equal([value for *_, value in found], full.reshape(-1)[order])


def test_product_query(whole, database):
    v = np.random.default_rng(0).standard_normal(whole.shape[0])
    parts = pl.DataFrame({"col_chunk": np.arange(len(v)) // CHUNK, "v": v}).group_by("col_chunk", maintain_order=True)
    vector = parts.agg("v")
    database.register("vector", vector)
    found = database.sql(
        "SELECT row, sum(list_inner_product(values::DOUBLE[], v)) AS product FROM chunks JOIN vector USING (col_chunk) "
        "GROUP BY row ORDER BY row"
    ).fetchnumpy()["product"]
    np.testing.assert_allclose(found, whole.to_numpy().astype(float) @ v, rtol=0, atol=1e-13)


def test_only_computed_blocks(tmp_path):
    H = compute(tmp_path / "out", blocks=[("4.bias", "0.weight")], chunk=4)
    stored = {path.split("/")[0] for path in contents(f"{H.url}/hessian.parquet")}
    assert len(stored) < H.manifest.plan.side
    assert contents(export_hessian(H.url, "parquet", str(tmp_path / "more"))) == contents(f"{H.url}/hessian.parquet")


def test_receipts_and_status_count_both(out):
    files = contents(out / "hessian.parquet")
    chunks = {key: data for key, data in contents(out / "hessian.zarr").items() if key.startswith("c/")}
    assert len(files) == len(chunks) == 16
    H, stored = open_hessian(str(out)), sum(map(len, [*files.values(), *chunks.values()]))
    assert status(str(out))["bytes"] == stored
    assert sum(read_receipt(H.output, H.manifest, tile).bytes for tile in H.manifest.plan.tiles()) == stored
    assert H.manifest.formats == BOTH


def test_no_room_for_both(zarr_only, tmp_path, monkeypatch):
    """Room for Zarr, but not for Parquet too. The system's answer is replaced."""
    once = 16 * CHUNK**2 * 4
    monkeypatch.setattr("psutil.disk_usage", lambda path: namedtuple("usage", "free")(int(1.5 * once)))
    compute(tmp_path / "one", formats=["zarr"])
    with pytest.raises(OutputError, match=r"needs \d[\d.]* kB"):
        compute(tmp_path / "both")
    assert not list((tmp_path / "both").rglob("*.*"))
    monkeypatch.setattr("psutil.disk_usage", lambda path: namedtuple("usage", "free")(once // 2))
    for kind, dest in [("parquet", None), ("npy", str(tmp_path / "H.npy"))]:
        with pytest.raises(OutputError, match="make room or another output"):
            export_hessian(str(zarr_only), kind, dest)


# Damage


def chunk_file(out):
    return out / "hessian.parquet" / "row_chunk=1" / "col_chunk=2" / "chunk.parquet"


NAME = "hessian.parquet/row_chunk=1/col_chunk=2/chunk.parquet"


def test_every_flipped_bit_is_found(out):
    """In pages, in their headers and in the footer, of which a page's checksum covers the first alone."""
    path = chunk_file(out)
    whole = path.read_bytes()
    for position in np.random.default_rng(0).integers(0, 8 * len(whole), 40):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        assert verify_hessian(str(out)).faults == [f"{NAME} does not match its checksum"]


def test_pages_are_checked(out):
    """A reader that asks for it finds flipped bits by the pages' own checksums."""
    H, whole = open_hessian(str(out)), chunk_file(out).read_bytes()
    np.testing.assert_array_equal(decode(H.manifest, 1, 2, whole), H[16:32, 32:48])
    values = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0).column(1)
    end = values.data_page_offset + values.total_compressed_size
    for position in range(end - 1000, end):  # of 16 x 16 entries in float32: inside the page
        flipped = bytearray(whole)
        flipped[position] ^= 1
        with pytest.raises(IncompleteError, match="CRC checksum verification failed"):
            decode(H.manifest, 1, 2, bytes(flipped))


@pytest.mark.parametrize("found_by", ["verify", "run"])
@pytest.mark.parametrize("size", [None, 0, 100, -1])
def test_missing_and_truncated_files(out, size, found_by):
    path, before = chunk_file(out), contents(out / "hessian.parquet")
    whole = path.read_bytes()
    path.unlink() if size is None else path.write_bytes(whole[:size])
    if found_by == "verify":
        word = "is missing" if size is None else "does not match its checksum"
        assert verify_hessian(str(out)).faults == [f"{NAME} {word}"]
        assert (
            f"1 of 16 chunks and 16 Parquet files are at fault, the first: {NAME}" in verify_hessian(str(out)).summary()
        )
    else:
        finished = {tile: (out / "receipts" / tile).stat().st_mtime_ns for tile in os.listdir(out / "receipts")}
        compute(out, verify=True)
        assert json.loads((out / "verify.json").read_text())["files"] == 16
        again = {tile: (out / "receipts" / tile).stat().st_mtime_ns for tile in os.listdir(out / "receipts")}
        assert {tile for tile in again if again[tile] != finished[tile]} == {"r1-2_c1-3.json"}
        assert contents(out / "hessian.parquet") == before


def test_files_that_are_not_those_of_the_chunk(out):
    """As put, by their checksums, but of another chunk, or with another value: what receipts cannot tell."""
    H, path = open_hessian(str(out)), chunk_file(out)
    table, other = pq.read_table(path, partitioning=None), path.parents[1] / "col_chunk=1" / "chunk.parquet"
    assert read_as_put(H, other.read_bytes()).endswith("has columns or metadata other than those of chunk (1, 2)")
    assert read_as_put(H, written(table.slice(0, 15))).endswith("does not hold rows 16 to 32 with 16 values each")
    assert "differs from c/1/2 in 1 entries" in read_as_put(H, written(with_one_changed(table)))
    assert "cannot be decoded" in read_as_put(H, b"PAR1 but no more")


def read_as_put(H, data):
    """Have a file put in place of chunk (1, 2), with a receipt that says so, and give the fault found."""
    tile = next(tile for tile in H.manifest.plan.tiles() if tile.id == "r1-2_c1-3")
    key = NAME.removeprefix("hessian.parquet/")
    others = [c for c in read_receipt(H.output, H.manifest, tile).chunks if c.key.endswith("parquet") and c.key != key]
    H.output.put(NAME, data)
    record_files(H.output, H.manifest, tile, [*others, StoredObject(key, len(data), crc.crc32c(data))])
    (fault,) = verify_hessian(H.url).faults
    return fault


def written(table):
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def with_one_changed(table):
    values = np.array(table["values"].to_pylist(), dtype=np.float32)
    values[3, 5] = np.nextafter(values[3, 5], 1, dtype=np.float32)
    lists = pyarrow.array(list(values), type=table.schema.field("values").type)
    return pyarrow.Table.from_arrays([table["row"].combine_chunks(), lists], schema=table.schema)


def test_files_of_something_else_are_found(out):
    stray = out / "hessian.parquet" / "row_chunk=9" / "col_chunk=9" / "chunk.parquet"
    stray.parent.mkdir(parents=True)
    shutil.copy(chunk_file(out), stray)
    assert verify_hessian(str(out)).faults == [
        "hessian.parquet/row_chunk=9/col_chunk=9/chunk.parquet is not of this Hessian"
    ]
    with pytest.raises(OutputError, match=r"holds something else \(row_chunk=9/"):
        export_hessian(str(out), "parquet")


def test_leftovers_of_a_killed_writer_are_no_rows(out, monkeypatch):
    """Whole, but not yet renamed: pyarrow would count it, were it not hidden."""
    names, replace = [], os.replace
    monkeypatch.setattr("os.replace", lambda a, b: (names.append(Path(a).name), replace(a, b)))
    Output(str(out)).put(NAME, chunk_file(out).read_bytes())
    shutil.copy(chunk_file(out), chunk_file(out).with_name(names[0]))
    for read in (with_pyarrow, with_duckdb):
        assert len(list(read(f"{out}/hessian.parquet"))) == 59 * 4
    assert len(with_polars(f"{out}/hessian.parquet/**/*.parquet")) == 59 * 4
    assert verify_hessian(str(out)).ok


# Settings


def test_other_formats_are_another_run(out, zarr_only):
    with pytest.raises(FingerprintError, match=r"formats is \('zarr',\).*hessian export"):
        compute(out, formats=("zarr",))
    with pytest.raises(FingerprintError, match=r"stored \('zarr',\)"):
        compute(zarr_only)
    compute(out, formats=["parquet", "zarr"])  # the order means nothing


def test_files_in_memory_are_refused():
    with pytest.raises(SpecError, match="give an output"):
        compute_hessian(zoo.mlp().problem, formats=BOTH, executor="serial")


def test_chunks_too_large_for_lists_are_refused():
    """A real one has 2^31 entries: 8 GiB."""
    require_room_in_lists(46_340, 10**6)
    require_room_in_lists(50_000, 40_000)
    with pytest.raises(SpecError, match="`chunk` got 46341, expected at most 46340"):
        require_room_in_lists(46_341, 10**6)
