"""A finished output of a given matrix, as a run leaves one, without a run."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from pipeline.analysis.hessian import Hessian
from pipeline.planning.manifest import Fingerprint, Manifest
from pipeline.planning.parameters import ParameterLayout
from pipeline.planning.verdict import EngineSizes, ParameterVerdict, PreflightVerdict
from pipeline.storage.chunk_formats import store_chunk
from pipeline.storage.output import SUCCESS, Output
from pipeline.storage.receipts import Receipt, receipt_name
from pipeline.storage.run_files import write_manifest
from pipeline.storage.zarr_store import MatrixStore

RAGGED = {"0.weight": (3, 7), "0.bias": (3,), "empty": (0,), "1.weight": (13, 2), "1.bias": ()}
P = 51  # of these
VERDICT = ParameterVerdict(engine="jacrev", rival=None, gradient=0.0, differences=0.0, tried={})


def manifest(shapes, chunk, dtype="float64", symmetry="upper", blocks="all", codec="lz4"):
    layout = ParameterLayout.of(shapes)
    return Manifest(
        parameters=layout.to_json(),
        fingerprint=Fingerprint(
            weights="0" * 64, data="1" * 64, samples=10, loss=0.5, weight=10.0, reduction="mean", separable=True, l2=0.0
        ),
        blocks=blocks,
        dtype="float64",
        store_dtype=dtype,
        symmetry=symmetry,
        codec=codec,
        chunk=chunk,
        tile_shape=(1, 1),
        sizes={"jacrev": EngineSizes(1, 1)},
        preflight=PreflightVerdict(1, [], dict.fromkeys(layout.names, VERDICT), 0.0, 0.0),
        versions={},
    )


RECEIPT = Receipt(
    tile="",
    run="",
    chunks=(),
    max_abs=1.0,
    norm=1.0,
    asymmetry=0.0,
    compute_seconds=1.0,
    write_seconds=0.5,
    peak_memory_bytes=1,
    attempt=1,
    host="h",
    pid=1,
    device="cpu",
    finished=2.0,
)


def store(make_chunk, shapes, url=None, chunk=16, **options):
    """Write the chunks that `make_chunk(rows, cols)` gives, of slices of the upper triangle."""
    made = manifest(shapes, chunk, **options)
    output, plan = Output.private() if url is None else Output(str(url)), made.plan
    MatrixStore.create(output, made, np.arange(plan.size, dtype=np.float64))
    matrix = MatrixStore(output, made)
    for tile in plan.tiles():
        put = []
        for i, j in plan.chunks(tile):
            rows, cols = (plan.span(range(k, k + 1)) for k in (i, j))
            values = make_chunk(slice(rows.start, rows.stop), slice(cols.start, cols.stop))
            put += store_chunk([matrix], made, i, j, values)
        receipt = replace(RECEIPT, tile=tile.id, run=made.digest, chunks=tuple(put))
        output.put(receipt_name(tile.id), receipt.to_bytes())
    write_manifest(output, made)
    output.put(SUCCESS, b"")
    return Hessian(output, made)


def stored(full, shapes=None, url=None, chunk=16, **options):
    """Store a symmetric matrix."""
    return store(lambda rows, cols: full[rows, cols], shapes or {"w": (len(full),)}, url, chunk, **options)


def symmetric(eigenvalues, seed=0):
    """Return a matrix with these eigenvalues, in a random basis."""
    w = np.asarray(eigenvalues, dtype=np.float64)
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(w), len(w))))
    full = (Q * w) @ Q.T
    return (full + full.T) / 2


class Pair(NamedTuple):
    """A handle, and the same as an array."""

    H: Hessian
    full: np.ndarray


def pair(eigenvalues=None, view=None, **options):
    """Store a matrix of `RAGGED` parameters; with a view, the handle and the matrix are of these parameters alone."""
    full = symmetric(np.linspace(-2, 5, P) if eigenvalues is None else eigenvalues)
    H = stored(full.astype(options.get("dtype", "float64")), RAGGED, **options)
    full = H.to_numpy().astype(np.float64)
    if view is None:
        return Pair(H, full)
    chosen = H.select(*view)
    kept = np.concatenate([np.arange(P)[H.parameters[name].place] for name in chosen.parameters.names])
    return Pair(chosen, full[np.ix_(kept, kept)])
