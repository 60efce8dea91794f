"""What planning costs: CPU seconds of one thread, beside the seconds that computing is predicted to take.

    python tests/benchmarks/planning.py [--label after] [--only NAME] [--results FOLDER]

Each problem is planned twice in a process of its own, for float32 in this process; the second counts, since the first
imports what torch needs. Columns of `planning.md` are labels: another tree's are kept.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ours
import torch
from torch import nn

from pipeline import Problem
from pipeline.preflight.planner import make_plan
from pipeline.runs.problem_factory import build_problem
from pipeline.spec import Settings

RESULTS = Path(__file__).parent / "results"


def job(name, *params):
    return lambda: build_problem(name, {}, ours.JOBS).select(params or None)


def deep(width, layers, inputs, classes):
    """A narrow net of many small tensors."""
    return lambda: ours.mlp(inputs, *[width] * layers, classes, samples=64)


def resnet18():
    """Four tensors of two normalisations, among 11 million parameters."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    widths = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "embedding_size": 64}
    model = ResNetForImageClassification(ResNetConfig(**widths, layer_type="basic", num_labels=4)).eval()

    def loss(model, batch):
        images, classes = batch
        return nn.functional.cross_entropy(model(images).logits, classes)

    images, classes = torch.randn(16, 3, 64, 64), torch.randint(0, 4, (16,))
    chosen = ["*embedder.embedder.normalization.*", "*stages.2.layers.0.layer.0.normalization.*"]
    return Problem(model, objective=loss, data=(images, classes), params=chosen)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "digits_mlp": job("digits.py:mlp"),
    "digits_cnn": job("digits.py:cnn"),
    "char_transformer": job("char_transformer.py:transformer"),
    "pnet": job("pnet.py:pnet"),
    "minilm": job("minilm.py:classifier", "layer.output.LayerNorm.*", "layer.output.dense.bias", "head.*"),
    "42 tensors": deep(6, 20, 6, 2),
    "resnet18, four tensors": resnet18,
    "20 layers": deep(64, 20, 64, 10),
}


def planned(name):
    """Plan a problem twice; give what the second took."""
    torch.set_num_threads(1)
    problem = PROBLEMS[name]()
    for _ in range(2):
        start, cpu = time.perf_counter(), time.process_time()
        plan = make_plan(problem, Settings(executor="serial", dtype="float32"))
        found = {
            "P": problem.layout.size,
            "tensors": len(problem.layout),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "wall_seconds": round(time.perf_counter() - start, 2),
            "computing_seconds": round(sum(plan.tile_seconds(tile) for tile in plan.tiling.tiles()), 1),
        }
    return found


def table(results):
    """A row for each problem, a column for each tree."""
    lines = ["| problem | P | tensors | computing, s | " + " | ".join(f"{label}, s" for label in results) + " |"]
    lines.append("|---" * (4 + len(results)) + "|")
    latest = list(results.values())[-1]
    for name, own in latest.items():
        seconds = [f"{each[name]['cpu_seconds']:.2g}" if name in each else "-" for each in results.values()]
        cells = [name, f"{own['P']:,}", str(own["tensors"]), f"{own['computing_seconds']:.3g}", *seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--label", default="after")
    parser.add_argument("--only", choices=PROBLEMS, action="append")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    path = chosen.results / "planning.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    own = results.setdefault(chosen.label, {})
    for name in chosen.only or PROBLEMS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
            own[name] = apart.submit(planned, name).result()
        print(name, own[name], flush=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    (chosen.results / "planning.md").write_text(table(results))


if __name__ == "__main__":
    sys.exit(main())
