"""Right, wrong or refused: this package and its peers on every ingredient of `tests/hazards/`.

    python tests/benchmarks/verdicts.py [--device cuda] [--only REGEX] [--results FOLDER]

Judged by `derive.truth`. Peers get the same model in float64, the loss in plain torch through functional_call, and the
kernels that have a double backward. A matrix where there is none to be had counts as wrong.
"""

import argparse
import contextlib
import io
import json
import platform
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from derive import TOLERANCE, truth
from evaluate import copied
from hazards import HAZARDS, like
from oracle import block_error, double

from pipeline import ProblemError, compute_hessian

COARSE = 1e-5  # where only double backward is there to compare with
RESULTS = Path(__file__).parent / "results"


class NotApplicableError(Exception):
    """The peer takes no problem of this form."""


class Whole(nn.Module):
    """The loss over all data as a module, for functional_call."""

    def __init__(self, model, whole_loss):
        super().__init__()
        self.model, self.whole_loss = model, whole_loss

    def forward(self, batch):
        return self.whole_loss(self.model, batch)


def ours(hazard, device):
    options = {"gpus_per_worker": 1} if device == "cuda" else {}
    return compute_hessian(hazard.problem, executor="serial", dtype="float64", **options).to_numpy()


def placed(hazard, device):
    move = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t
    return copied(hazard.model).to(device), tree_map(move, double(hazard.whole_batch))


def by_transform(transform):
    """A Hessian in nested dicts by a transform of torch.func, as one matrix."""

    def compute(hazard, device):
        model, batch = placed(hazard, device)
        whole = Whole(model, hazard.whole_loss)
        theta = {n: p.detach() for n, p in whole.named_parameters() if p.requires_grad}
        with sdpa_kernel(SDPBackend.MATH):
            blocks = transform(lambda values: functional_call(whole, values, (batch,)))(theta)
        rows = [torch.cat([blocks[a][b].reshape(theta[a].numel(), -1) for b in theta], 1) for a in theta]
        return torch.cat(rows).detach().cpu().numpy()

    return compute


def curvlinops(hazard, device):
    from curvlinops import HessianLinearOperator

    loss = hazard.arguments.get("loss")
    if not isinstance(loss, nn.Module) or getattr(loss, "reduction", None) not in {"mean", "sum"}:
        raise NotApplicableError
    if isinstance(hazard.whole_batch[0], tuple | dict) or "l2" in hazard.arguments:
        raise NotApplicableError
    model, (x, y) = placed(hazard, device)
    theta = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        operator = HessianLinearOperator(model, like(loss, x.new_zeros((), dtype=torch.float64)), theta, [(x, y)])
        identity = torch.eye(operator.shape[1], dtype=torch.float64, device=device)
        return (operator @ identity).detach().cpu().numpy()


METHODS = {
    "ours": ours,
    "torch.func.hessian": by_transform(hessian),
    "jacrev(jacrev)": by_transform(lambda f: jacrev(jacrev(f))),
    "curvlinops": curvlinops,
}


def verdict(compute, make, known, device):
    """A method's verdict on an ingredient of its own making: one method's leavings are not another's."""
    torch.manual_seed(0)
    try:
        found = np.asarray(compute(make(), device), dtype=np.float64)
    except NotApplicableError:
        return "not applicable"
    except Exception as error:
        return f"{'refused' if isinstance(error, ProblemError) else 'raised'} ({type(error).__name__})"
    truth_at_hand = known.autograd if known.differences is None else known.differences
    if truth_at_hand is not None and found.shape != truth_at_hand.shape:
        return "not applicable"  # it knows of no parameters that are chosen by name
    if known.differences is not None:
        error, limit = known.error(found), TOLERANCE
    elif known.kind in {"inconclusive", "kinked"} and known.autograd is not None:
        error, limit = block_error(found, known.autograd, known.layout), COARSE
    else:
        return "WRONG (n/a)"
    return f"{'right' if error < limit else 'WRONG'} ({error:.0e})"


def judge(name, device):
    make = HAZARDS[name]
    with contextlib.redirect_stdout(io.StringIO()):
        known = truth(make())
        verdicts = {method: verdict(compute, make, known, device) for method, compute in METHODS.items()}
    return {"ingredient": name, "truth": known.kind, "reason": " ".join(known.reason.split())[:200], **verdicts}


def totals(rows):
    return {method: dict(Counter(row[method].split(" (")[0] for row in rows)) for method in METHODS}


def table(rows, environment):
    line = lambda cells: "| " + " | ".join(cells) + " |"
    head = ["ingredient", *METHODS]
    counts = [
        line([kind, *(str(count.get(kind, 0)) for count in totals(rows).values())])
        for kind in ("right", "WRONG", "refused", "raised", "not applicable")
    ]
    return "\n".join(
        [
            f"# Verdicts on {len(rows)} ingredients",
            "",
            f"By tests/benchmarks/verdicts.py, float64, on {environment}. In brackets: block error against",
            "differences, or the exception. WRONG (n/a): a matrix where the loss has none that double backward gives.",
            "",
            line(head),
            line(["---"] * len(head)),
            *(line([row[key].replace("|", "/") for key in head]) for row in rows),
            *counts,
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    processor = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    environment = f"torch {torch.__version__}, {options.device} ({processor})"
    rows = []
    for name in HAZARDS:
        if re.search(options.only, name):
            rows.append(judge(name, options.device))
            print(*rows[-1].values(), sep=" | ", flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "verdicts.md").write_text(table(rows, environment))
    found = {"environment": environment, "totals": totals(rows), "rows": rows}
    (options.results / "verdicts.json").write_text(json.dumps(found, indent=1) + "\n")
    if wrong := [row["ingredient"] for row in rows if row["ours"].startswith(("WRONG", "raised"))]:
        sys.exit(f"ours is neither right nor refused on {wrong}")


if __name__ == "__main__":
    main()
