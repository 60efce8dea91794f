"""The whole pipeline on a device, timed by phase, beside the CPU's numbers.

    python tests/benchmarks/gpu_pipeline.py NAME [--device cuda|cpu|pretended] [--small] [--dtype ...] [--engine ...]
                                            [--ray] [--only-timed]

NAME is `digits`, `transformer` or `mnist` (784-128-10, 10,000 images). Serial executor, or one Ray actor that has the
GPU; Zarr on the local disk; proof.
Prints one line of JSON; exits with 1 where the proof fails, or entries differ from the CPU's by more than rounding.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
import warnings

import numpy as np
import torch
from bare import ROOT

from pipeline import compute_hessian, verify_hessian
from pipeline.runs.problem_factory import build_problem
from pipeline.storage.receipts import read_receipt

SAME = {"float64": 1e-12, "float32": 1e-4}  # of the largest entry
CASES = {  # the factory, its arguments, those at small sizes
    "digits": ("digits.py:mlp", {"hidden": 32}, {"hidden": 4}),
    "transformer": ("char_transformer.py:transformer", {}, {"samples": 6, "context": 4, "width": 4, "layers": 1}),
    "mnist": ("mnist.py:mlp", {"samples": 10_000}, {"samples": 100, "hidden": 2, "steps": 5}),
}


def run(problem, folder, **settings):
    """The matrix's handle, and seconds by phase."""
    start = time.perf_counter()
    H = compute_hessian(problem, folder, verify=False, codec="lz4", **settings)
    ended = time.perf_counter()
    receipts = [read_receipt(H.output, H.manifest, tile) for tile in H.manifest.plan.tiles()]
    computing, writing = (sum(getattr(r, f"{kind}_seconds") for r in receipts) for kind in ("compute", "write"))
    verified = verify_hessian(H, problem)
    return (
        H,
        verified,
        {
            "all": time.perf_counter() - start,
            "planning and ends": ended - start - computing,  # and the writing that no computing hid
            "computing": computing,
            "copying, encoding and putting, on other threads": writing,
            "proof": time.perf_counter() - ended,
            "tiles": len(receipts),
        },
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "pretended"))
    parser.add_argument("--dtype", default="float32", choices=SAME)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only-timed", action="store_true", help="the CPU does not compute it too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    factory, arguments, fewer = CASES[options.name]
    problem = build_problem(factory, arguments | (fewer if options.small else {}), ROOT / "jobs")
    around = contextlib.nullcontext()
    if options.device == "pretended":
        from pretended_cuda import pretended_cuda

        around = pretended_cuda()
    with tempfile.TemporaryDirectory() as folder:
        with around:
            device = "cpu" if options.device == "cpu" else "cuda"
            where = {"executor": "serial", "device": device}
            if options.ray:
                where = {"executor": "ray", "workers": 1, "device": device, "gpus_per_worker": float(device == "cuda")}
            common = {"dtype": options.dtype, "engine": options.engine}
            H, verified, seconds = run(problem, f"{folder}/device", **common, **where)
            card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        line = {"problem": options.name, "P": H.shape[0], "dtype": options.dtype, "card": card, "seconds": seconds}
        line |= {"proof": verified.summary(), "engines": sorted(set(H.manifest.engines.values()))}
        gap = 0.0
        if not options.only_timed:
            known = run(problem, f"{folder}/cpu", dtype=options.dtype, executor="serial")[0].to_numpy()
            gap = float(np.abs(H.to_numpy() - known).max() / np.abs(known).max())
            line |= {"gap to the CPU's, of the largest entry": gap}
    print(json.dumps(line), flush=True)
    sys.exit(0 if verified.ok and gap <= SAME[options.dtype] else 1)


if __name__ == "__main__":
    main()
