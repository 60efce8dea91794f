"""A finished Hessian in another format: Parquet files, or one `.npy` file."""

import os
import time
import uuid
from pathlib import Path
from typing import Literal

import fsspec
import numpy as np

from pipeline.errors import IncompleteError, OutputError, SpecError
from pipeline.planning.tiling import require_room_in_lists
from pipeline.progress import Reporter
from pipeline.results.hessian import StoredHessian
from pipeline.storage.chunk_formats import store_chunk
from pipeline.storage.filesystems import endpoint_for
from pipeline.storage.output import PARQUET, Output
from pipeline.storage.parquet_store import ParquetFiles, file_key
from pipeline.storage.receipts import record_files

REMEDY = "make room"


def export_hessian(
    url: str,
    format: Literal["parquet", "npy"],  # noqa: A002 (the setting `formats` has the word too)
    dest: str | None = None,
    *,
    endpoint_url: str | None = None,
    report: Reporter | None = None,
) -> str:
    """Write a finished Hessian in another format; the Zarr array stays as it is.

    Parquet files are those that a run with `formats=("zarr", "parquet")` writes. Files that are what would be written
    are left as they are, so an export that was cut off can be run again. A `.npy` file holds the whole matrix, also
    where only the upper triangle is stored; `np.load(dest, mmap_mode="r")` reads parts of it.

    Args:
        url: the output of a run, a path or an fsspec URL.
        format: `"parquet"` or `"npy"`.
        dest: an empty folder or an earlier export for Parquet, a path or an fsspec URL; `hessian.parquet` in the output
            when None. A local file for `.npy`; one that is there is replaced at the end.
        endpoint_url: of the output's server, where it is not the cloud's own; the destination's too, in the same cloud.
        report: told about progress.

    Returns:
        Where it is.

    Raises:
        SpecError: the format is not known, or needs a destination; chunks are too large for Parquet.
        OutputError: there is no Hessian; or the destination cannot be written, has no room or holds something else.
        IncompleteError: the run is not finished, a chunk is damaged, or not all blocks were computed for a `.npy` file.
    """
    report = report or Reporter()
    if format == "parquet":
        return _to_parquet(StoredHessian.open(url, endpoint_url), dest, endpoint_url, report)
    if format == "npy":
        return _to_npy(StoredHessian.open(url, endpoint_url), dest, report)
    raise SpecError(f"export: got the format {format!r}, expected 'parquet' or 'npy'")


def _to_parquet(hessian: StoredHessian, dest: str | None, endpoint_url: str | None, report: Reporter) -> str:
    """Write chunk by chunk; receipts list the files that lie in the output itself."""
    manifest, own = hessian.manifest, f"{hessian.url}/{PARQUET}"
    require_room_in_lists(manifest.chunk, manifest.layout.size)
    target = Output(own, endpoint_url) if dest is None else Output(dest, endpoint_for(dest, own, endpoint_url))
    tiles, begun = manifest.plan.tiles(), time.time()
    target.check_writable()
    there = target.sizes()
    foreign = there.keys() - {file_key(*place) for tile in tiles for place in manifest.places(tile)}
    if foreign:
        raise OutputError(f"export {target.url}: holds something else ({min(foreign)}); take an empty place")
    target.check_room(manifest.matrix_bytes - sum(there.values()), REMEDY)
    files, read = [ParquetFiles(target, manifest, folder="", keep=there)], hessian.store.read_chunk
    with report.tiles(len(tiles), 0):
        for tile in tiles:
            chunks = manifest.plan.chunks(tile)
            written = [f for i, j in chunks for f in store_chunk(files, manifest, i, j, read(i, j))]
            if target.url == own:
                record_files(hessian.output, manifest, tile, written)
            report.advance(sum(file.bytes for file in written))
    # What killed ones left, of receipts too; another may be at work.
    (hessian.output if target.url == own else target).tidy(begun)
    return target.url


def _to_npy(hessian: StoredHessian, dest: str | None, report: Reporter) -> str:
    """Write band by band into a partial file of full size, which takes the destination's name at the end."""
    path, P = _local_file(dest), hessian.shape[0]
    if not hessian.manifest.plan.covers(range(P), range(P)):
        raise IncompleteError(
            f"export {path}: a .npy file holds all of H, but the run selected blocks={hessian.manifest.blocks!r}; "
            "take parquet"
        )
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # of its own, should two exports write there
    Output(str(path.parent)).check_room(P * P * hessian.dtype.itemsize, REMEDY)
    side = hessian.manifest.plan.side
    try:
        _allocate(partial, hessian)
        with report.tiles(side, 0, "bands"):
            for i in range(side):
                report.advance(_fill(partial, hessian, i))
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(f"export {path}: cannot be written ({error.strerror or error})") from error
    finally:
        if partial.exists():
            partial.unlink()
    return str(path)


def _local_file(dest: str | None) -> Path:
    """Find the file to write."""
    if dest is None:
        raise SpecError("export: a .npy file needs a destination, such as hessian.npy")
    if fsspec.utils.get_protocol(dest) not in {"file", "local"}:
        raise OutputError(f"export {dest}: a .npy file is written to a local disk; give a path, or take parquet")
    path = Path(Output(dest).url)
    if path.is_dir():
        raise OutputError(f"export {path}: is a folder; give the name of a file in it")
    return path


def _allocate(partial: Path, hessian: StoredHessian) -> None:
    """Make the file in its full size, or fail: written through a map, a disk that fills up would kill the process."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(partial, mode="w+", dtype=hessian.dtype, shape=hessian.shape)
    with partial.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)


def _fill(partial: Path, hessian: StoredHessian, i: int) -> int:
    """Write a row of chunks, and give its bytes; the file is mapped anew, so that no more than these stay resident."""
    matrix, plan, store = np.lib.format.open_memmap(partial, mode="r+"), hessian.manifest.plan, hessian.store
    rows = plan.span(range(i, i + 1))
    band = matrix[rows.start : rows.stop]
    for j in range(plan.side):
        cols = plan.span(range(j, j + 1))
        band[:, cols.start : cols.stop] = store.read_chunk(i, j) if i <= j else store.read_chunk(j, i).T
    return band.nbytes
