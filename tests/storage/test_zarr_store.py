"""The contract of a store, on local disk and in memory; and what other readers make of it."""

import json
import resource
from itertools import product

import dask.array
import numpy as np
import pytest
import tensorstore
import xarray
import zarr
import zoo
from zarr.storage import MemoryStore

from pipeline import BlockError, IncompleteError, OutputError, compute_hessian, open_hessian
from pipeline.storage.chunk_codec import ChunkCodec, zarr_codecs
from pipeline.storage.output import MATRIX, Output
from pipeline.storage.zarr_store import chunk_key


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "out")
    else:
        yield "memory://contract"
        Output("memory://contract").remove()


def compute(url, **options):
    return compute_hessian(
        zoo.mlp().problem, url, executor="serial", dtype="float64", **{"chunk": 16, "verify": False, **options}
    )


def test_objects_are_put_whole_and_listed(url):
    output = Output(url)
    assert output.get("a/b") is None
    assert output.sizes() == {}
    output.put("a/b", b"1234")
    output.put("a/b", b"12345")
    output.put("c", b"")
    assert output.get("a/b") == b"12345"
    assert output.sizes() == {"a/b": 5, "c": 0}
    assert output.sizes("a") == {"b": 5}
    output.remove()
    assert output.sizes() == {}


def test_leftovers_of_a_killed_writer_are_ignored(tmp_path):
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "r0-1_c0-1.json.123.partial").write_text("{")
    assert Output(str(tmp_path)).sizes() == {}


def test_unknown_protocol():
    with pytest.raises(OutputError, match="nope"):
        Output("nope://x")


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_both_symmetries_and_all_codecs_read_the_same(url, symmetry, codec):
    H = compute(url, symmetry=symmetry, codec=codec)
    truth = zoo.mlp().truth()
    np.testing.assert_allclose(H.to_numpy(), truth, atol=1e-13)
    assert (H.to_numpy() == H.to_numpy().T).all()
    again = open_hessian(url)
    assert again.shape == H.shape == truth.shape
    np.testing.assert_array_equal(again[:, :], H.to_numpy())


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
def test_indexing_is_orthogonal(url, symmetry):
    H = compute(url, symmetry=symmetry)
    full, P = H.to_numpy(), H.shape[0]
    picked = np.array([40, 3, 3, -1])
    flags = np.arange(P) % 7 == 0
    np.testing.assert_array_equal(H[3:50:2, ::-1], full[3:50:2, ::-1])
    np.testing.assert_array_equal(H[picked, 5:9], full[picked, 5:9])
    np.testing.assert_array_equal(H[picked, flags], full[np.ix_(picked, np.flatnonzero(flags))])
    np.testing.assert_array_equal(H[7, :], full[7])
    np.testing.assert_array_equal(H[:, -2], full[:, -2])
    assert H[50, 2] == full[50, 2]
    assert H[[], :].shape == (0, P)


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
def test_blocks_and_products(url, symmetry):
    H = compute(url, symmetry=symmetry)
    full = H.to_numpy()
    a, b = H.parameters["4.weight"], H.parameters["0.bias"]
    block = H["4.weight", "0.bias"]
    assert block.shape == a.shape + b.shape == (3, 4, 4)
    np.testing.assert_array_equal(block.reshape(12, 4), full[a.offset : a.offset + 12, b.offset : b.offset + 4])
    np.testing.assert_array_equal(H.to_dict()["4.weight"]["0.bias"].numpy(), block)
    v = np.random.default_rng(0).standard_normal((H.shape[0], 2))
    np.testing.assert_allclose(H @ v, full @ v, atol=1e-14)
    np.testing.assert_allclose(H @ v[:, 0].astype(np.float32), full @ v[:, 0].astype(np.float32), atol=1e-14)


def test_gradient_and_loss(url):
    import torch

    problem = zoo.ridge().problem
    H = compute_hessian(problem, url, executor="serial", verify=False)
    model, (x, y) = problem.model.double(), problem.batches[0]
    theta = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(x.double()), y) + 0.15 * sum((p**2).sum() for p in theta)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, theta)])
    assert H.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    np.testing.assert_allclose(H.gradient, gradient.numpy(), atol=1e-14)


def test_wrong_requests_are_refused(url):
    H = compute(url)
    for key in ["0.wieght", (0, 0, 0), (0, 10**6), (1.5, 0), (np.zeros(3, bool), 0), ("0.weight", "0.wieght")]:
        with pytest.raises(BlockError):
            H[key]
    with pytest.raises(BlockError, match="expected"):
        H @ np.ones(3)


@pytest.mark.parametrize("blocks", ["diagonal", [("0.bias", "4.weight"), ("2.bias", "2.bias")]])
def test_what_was_not_selected_is_refused(url, blocks):
    H = compute(url, blocks=blocks, chunk=4, verify=True)
    truth = zoo.mlp().truth()
    pairs = [(n, n) for n in H.parameters.names] if blocks == "diagonal" else [*blocks, ("4.weight", "0.bias")]
    for a, b in pairs:
        p, q = H.parameters[a], H.parameters[b]
        expected = truth[p.span.start : p.span.stop, q.span.start : q.span.stop]
        np.testing.assert_allclose(H[a, b].reshape(expected.shape), expected, atol=1e-13)
    with pytest.raises(IncompleteError, match="not in"):
        H["0.weight", "2.weight"]


def with_tensorstore(out):
    store = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{out}/hessian.zarr/"}).result()
    assert store.domain.labels == ("row", "col")
    return store.read().result(), None


def with_xarray(out):
    with xarray.open_zarr(out) as opened:
        matrix = opened["hessian.zarr"]
        assert matrix.dims == ("row", "col")
        np.testing.assert_array_equal(matrix.sel(row=3).values, matrix.values[3])
        np.testing.assert_array_equal(opened["gradient.zarr"].values, open_hessian(str(out)).gradient)
        return matrix.values, matrix.attrs


def with_zarr(out):
    array = zarr.open_array(out / "hessian.zarr", mode="r")
    return array[:], dict(array.attrs)


def with_dask(out):
    array = dask.array.from_zarr(str(out / "hessian.zarr"))
    assert array.chunksize == (16, 16)
    return array.compute(), None


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
@pytest.mark.parametrize("read", [with_tensorstore, with_xarray, with_zarr, with_dask])
def test_other_readers_agree(tmp_path, read, symmetry):
    """Every entry; with symmetry=upper those below the diagonal's chunks are NaN."""
    H = compute(str(tmp_path), symmetry=symmetry)
    found, attributes = read(tmp_path)
    chunks = np.arange(H.shape[0]) // 16
    stored = (chunks[:, None] <= chunks) | (symmetry == "mirrored")
    np.testing.assert_array_equal(found, np.where(stored, H.to_numpy(), np.nan))
    assert attributes in (None, {"parameters": H.parameters.to_json(), "loss": H.loss, "symmetry": symmetry})


def test_checksums_come_last(tmp_path):
    compute(str(tmp_path))
    assert json.loads((tmp_path / "hessian.zarr" / "zarr.json").read_text())["codecs"][-1]["name"] == "crc32c"


def test_one_put_per_chunk_and_no_get(monkeypatch, tmp_path):
    """A ragged grid, mirrored: metadata apart, every object is written once and none is read."""
    puts, gets = [], []
    put, get = Output.put, Output.get

    def counted_put(self, name, *parts, **options):
        if self.url == str(tmp_path):  # planning times a chunk elsewhere
            puts.append(name)
        put(self, name, *parts, **options)

    def counted_get(self, name, *bounds):
        gets.append(name)
        return get(self, name, *bounds)

    monkeypatch.setattr(Output, "put", counted_put)
    monkeypatch.setattr(Output, "get", counted_get)
    H = compute(str(tmp_path))
    side = H.manifest.plan.side
    assert H.shape[0] % 16
    chunks = sorted(f"{MATRIX}/{chunk_key(i, j)}" for i in range(side) for j in range(side))
    assert sorted(name for name in puts if name.startswith(MATRIX)) == chunks
    assert not [name for name in gets if name.startswith(f"{MATRIX}/c/")]
    assert sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / MATRIX / "c").rglob("*/*")) == chunks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["none", "lz4", "zstd"])
def test_bytes_are_zarrs_own(name, dtype):
    """Of whole chunks and of ragged ones, entry for entry and byte for byte."""
    values, chunk = np.random.default_rng(0).standard_normal((150, 150)).clip(0).astype(dtype), 64
    store = MemoryStore()
    array = zarr.create_array(
        store, shape=(150, 150), chunks=(chunk, chunk), dtype=dtype, compressors=zarr_codecs(name), fill_value=np.nan
    )
    array[:] = values
    codec = ChunkCodec(name, chunk, dtype)
    for i, j in product(range(3), repeat=2):
        entries = values[i * chunk : (i + 1) * chunk, j * chunk : (j + 1) * chunk]
        data = b"".join(codec.encode(entries))
        assert data == store._store_dict[chunk_key(i, j)].to_bytes()
        for room in (None, np.zeros((chunk, chunk), dtype)):
            found = codec.decode(data, room)
            np.testing.assert_array_equal(found[: entries.shape[0], : entries.shape[1]], entries)
            assert room is None or name == "none" or np.shares_memory(found, room)


def test_foreign_bytes_are_refused():
    """Checksums of their own are right."""
    data = b"".join(ChunkCodec("lz4", 16, "float64").encode(np.ones((16, 16))))
    for other in (ChunkCodec("lz4", 8, "float64"), ChunkCodec("none", 16, "float64")):
        with pytest.raises(ValueError, match=r"reshape|multiple"):
            other.decode(data)
    with pytest.raises(ValueError, match="error"):
        ChunkCodec("zstd", 16, "float64").decode(b"".join(ChunkCodec("none", 16, "float64").encode(np.ones((16, 16)))))
    for cut in (data[:-1], data[:3], b""):
        with pytest.raises(ValueError, match=r"checksum|error"):
            ChunkCodec("lz4", 16, "float64").decode(cut)


def test_a_full_disk_leaves_no_empty_object(tmp_path):
    """An empty lease would tell that somebody was at work."""
    output, (soft, hard) = Output(str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write lease/1\.json"):
            output.create("lease/1.json", b"a word")
        with pytest.raises(OutputError, match=r"cannot write manifest\.json"):
            output.put("manifest.json", b"a word", lasting=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not output.sizes()
    output.put("manifest.json", b"a ", b"word", lasting=True)
    assert output.get("manifest.json") == b"a word"
