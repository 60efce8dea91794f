"""On a GPU: is every engine right, and how fast is the whole Hessian? Needs torch and NumPy alone.

    python tests/benchmarks/gpu.py [--device cuda|cpu] [--small] [--only PART ...] [--results FILE]

`engines`: each engine on any cut against plain double backward. `peers`: seconds of the whole matrix, beside those of
other ways. `headline`: the upper triangle of a network of 101,770 parameters on MNIST, band by band, checked by H v.
`zoo`: every ingredient of `tests/hazards/`, right or refused. `--small` runs all of it on a CPU in a minute. Exits
with 1 where a result is wrong. TF32 is off, but in the engine that is made for it.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_speed import headline, peers
from torch import nn
from triangle import SAME, attempt, chosen_engines, classifier, hessian, in_words, kernels, mlp, quietly, synchronize

from pipeline import ProblemError
from pipeline.engines.registry import ENGINES
from pipeline.planning.engine_traits import TRAITS
from pipeline.problem.contexts import unchanged

DIFFERENCES, COARSE = 1e-6, 1e-5  # against differences; where a part of a loss is rounded to less than float64
STRIDE = 20  # of the ingredients that are tried first, or alone where all is small
JUDGES = 8  # processes that derive the truth of the zoo, on the CPU


def conv_net():
    torch.manual_seed(0)
    body = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh(), nn.Flatten()
    return classifier(nn.Sequential(*body, nn.Linear(16, 3)), torch.randn(11, 1, 8, 8), 3)


def norm_net():
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
    return classifier(nn.Sequential(*layers), torch.randn(11, 6), 3)


NETS = {"mlp": lambda: mlp(6, 9, 7, 4, samples=11), "convolutions": conv_net, "layer norm": norm_net}


def engines(device, _):
    """Every engine on cuts that keep to no border of parameters, units or the diagonal."""
    from oracle import dense_hessian

    rows, wrong = [], []
    for net, make in NETS.items():
        problem = make()
        P = problem.layout.size
        known = dense_hessian(problem.model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), problem.batches[0])
        cuts = [(range(P), range(P), None), (range(3, 2 * P // 3), range(P // 4, P - 1), 4), (range(P), range(5), 1)]
        for name in ("factored", "factored_tf32x3", "jacrev", "rows"):
            for kind in ("float64", "float32"):
                placed = problem.place(getattr(torch, kind), device)
                with kernels(problem.model):
                    found = [cut_error(placed, name, known, *cut) for cut in cuts]
                error, refused = max(e for e, _ in found), sorted(set().union(*(r for _, r in found)))
                rows.append({"net": net, "engine": name, "type": kind, "block_error": error, "refused": refused})
                if error > SAME[kind] or (refused and (not TRAITS[name].by_units or net == "mlp")):
                    wrong.append(f"{net}: {name} in {kind} is off by {error:.1e}, refuses {refused}")
                print(*rows[-1].values(), flush=True)
    return {"cases": rows}, wrong


def cut_error(placed, name, known, rows, cols, microbatch):
    """The block error of a rectangle, and the parameters that the engine says it does not take."""
    from oracle import block_error

    engine, refused, whole = ENGINES[name](placed, 7), set(), known.copy()
    for p, segment in placed.layout.segments(rows):
        out = torch.zeros(len(segment), len(cols), dtype=placed.dtype, device=placed.device)
        try:
            for batch in placed.batches(microbatch):
                engine.add(batch, segment, cols, out)
        except NotImplementedError:
            refused.add(p.name)
            continue
        place = slice(segment.start, segment.stop), slice(cols.start, cols.stop)
        whole[place] = (out.double() / placed.problem.sample_count).cpu().numpy()
    return quietly(block_error, whole, known, placed.layout), refused


def known_truth(name):
    """The judge's word on an ingredient, by differences, in plain torch on the CPU."""
    from derive import truth
    from hazards import HAZARDS

    warnings.simplefilter("ignore")
    return quietly(truth, HAZARDS[name]())


@contextmanager
def truths(names, processes):
    """The judge's words, in order; derived in other processes, if so wished, while the device works."""
    if processes == 1:
        yield map(known_truth, names)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield pool.map(known_truth, names)


def verdict(name, known, device):
    """Right, wrong, refused or skipped, and why; by micro-batches, whose last is smaller where there are seven."""
    from hazards import HAZARDS

    try:
        problem = HAZARDS[name]().problem
        chosen = chosen_engines(problem, torch.float64, device)
        with unchanged(problem.model), kernels(problem.model):
            found = hessian(problem.place(torch.float64, device), chosen, 1024, 3).cpu().numpy()
    except ProblemError as refusal:
        return "refused", f"{known.kind}: {' '.join(str(refusal).split())[:200]}"
    except ImportError as missing:
        return "skipped", str(missing)
    except Exception as error:
        return "wrong", f"raised {in_words(error)}"
    return judged(found, known)


def judged(found, known):
    """Hold a matrix against differences, and against plain double backward, where they can be trusted."""
    from oracle import block_error

    errors = {}
    if known.differences is not None:
        errors["differences"] = known.error(found), DIFFERENCES
    elif known.kind not in {"kinked", "inconclusive"}:
        return "wrong", f"a matrix where {known.reason}"
    if known.kind != "uncomputable":
        limit = COARSE if known.kind == "inconclusive" else SAME["float64"]
        errors["double backward"] = block_error(found, known.autograd, known.layout), limit
    is_right = all(error < limit for error, limit in errors.values())
    return "right" if is_right else "wrong", f"block errors and limits: {errors}"


def zoo(device, small):
    """Every ingredient, in float64; what is refused is told with whether it could be computed."""
    from hazards import HAZARDS

    # Some of each kind first: a run may be cut off, and what was printed by then stays.
    names = [name for k in range(1 if small else STRIDE) for name in list(HAZARDS)[k::STRIDE]]
    found = {}
    with truths(names, 1 if small else min(JUDGES, os.cpu_count() or 1)) as known_ones:
        for name, known in zip(names, known_ones, strict=True):
            found[name] = quietly(verdict, name, known, device)
            print(name, *found[name], sep=": ", flush=True)
            try:
                synchronize(device)
            except RuntimeError as error:  # an assertion on the device: it takes no more work from this process
                found[name] = "wrong", f"left the device unusable: {in_words(error)}"
                break
    counts = dict(Counter(kind for kind, _ in found.values()))
    print(f"{counts} of {len(names)}", flush=True)
    told = {kind: {n: why for n, (k, why) in found.items() if k == kind} for kind in ("refused", "skipped", "wrong")}
    return {"counts": counts} | told, [f"{name}: {why}" for name, why in told["wrong"].items()]


# The zoo is last: an ingredient that trips an assertion on the device leaves none for what follows.
PARTS = {"engines": engines, "peers": peers, "headline": headline, "zoo": zoo}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device(options.device)
    results, failures = {"environment": environment(device, options.small)}, []
    for name in options.only:
        wrong, start = [], time.perf_counter()
        outcome = attempt(wrong, name, PARTS[name], device, options.small)
        part, found = outcome if isinstance(outcome, tuple) else (outcome, [])
        results[name] = {"seconds": time.perf_counter() - start, "faults": wrong + found} | part
        failures += [f"{name}: {what}" for what in wrong + found]
        options.results.write_text(json.dumps(results, indent=1) + "\n")  # by now: a run may be cut off
        print(f"{name}: {len(wrong + found)} faults in {results[name]['seconds']:.1f} s", flush=True)
    sys.exit("WRONG\n" + "\n".join(failures) if failures else 0)


def environment(device, small):
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "small": small,
    }


if __name__ == "__main__":
    main()
