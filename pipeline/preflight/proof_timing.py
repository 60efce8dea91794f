"""How long the proof is going to take: the products that it needs, timed on a part of the data."""

import time
from dataclasses import replace

import numpy as np

from pipeline.engines.cost import batch_of
from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.manifest import Manifest
from pipeline.problem.batches import sample_count
from pipeline.problem.contexts import exact_kernels
from pipeline.problem.double_backward import hessian_vector_products
from pipeline.problem.finite_differences import STEPS
from pipeline.problem.problem import PlacedProblem
from pipeline.results.verify import effort

SAMPLES = 256  # at most, that products are timed with
PASS_AND_TWO = 3  # a pass takes about as long as a product
GRADIENTS = 4 * len(STEPS)  # of a product by differences, of which each takes half as long


def proof_seconds(placed: PlacedProblem, manifest: Manifest, chunk_seconds: float) -> float:
    """Predict how long a proof takes.

    Args:
        placed: the problem in float64.
        manifest: of the run.
        chunk_seconds: of encoding and writing a chunk; reading it back takes about as long.

    Returns:
        Seconds.
    """
    batch = batch_of(placed, SAMPLES)
    few = replace(placed, problem=placed.problem.on((batch,), l2=0.0))
    with exact_kernels(placed.problem.model):
        start = time.perf_counter()
        hessian_vector_products(few, np.ones((2, placed.layout.size)), 1.0)
        each = (time.perf_counter() - start) / PASS_AND_TWO
    passes, products = effort(manifest)
    if any(TRAITS[engine].by_differences for engine in manifest.engines.values()):
        products *= GRADIENTS // 2
    read = sum(len(manifest.places(tile)) for tile in manifest.plan.tiles()) * chunk_seconds
    return (passes + products) * each * placed.problem.sample_count / sample_count(batch) + read
