"""Verification finds what is planted: wrong entries, wrong blocks, wrong bits, the wrong problem."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
import zoo
from oracle import block_error

import pipeline.results.verify
from pipeline import (
    FingerprintError,
    IncompleteError,
    Problem,
    ProblemError,
    VerificationError,
    compute_hessian,
    open_hessian,
    verify_hessian,
)
from pipeline.engines.jacrev import Jacrev
from pipeline.engines.registry import ENGINES
from pipeline.results.hessian import StoredHessian
from pipeline.results.verify import check
from pipeline.storage.run_files import write_manifest
from pipeline.storage.zarr_store import MatrixStore


def compute(path, make=zoo.mlp, **options):
    return compute_hessian(make().problem, str(path), **{"executor": "serial", "chunk": 16, **options})


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full("all once more"))])
def test_every_problem_verifies(case, dtype, tmp_path):
    compute_hessian(case.problem, str(tmp_path), executor="serial", dtype=dtype, chunk=16)
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found["ok"]
    assert found["blocks"] == len([p for p in case.problem.layout if p.size]) ** 2


def without_products(path):
    """Make the receipts those of an output from before tiles had products: what is left is the numbers' own proof."""
    for receipt in (path / "receipts").iterdir():
        receipt.write_text(json.dumps(json.loads(receipt.read_text()) | {"products": ""}))


@pytest.mark.parametrize("make", [zoo.mlp, zoo.relu_mse])
def test_rows_are_judged_by_differences_too(tmp_path, make):
    compute(tmp_path, make, engine="rows", dtype="float64")
    found = verify_hessian(str(tmp_path), make().problem)
    assert found.ok
    assert found.method == "double backward"
    assert not found.inconclusive


@pytest.mark.parametrize("symmetry", ["mirrored", "upper"])
@pytest.mark.parametrize("entry", [(0, 0), (3, 40), (55, 57), (20, 58)])
def test_one_wrong_entry(tmp_path, entry, symmetry):
    compute(tmp_path, dtype="float64", symmetry=symmetry)
    array = zarr.open_array(tmp_path / "hessian.zarr", mode="r+")
    i, j = entry
    wrong = array[i, j] + 1e-4
    array[i, j] = wrong
    if symmetry == "mirrored" or i // 16 == j // 16:
        array[j, i] = wrong
    (fault,) = verify_hessian(str(tmp_path)).faults  # chunks and checksums are right, they are not what was computed
    assert fault == f"tile r0-4_c0-4: its stored entries are not those that were computed: {fault.rpartition(': ')[2]}"
    assert fault.endswith((f"row {i} is off", f"column {j} is off"))
    without_products(tmp_path)
    assert verify_hessian(str(tmp_path)).ok
    found = verify_hessian(str(tmp_path), zoo.mlp().problem)
    assert not found.ok
    H = open_hessian(str(tmp_path))
    names = {next(H.parameters.segments(range(k, k + 1)))[0].name for k in entry}
    assert set(found.worst_block) == names


def test_broken_mirror(tmp_path):
    compute(tmp_path)
    array = zarr.open_array(tmp_path / "hessian.zarr", mode="r+")
    array[40, 3] += 1
    found = verify_hessian(str(tmp_path))
    assert found.faults == ["c/2/0 is not the mirror image of c/0/2"]


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_flipped_bit_is_found(tmp_path, codec):
    compute(tmp_path, codec=codec)
    chunk = tmp_path / "hessian.zarr" / "c" / "1" / "2"
    whole = chunk.read_bytes()
    for position in np.random.default_rng(0).integers(0, 8 * len(whole), 20):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << (position % 8)
        chunk.write_bytes(flipped)
        assert [f[:11] for f in verify_hessian(str(tmp_path)).faults] == ["chunk c/1/2"]
    for damaged in (b"", whole[: len(whole) // 2]):
        chunk.write_bytes(damaged)
        assert len(verify_hessian(str(tmp_path)).faults) == 1
    chunk.unlink()
    assert verify_hessian(str(tmp_path)).faults == ["chunk c/1/2 is missing"]


def flipped(value, bit):
    """A float32 with one bit of it flipped."""
    return (np.float32(value).view(np.uint32) ^ np.uint32(1 << bit)).view(np.float32)


@pytest.mark.parametrize("formats", [("zarr",), ("zarr", "parquet")])
@pytest.mark.parametrize("bit", [31, 30, 25, 20])
def test_a_bit_flipped_before_encoding_is_found_and_mended(tmp_path, monkeypatch, bit, formats):
    """Of an entry in a worker's memory, after it was computed and before any checksum was taken of it."""
    put = MatrixStore.write_chunk

    def write(self, i, j, values):
        if (place := {(1, 2): (3, 4), (2, 1): (4, 3)}.get((i, j))) and not (tmp_path / "mended").exists():
            values = values.copy()
            values[place] = flipped(values[place], bit)
        return put(self, i, j, values)

    monkeypatch.setattr(MatrixStore, "write_chunk", write)
    options = {"executor": "serial", "chunk": 16, "dtype": "float32", "formats": formats}
    found = r"(its stored entries are not|c/1/2 in 1 entries).*run the job with --check"
    with pytest.raises(VerificationError, match=found):
        compute_hessian(zoo.mlp().problem, str(tmp_path), **options)
    (tmp_path / "mended").touch()
    assert not (tmp_path / "_SUCCESS").exists()
    H = compute_hessian(zoo.mlp().problem, str(tmp_path), check=True, **options)
    assert verify_hessian(H, zoo.mlp().problem).ok


def test_a_failed_proof_keeps_the_matrix(tmp_path, monkeypatch):
    """Also one that is in memory only."""
    monkeypatch.setattr("pipeline.results.verify.TOLERANCE", dict.fromkeys(pipeline.results.verify.TOLERANCE, -1.0))
    for output in (None, str(tmp_path)):
        with pytest.raises(VerificationError, match=r"The matrix is kept, unproven.*unproven=True") as caught:
            compute_hessian(zoo.mlp().problem, output, executor="serial", dtype="float64")
        assert block_error(caught.value.hessian.to_numpy(), zoo.mlp().truth(), zoo.mlp().problem.layout) < 1e-12
        assert not caught.value.verification.ok
    with pytest.raises(IncompleteError, match="the proof failed"):
        open_hessian(str(tmp_path))
    assert open_hessian(str(tmp_path), unproven=True).shape == (59, 59)


def sharp(output, target):
    """A loss whose second derivatives the weights' last bits decide."""
    return (1e17 * output).sin().square().sum(), len(target)


def doubled(output, target):
    return 2 * F.cross_entropy(output, target, reduction="sum"), len(target)


def test_rounding_is_named_where_it_decides(tmp_path):
    H, problem = compute(tmp_path, dtype="float64"), zoo.mlp().problem
    found = check(H, Problem(problem.model, sharp, zoo.data()), parquet=False)
    assert not found.ok
    assert found.unsteady > 10 * found.tolerance
    assert "double backward changes by" in found.summary()
    assert "scale the data" in found.remedy
    healthy = check(H, Problem(problem.model, doubled, zoo.data()), parquet=False)
    assert not healthy.ok
    assert healthy.unsteady <= healthy.tolerance
    assert "engine=rows" in healthy.remedy


def test_a_manifest_is_not_believed(tmp_path):
    """Its total weight is what the matrix was divided by: a problem's, not its own."""
    H = compute(tmp_path, dtype="float64")
    changed = H.manifest.model_copy(
        update={"fingerprint": H.manifest.fingerprint.model_copy(update={"weight": 2 * H.manifest.fingerprint.weight})}
    )
    write_manifest(H.output, changed)
    with pytest.raises(FingerprintError, match=r"the weight is 7.0, stored 14.0"):
        verify_hessian(str(tmp_path), zoo.mlp().problem)
    found = check(StoredHessian(H.output, changed), zoo.mlp().problem, parquet=False)
    assert found.faults == ["the manifest's total weight is 14, the problem's 7"]


def test_of_a_view_the_whole_is_checked(tmp_path):
    H = compute(tmp_path)
    found = verify_hessian(H.select("0.*"), zoo.mlp().problem)
    assert found.ok
    assert found.chunks == verify_hessian(H).chunks
    chunk = tmp_path / "hessian.zarr" / "c" / "3" / "3"  # of parameters that the view has not
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert not verify_hessian(H.select("0.*")).ok


def test_directions_differ(tmp_path):
    H = compute(tmp_path)
    assert verify_hessian(H, zoo.mlp().problem).seed != verify_hessian(H, zoo.mlp().problem).seed


def one_percent(out, rows, cols, **_):
    """Wrong by 1 % in one entry of one small block."""
    if rows.start <= 24 < rows.stop and cols.stop > 58:
        out[24 - rows.start, 58 - cols.start] *= 1.01


def asymmetric(out, rows, **_):
    """Wrong by 1e-3 above the diagonal block only."""
    out[:, :] *= 1 + 1e-3 * (rows.start < 20)


def later_batches(out, batch, first, **_):
    """Wrong in all micro-batches but the first."""
    out[:, :] *= 1 + 1e-3 * (not torch.equal(batch[0][0], first))


def in_single_precision(out, rows, **_):
    out[:, :] *= 1 + 1e-2 * (out.dtype == torch.float32 and rows.start < 20)


SABOTAGE = {
    one_percent: ("float32", "float64"),
    asymmetric: ("float32", "float64"),
    later_batches: ("float32", "float64"),
    in_single_precision: ("float32",),
}


@pytest.mark.parametrize(("sabotage", "dtype"), [(s, dtype) for s, dtypes in SABOTAGE.items() for dtype in dtypes])
@pytest.mark.parametrize("behaves_in", ["nothing", "preflight"])
def test_a_wrong_engine_is_caught(tmp_path, monkeypatch, sabotage, dtype, behaves_in):
    """Preflight finds it; what it cannot see, in the finished matrix, fails the run. Both name the block."""
    first = zoo.data()[0][0].to(getattr(torch, dtype))

    class Wrong(Jacrev):
        def add(self, batch, rows, cols, out):
            part = torch.zeros_like(out)
            super().add(batch, rows, cols, part)
            if behaves_in == "nothing" or (tmp_path / "manifest.json").exists():
                sabotage(part, rows=rows, cols=cols, batch=batch, first=first)
            out += part

    monkeypatch.setitem(ENGINES, "jacrev", Wrong)
    expected = VerificationError if behaves_in == "preflight" else ProblemError
    with pytest.raises(expected, match=r"H\["):
        compute(tmp_path, engine="jacrev", dtype=dtype, microbatch=3)
    assert not (tmp_path / "_SUCCESS").exists()


class Coarse(zoo.nn.Module):
    """Half precision inside, where the run is in single precision."""

    def __init__(self):
        super().__init__()
        self.net = zoo.tanh_net()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=x.dtype == torch.float32):
            return self.net(x)


def test_low_precision_inside_a_model_is_no_excuse(tmp_path):
    case = zoo.supervised(Coarse(), zoo.nn.CrossEntropyLoss(), *zoo.data())
    with pytest.raises(ProblemError, match=r"off by .* in .*float32.*take dtype=float64"):
        compute_hessian(case.problem, str(tmp_path), executor="serial", dtype="float32")


def test_another_problem(tmp_path):
    compute(tmp_path)
    with pytest.raises(FingerprintError, match="data differ"):
        verify_hessian(
            str(tmp_path), zoo.supervised(zoo.tanh_net(), zoo.nn.CrossEntropyLoss(), *zoo.data(seed=5)).problem
        )


FACTORY = """
from pathlib import Path
import torch
from zoo import mlp
from pipeline.engines.registry import ENGINES
from pipeline.engines.jacrev import Jacrev

class Wrong(Jacrev):
    def add(self, batch, rows, cols, out):
        super().add(batch, rows, cols, out)
        if {always} or Path({manifest!r}).exists():
            out[:, -1] *= 1.01

def problem():
    ENGINES["jacrev"] = Wrong
    return mlp().problem
"""


@pytest.mark.full("a process each")
@pytest.mark.parametrize(("always", "exit_code"), [(True, 2), (False, 1)])
def test_a_wrong_engine_fails_the_command(tmp_path, always, exit_code):
    output = tmp_path / "out"
    for name in ("zoo", "oracle"):
        (tmp_path / f"{name}.py").write_text((Path(zoo.__file__).parent / f"{name}.py").read_text())
    factory = FACTORY.format(always=always, manifest=str(output / "manifest.json"))
    (tmp_path / "wrong.py").write_text(factory)
    (tmp_path / "job.yaml").write_text("problem: wrong.py:problem\nengine: jacrev\nexecutor: serial\nchunk: 16\n")
    command = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "job.yaml"), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == exit_code, done.stderr
    assert "H[" in done.stderr.splitlines()[-1]
    assert not (output / "_SUCCESS").exists()
