"""A matrix four times as large as the memory that the process is allowed: all that streams, finishes."""

import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from finished import store

ROWS, RANK = 6144, 5
SUPPORT = Path(__file__).parents[1] / "support"


def parts():
    """H = A A' + diag(d): its products are known without it."""
    A = np.random.default_rng(0).standard_normal((ROWS, RANK))
    return A, np.linspace(1, 2, ROWS)


def take_buffers(threads):
    """Have BLAS take its buffers, which it keeps: one for each thread that multiplies."""
    together, some = threading.Barrier(threads), np.eye(400)

    def multiply(_):
        together.wait()
        for _ in range(50):
            some @ some

    scipy.linalg.eigh(some)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(multiply, range(threads)))


def limited(url, scratch, allowed):
    """What the process with the limit does; run by the test as a process of its own."""
    import resource

    import dask.array  # noqa: F401
    import psutil

    from pipeline import MemoryRefusedError, open_hessian
    from pipeline.storage.read_ahead import READERS

    H, (A, d) = open_hessian(url), parts()
    take_buffers(READERS)
    V = np.random.default_rng(1).standard_normal((ROWS, 4))
    threading.stack_size(2**20)  # of readers: 8 MiB each are reserved, and counted, where nothing is said
    process = psutil.Process()
    before = process.memory_info()
    resource.setrlimit(resource.RLIMIT_DATA, (before.data + allowed,) * 2)
    found = {"product": float(np.abs(H @ V - (A @ (A.T @ V) + d[:, None] * V)).max())}
    w, U = H.eigsh(RANK, "LA")
    found["eigenvalues"] = w.tolist()
    found["residual"] = float(np.linalg.norm(A @ (A.T @ U) + d[:, None] * U - U * w))
    density = H.spectral_density(4, 12)
    found["below"] = density.count_below(3.0)
    found["trace"] = H.trace()
    x = H.solve(V)
    found["solve"] = float(np.abs(A @ (A.T @ x) + d[:, None] * x - V).max())
    found["norm"] = H.norm()
    with H.cholesky(scratch=scratch) as factor:
        found["logdet"], x = factor.logdet, factor.solve(V)
        found["variances"] = factor.inverse_diagonal().tolist()
    found["cholesky"] = float(np.abs(A @ (A.T @ x) + d[:, None] * x - V).max())
    refused = []
    directly = [lambda: H.solve(V, method="direct"), lambda: H.inverse_diagonal(method="direct")]
    for ask in (H.eigvalsh, H.eigh, H.logdet, H.to_numpy, *directly):
        try:
            ask()
        except MemoryRefusedError:
            refused.append(True)
    found["refused"] = len(refused)
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    found["peak"] = 1024 * int(peak) - before.rss
    print(json.dumps(found))


@pytest.mark.full("reads a matrix many times")
def test_under_a_limit(tmp_path):
    A, d = parts()

    def chunk(rows, cols):
        values = A[rows] @ A[cols].T
        if rows == cols:
            values += np.diag(d[rows])
        return values

    store(chunk, {"w": (ROWS,)}, tmp_path / "H", chunk=256, codec="none")
    allowed = ROWS * ROWS * 8 // 4
    code = (
        f"import test_beyond_memory as t; t.limited({str(tmp_path / 'H')!r}, {str(tmp_path / 'scratch')!r}, {allowed})"
    )
    path = f"{Path(__file__).parent}:{SUPPORT}"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path.split(':')!r}; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["product"] < 1e-9
    assert found["residual"] < 1e-4
    np.testing.assert_allclose(found["eigenvalues"], np.linalg.eigvalsh(A.T @ A) + 1.5, rtol=1e-3)
    assert abs(found["below"][0] - (ROWS - RANK)) < 4 * found["below"][1] + 1e-6
    assert found["trace"] == pytest.approx((A**2).sum() + d.sum())
    assert found["norm"] ** 2 == pytest.approx(((A.T @ A) ** 2).sum() + 2 * (d * (A**2).sum(1)).sum() + (d**2).sum())
    assert found["solve"] < 1e-5
    known = np.log(d).sum() + np.linalg.slogdet(np.eye(RANK) + A.T @ (A / d[:, None]))[1]
    assert found["logdet"] == pytest.approx(known, rel=1e-12)
    scaled = A / d[:, None]
    variances = 1 / d - np.einsum("ij,jk,ik->i", scaled, np.linalg.inv(np.eye(RANK) + A.T @ scaled), scaled)
    np.testing.assert_allclose(found["variances"], variances, rtol=1e-10)
    assert found["cholesky"] < 1e-9
    assert list((tmp_path / "scratch").iterdir()) == []
    assert found["refused"] == 6
    print(f"peak {found['peak'] / 2**20:.0f} MiB of {allowed / 2**20:.0f} allowed")
    assert found["peak"] <= allowed
