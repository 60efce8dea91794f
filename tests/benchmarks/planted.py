"""Which planted errors the proof sees, how often right matrices are declared wrong, and what it costs.

    python tests/benchmarks/planted.py [--label after] [--times 20] [--right 50] [--large] [--results FOLDER]

Errors are of relative size 1e-3 of sqrt(|H_ii H_jj|), of the digits networks 64-8-8-10 (P = 682) and 64-32-32-10
(P = 3,466), planted into a finished output: as an engine would have left them (receipts' products are taken away), or,
for flipped bits, as memory would. Columns of `planted.md` are labels: another tree's are kept.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from jobs import digits, mnist
from pipeline import compute_hessian, verify_hessian
from pipeline.storage.chunk_formats import store_chunk
from pipeline.storage.zarr_store import MatrixStore

SIZE = 1e-3
RESULTS = Path(__file__).parent / "results"


def scale(H):
    diagonal = np.abs(np.diag(H)).astype(np.float64) ** 0.5
    return np.outer(diagonal, diagonal)


def live(H):
    """Rows with curvature of their own: constant pixels have none."""
    return np.flatnonzero(np.abs(np.diag(H)) > 1e-12 * np.abs(H).max())


def symmetric(H, i, j, by):
    H[i, j] += by
    if i != j:
        H[j, i] += by


def one_entry(H, layout, random):
    i, j = random.choice(live(H), 2)
    symmetric(H, i, j, SIZE * scale(H)[i, j] * random.choice([-1, 1]))


def row(H, layout, random):
    i = random.choice(live(H))
    H[i, :] *= 1 + SIZE
    H[:, i] = H[i, :]


def small_row(H, layout, random):
    """The row of least scale, set to zero: that of a pixel that hardly ever varies."""
    rows = live(H)
    i = rows[np.abs(np.diag(H))[rows].argmin()]
    H[i, :] = H[:, i] = 0


def block(H, layout, random):
    a, b = random.choice(len(layout), 2)
    rows, cols = (list(layout)[k].place for k in (a, b))
    H[rows, cols] *= 1 + SIZE
    H[cols, rows] = H[rows, cols].T


def pattern(H, layout, random):
    """+d, -d / -d, +d over a whole block: signs cancel."""
    a, b = (list(layout)[k].place for k in random.choice(len(layout), 2))
    rows, cols = np.arange(len(H))[a], np.arange(len(H))[b]
    signs = np.where((rows[:, None] + cols) % 2, -1.0, 1.0)
    H[a, b] += SIZE * scale(H)[a, b] * signs
    H[b, a] = H[a, b].T


def everything(H, layout, random):
    H *= 1 + SIZE


def exponent_or_sign(H, layout, random):
    """A bit of an entry as it is stored, where that changes it by more than the size that counts."""
    kind, exponent, sign = (np.uint32, 23, 31) if H.dtype == np.float32 else (np.uint64, 52, 63)
    while True:
        i, j = random.choice(live(H), 2)
        bit = kind(random.integers(exponent, sign + 1))
        flipped = (H[i, j].view(kind) ^ (kind(1) << bit)).view(H.dtype)
        if np.isfinite(flipped) and abs(float(flipped) - float(H[i, j])) > SIZE * float(scale(H)[i, j]):
            H[i, j] = H[j, i] = flipped
            return


ENGINE = [one_entry, row, small_row, block, pattern, everything]
MEMORY = [exponent_or_sign]


def write(hessian, H):
    """Put a matrix into an output, in place of what is there."""
    store, plan = MatrixStore(hessian.output, hessian.manifest), hessian.manifest.plan
    for i in range(plan.side):
        for j in range(i, plan.side):
            rows, cols = (plan.span(range(k, k + 1)) for k in (i, j))
            part = H[rows.start : rows.stop, cols.start : cols.stop]
            values = np.ascontiguousarray(np.triu(part) + np.triu(part, 1).T if i == j else part)
            store_chunk([store], hessian.manifest, i, j, values)


def forget_products(folder):
    for path in (Path(folder) / "receipts").iterdir():
        receipt = json.loads(path.read_text())
        if "products" in receipt:
            path.write_text(json.dumps(receipt | {"products": ""}))


def trial(hidden, dtype, times, right):
    problem = digits.mlp(hidden=hidden)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        H = compute_hessian(problem, folder, executor="serial", dtype=dtype, verify=False)
        seconds = {"computing": sum(r["compute_seconds"] for r in receipts(folder))}
        seconds["whole call without proof"] = time.perf_counter() - start
        values = H.to_numpy()
        start = time.perf_counter()
        alarms = [not verify_hessian(H, problem).ok for _ in range(right)]
        seconds["proof"] = (time.perf_counter() - start) / right
        for classes, forget in ((MEMORY, False), (ENGINE, True)):
            if forget:
                forget_products(folder)
            for plant in classes:
                detected = 0
                for k in range(times):
                    wrong = values.copy()
                    plant(wrong, H.parameters, np.random.default_rng(k))
                    write(H, wrong)
                    detected += not verify_hessian(H, problem).ok
                found[plant.__name__] = detected
                print(hidden, dtype, plant.__name__, detected, flush=True)
    return {"P": len(values), "dtype": dtype, "times": times, "detected": found, "right": right,
            "false alarms": sum(alarms), "seconds": seconds}  # fmt: skip


def receipts(folder):
    return [json.loads(path.read_text()) for path in (Path(folder) / "receipts").iterdir()]


def large():
    """Seconds of the proof beside those of computing, P = 50,890, 10,000 digits."""
    with tempfile.TemporaryDirectory() as folder:
        problem = mnist.mlp(hidden=64)
        H = compute_hessian(
            problem, folder, executor="serial", dtype="float32", symmetry="upper", verify=False, codec="none"
        )
        computing = sum(r["compute_seconds"] for r in receipts(folder))
        start = time.perf_counter()
        found = verify_hessian(H, problem)
        return {"P": H.shape[0], "ok": found.ok, "error": found.block_error, "tolerance": found.tolerance,
                "seconds": {"computing": computing, "proof": time.perf_counter() - start}}  # fmt: skip


def table(results):
    lines = ["| P | type | error | " + " | ".join(results) + " |", "|---" * (3 + len(results)) + "|"]
    whole = max(results.values(), key=lambda result: len(result["trials"]))["trials"]
    for shown in whole:
        for name in [*shown["detected"], "false alarms"]:
            cells = [f"{shown['P']:,}", shown["dtype"], name.replace("_", " ")]
            cells += [cell(result["trials"], shown, name) for result in results.values()]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(trials, shown, name):
    """What one tree made of one kind of error."""
    for trial in trials:
        if (trial["P"], trial["dtype"]) == (shown["P"], shown["dtype"]):
            if name == "false alarms":
                return f"{trial['false alarms']} of {trial['right']}" if trial["right"] else "-"
            return f"{trial['detected'][name]} of {trial['times']}" if name in trial["detected"] else "-"
    return "-"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--label", default="after")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--right", type=int, default=50)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    path = chosen.results / "planted.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    own = results.get(chosen.label, {})
    if chosen.large:
        own["large"] = large()
    else:
        types = [(hidden, dtype) for hidden in (8, 32) for dtype in ("float32", "float64")]
        own["trials"] = [trial(*case, chosen.times, math.ceil(chosen.right)) for case in types]
    own["threads"] = torch.get_num_threads()
    results[chosen.label] = own
    path.write_text(json.dumps(results, indent=1))
    if all("trials" in result for result in results.values()):
        (chosen.results / "planted.md").write_text(table(results))


if __name__ == "__main__":
    main()
