"""Exports: the same files as a run's, interrupted and gone on with, into Parquet and .npy."""

import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zoo
from outputs import compute, contents

from pipeline import (
    IncompleteError,
    OutputError,
    SpecError,
    compute_hessian,
    export_hessian,
    verify_hessian,
)
from pipeline.progress import Reporter


def test_an_export_writes_what_a_run_writes(H, made, tmp_path):
    url = shutil.copytree(made(H.manifest.symmetry, str(H.dtype), ("zarr",)).url, str(tmp_path / "alone"))
    written = contents(f"{H.url}/hessian.parquet")
    assert contents(export_hessian(H.url, "parquet", str(tmp_path / "elsewhere"))) == written
    assert export_hessian(url, "parquet") == f"{url}/hessian.parquet"
    assert contents(f"{url}/hessian.parquet") == written
    found = verify_hessian(url)
    assert (found.ok, found.files) == (True, found.chunks)


class Interrupted(Reporter):
    """Somebody presses Ctrl-C after the first tile."""

    def advance(self, tile_bytes):
        raise KeyboardInterrupt


def stamps(folder):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*.parquet")
        if path.is_file()
    }


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_interrupted_export_goes_on(zarr_only, tmp_path, elsewhere):
    url, dest = str(zarr_only), str(tmp_path / "files") if elsewhere else None
    folder = Path(dest or zarr_only / "hessian.parquet")
    with pytest.raises(KeyboardInterrupt):
        export_hessian(url, "parquet", dest, report=Interrupted())
    before = stamps(folder)
    assert 0 < len(before) < 16
    assert verify_hessian(url).ok == elsewhere
    damaged = min(before)
    damaged.write_bytes(damaged.read_bytes()[:50])
    export_hessian(url, "parquet", dest)
    after = stamps(folder)
    assert len(after) == 16
    assert {path for path in before if after[path] != before[path]} == {damaged}
    assert verify_hessian(url).ok
    export_hessian(url, "parquet", dest)
    assert stamps(folder) == after


@pytest.mark.parametrize("place", ["hessian.parquet/row_chunk=0", "receipts"])
def test_what_a_killed_export_left_half_written_is_removed(zarr_only, place):
    left = zarr_only / place / f".some.{'0' * 32}.partial"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    os.utime(left, (0, 0))
    export_hessian(str(zarr_only), "parquet")
    assert not left.exists()


def test_an_export_of_another_hessian_is_overwritten(out, tmp_path):
    """The same parameters on other data."""
    other = compute(
        tmp_path / "other", lambda: zoo.supervised(zoo.tanh_net(), zoo.nn.CrossEntropyLoss(), *zoo.data(seed=5))
    )
    dest = str(tmp_path / "files")
    export_hessian(other.url, "parquet", dest)
    assert contents(dest) != contents(out / "hessian.parquet")
    export_hessian(str(out), "parquet", dest)
    assert contents(dest) == contents(out / "hessian.parquet")


def test_a_run_that_mends_leaves_an_export_alone(zarr_only):
    """Its tile is recomputed, its receipt lists no files any more: `hessian verify` says so, an export mends it."""
    url = str(zarr_only)
    export_hessian(url, "parquet")
    (zarr_only / "hessian.zarr" / "c" / "1" / "2").unlink()
    compute(zarr_only, formats=("zarr",))
    assert verify_hessian(url).faults[0].endswith("is in no receipt")
    export_hessian(url, "parquet")
    assert verify_hessian(url).ok


def test_exports_read_checked_chunks(out, tmp_path):
    chunk = out / "hessian.zarr" / "c" / "1" / "2"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    for kind, dest in [("parquet", tmp_path / "files"), ("npy", tmp_path / "H.npy")]:
        with pytest.raises(IncompleteError, match="chunk c/1/2 cannot be decoded"):
            export_hessian(str(out), kind, str(dest))
    assert not list(tmp_path.glob("H.npy*"))


def test_npy(H, tmp_path):
    dest = tmp_path / "new" / "H.npy"
    dest.parent.mkdir()
    dest.write_bytes(b"of an earlier time" * 10**4)
    assert export_hessian(H.url, "npy", f"file://{dest}") == str(dest)
    found = np.load(dest, mmap_mode="r")
    assert found.dtype == H.dtype
    np.testing.assert_array_equal(found, H.to_numpy())
    assert list(dest.parent.iterdir()) == [dest]


def test_npy_takes_little_memory(tmp_path):
    problem = zoo.supervised(zoo.nn.Linear(40, 30), zoo.nn.CrossEntropyLoss(), *zoo.data(d=40, classes=30)).problem
    H = compute_hessian(problem, str(tmp_path / "out"), executor="serial", chunk=64, verify=False)
    tracemalloc.start()
    export_hessian(H.url, "npy", str(tmp_path / "H.npy"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < H.shape[0] ** 2 * 4 / 4


def test_npy_needs_all_blocks(tmp_path):
    H = compute(tmp_path / "out", blocks="diagonal", chunk=4)
    with pytest.raises(IncompleteError, match="blocks='diagonal'; take parquet"):
        export_hessian(H.url, "npy", str(tmp_path / "H.npy"))
    assert not list(tmp_path.glob("H.npy*"))


@pytest.mark.parametrize(
    ("dest", "error", "message"),
    [
        (None, SpecError, "needs a destination"),
        ("s3://bucket/H.npy", OutputError, "written to a local disk; give a path"),
        ("memory://H.npy", OutputError, "written to a local disk; give a path"),
        ("nope://H.npy", OutputError, "written to a local disk; give a path"),
        ("out", OutputError, "is a folder"),
        ("out/manifest.json/H.npy", OutputError, "cannot be written"),
    ],
)
def test_refused_destinations(out, monkeypatch, dest, error, message):
    monkeypatch.chdir(out.parent)
    before = contents(out)
    with pytest.raises(error, match=message) as caught:
        export_hessian("out", "npy", dest)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("dest", "message"), [("out", "holds something else"), ("out/manifest.json", "cannot write"), ("nope://x", "nope")]
)
def test_refused_folders(out, monkeypatch, dest, message):
    monkeypatch.chdir(out.parent)
    before = contents(out)
    with pytest.raises(OutputError, match=message):
        export_hessian("out", "parquet", dest)
    assert contents(out) == before


def test_unknown_format_and_no_hessian(out, tmp_path):
    with pytest.raises(SpecError, match="got the format 'csv', expected 'parquet' or 'npy'"):
        export_hessian(str(out), "csv")
    with pytest.raises(OutputError, match="holds no Hessian"):
        export_hessian(str(tmp_path), "parquet")
    (out / "_SUCCESS").unlink()
    with pytest.raises(IncompleteError, match="not finished"):
        export_hessian(str(out), "parquet")
