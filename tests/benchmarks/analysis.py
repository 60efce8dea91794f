"""What is done with a stored Hessian against the same by hand: products, eigenvalues at the ends, all eigenvalues.

    python tests/benchmarks/analysis.py [--repeats N]
    python tests/benchmarks/analysis.py --stored URL

A matrix with the spectrum of a trained network's Hessian - a bulk about zero, a tail above it - lies on a local disk,
upper triangle, in the system's cache. `H @ V` with 16 columns: against NumPy's product of the array in memory, and
against getting the same objects with as many threads and doing nothing with them. `eigsh(20)`, held in memory and with
a read a step, against SciPy's ARPACK on the array in memory, both to 1e-8. `eigvalsh` against calling LAPACK on an
array that was read before. One thread of BLAS each, the store's readers beside it; NumPy's product with as many
threads as cores, too. In turn; medians of each turn's ratio. Under two minutes on two cores.

`--stored`: of a finished Hessian, as that of jobs/mnist_mlp_64.yaml, the eigenvalues at both ends, an estimate of their
density, trace and norms: what they come to, seconds, and the most memory above that of the process before.

Written to `results/analysis.json`, each in its own part.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import scipy
import scipy.linalg
import scipy.sparse.linalg
from threadpoolctl import threadpool_limits

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parents[1])]

from finished import stored  # noqa: E402

from pipeline import open_hessian  # noqa: E402
from pipeline.analysis import products  # noqa: E402
from pipeline.analysis.spectrum_summary import decades  # noqa: E402
from pipeline.storage.output import MATRIX  # noqa: E402
from pipeline.storage.read_ahead import READERS  # noqa: E402
from pipeline.storage.zarr_store import chunk_key, stored_sizes  # noqa: E402

COLUMNS, K, CHUNK = 16, 20, 512


def seconds(function):
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def like_a_hessian(P, dtype):
    """Diagonal bulk and forty outliers, the largest a hundred, not orthogonal to it."""
    random = np.random.default_rng(0)
    A = random.standard_normal((P, 40)) * np.sqrt(np.logspace(-1, 2, 40) / P)
    full = A @ A.T
    full[np.diag_indices(P)] += np.exp(random.standard_normal(P) - 6) - 1e-3
    return full.astype(dtype)


def in_turn(repeats, **ways):
    """Median seconds of each way, and the median over turns of the first one's share of each other."""
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(repeats)]
    ours = next(iter(ways))
    found = {f"{name}_seconds": statistics.median(turn[name] for turn in turns) for name in ways}
    ratios = {f"{ours}_of_{name}": statistics.median(turn[ours] / turn[name] for turn in turns) for name in ways}
    return found | {name: ratio for name, ratio in ratios.items() if name != f"{ours}_of_{ours}"}


def product(folder, dtype, codec, repeats, P=8192):
    full = like_a_hessian(P, dtype)
    H = stored(full, url=f"{folder}/{dtype}-{codec}", chunk=CHUNK, dtype=dtype, codec=codec)
    V = np.random.default_rng(1).standard_normal((P, COLUMNS)).astype(dtype)
    side = H.manifest.plan.side
    names = [f"{MATRIX}/{chunk_key(i, j)}" for i in range(side) for j in range(i, side)]

    def get():
        with ThreadPoolExecutor(READERS) as pool:
            return sum(pool.map(lambda name: len(H.output.get(name)), names))

    def numpy_on_all_cores():
        with threadpool_limits(os.cpu_count()):
            return full @ V

    ways = {"ours": lambda: H @ V, "numpy": lambda: full @ V, "numpy_on_all_cores": numpy_on_all_cores, "raw_gets": get}
    found = in_turn(repeats, **ways)
    return {"what": f"H @ V, {COLUMNS} columns", "P": P, "dtype": dtype, "codec": codec, **found}


def ends(folder, repeats, P=4096):
    full = like_a_hessian(P, "float64")
    H = stored(full, url=f"{folder}/ends", chunk=CHUNK)
    known = scipy.sparse.linalg.eigsh(full, K, which="LA", tol=1e-8, return_eigenvectors=False)
    reads = []
    of_pieces = type(H).of_pieces

    def counted(self, *arguments, **options):
        reads.append(1)
        return of_pieces(self, *arguments, **options)

    def streamed():
        held, products.SHARE_HELD = products.SHARE_HELD, 0
        type(H).of_pieces = counted
        reads.clear()
        try:
            return H.eigsh(K, "LA", return_eigenvectors=False)
        finally:
            products.SHARE_HELD, type(H).of_pieces = held, of_pieces

    products_of_scipy = []
    operator = scipy.sparse.linalg.LinearOperator((P, P), lambda v: products_of_scipy.append(1) or full @ v)
    scipy.sparse.linalg.eigsh(operator, K, which="LA", tol=1e-8)
    found = in_turn(
        repeats,
        ours=lambda: H.eigsh(K, "LA"),
        streamed=streamed,
        scipy=lambda: scipy.sparse.linalg.eigsh(full, K, which="LA", tol=1e-8),
    )
    error = float(np.abs(streamed() - np.sort(known)).max() / known.max())
    counts = {"reads": len(reads), "products_of_scipy": len(products_of_scipy), "error": error}
    return {"what": f"eigsh({K})", "P": P, "dtype": "float64", **found, **counts}


def every(folder, repeats, P=2000):
    full = like_a_hessian(P, "float64")
    H = stored(full, url=f"{folder}/every", chunk=CHUNK)

    def ours():
        H.__dict__.pop("_eigenvalues", None)
        return H.eigvalsh()

    by_hand = lambda: scipy.linalg.eigvalsh(full, driver="evd", check_finite=False)
    return {"what": "eigvalsh", "P": P, "dtype": "float64", **in_turn(repeats, ours=ours, lapack=by_hand)}


def measured(function):
    """What it gives, its seconds, and the most memory it took above what there was."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, begun = psutil.Process().memory_info().rss, time.perf_counter()
    found, took = function(), time.perf_counter() - begun
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return found, {"seconds": took, "peak_bytes_above_start": 1024 * int(peak) - before}


def of_stored(url):
    """What there is to say of a large one."""
    H = open_hessian(url)
    top, top_cost = measured(lambda: H.eigsh(20, "LA", tol=1e-6, return_eigenvectors=False))
    bottom, bottom_cost = measured(lambda: H.eigsh(5, "SA", tol=1e-6, return_eigenvectors=False))
    density, density_cost = measured(lambda: H.spectral_density(8, 80))
    edges = decades(top)
    counts, errors = density.histogram(edges)
    norms, sums_cost = measured(H.block_norms)
    bins = zip(edges[:-1], edges[1:], counts, errors, strict=True)
    return {
        "what": H.manifest.problem,
        "samples": H.manifest.fingerprint.samples,
        "P": H.shape[0],
        "dtype": str(H.dtype),
        "stored_bytes": sum(stored_sizes(H.output).values()),
        "top": {"eigenvalues": top[::-1].tolist(), **top_cost},
        "bottom": {"eigenvalues": bottom.tolist(), **bottom_cost},
        "density": {
            "bins": [dict(zip(("from", "to", "count", "error"), map(float, b), strict=True)) for b in bins],
            "below_-1e-3_of_the_largest": density.count_below(-1e-3 * top[-1]),
            **density_cost,
        },
        "trace": H.trace(),
        "norm": H.norm(),
        "block_norms": {f"{a}, {b}": norm for (a, b), norm in norms.items() if a <= b},
        "sums": sums_cost,
    }


def about():
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "blas_threads": 1,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stored", metavar="URL")
    asked, results = parser.parse_args(), HERE / "results" / "analysis.json"
    repeats, kept = asked.repeats, json.loads(results.read_text())
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        if asked.stored:
            kept["stored"] = {"about": about(), **of_stored(asked.stored)}
            print(json.dumps(kept["stored"], indent=1))
        else:
            rows = [product(folder, d, c, repeats) for d in ("float32", "float64") for c in ("none", "lz4")]
            rows += [ends(folder, min(repeats, 3)), every(folder, min(repeats, 3))]
            kept |= {"about": about(), "rows": rows}
            for row in rows:
                print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    results.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
