"""Right or refused, never silently wrong: every ingredient, judged by `derive.truth`."""

import multiprocessing
import random
import re
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from derive import ENTRY_TOLERANCE, Truth, truth
from oracle import block_error
from torch.nn.parameter import is_lazy

from hazards import HAZARDS
from pipeline import ProblemError, compute_hessian
from pipeline.problem.batches import digest

RIGHT = 1e-6  # block error against differences
BY_DIFFERENCES = 1e-5  # where the run itself took them
SAME = 1e-9  # against double backward, of a block and of an entry
SINGLE = 1e-4  # in single precision
SINGLE_ULPS = 4 * 2**29  # of structural zeros, in units of double precision
COARSE = 1e-5  # where a part of the loss is rounded to less than float64, and differences say nothing

# Ingredients are there to be odd: torch warns of many.
pytestmark = pytest.mark.filterwarnings("ignore")


def state(model):
    """Everything of a model, and of the random generators, that a run must leave alone."""
    attributes = {
        f"{path}.{key}": value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **attributes}
    tensors = {name: t for name, t in tensors.items() if not is_lazy(t)}
    return (
        digest({name: t.to_dense() if t.layout is not torch.strided else t for name, t in tensors.items()}),
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [(name, getattr(m, "training", None)) for name, m in model.named_modules()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )


def outcome(hazard, device, dtype="float64"):
    """The matrix and its engines, or the refusal; by micro-batches, the last smaller where there are seven samples."""
    options = {"microbatch": 3} | ({"gpus_per_worker": 1} if device == "cuda" else {})
    try:
        with hazard.around():
            H = compute_hessian(hazard.problem, executor="serial", dtype=dtype, **options)
        return H.to_numpy(), set(H.manifest.engines.values())
    except ProblemError as refusal:
        return refusal


def outcome_of(name, device, dtype):
    return outcome(HAZARDS[name](), device, dtype)


def outcome_apart(name, device, dtype):
    """In a process of its own, which it may end."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(outcome_of, name, device, dtype).result()


def assert_right(found, engines, known: Truth):
    """By the rung that was taken: a run by differences is no more exact than these are."""
    coarse = "differences" in engines
    if known.differences is not None:
        assert known.error(found) < (BY_DIFFERENCES if coarse else RIGHT), known.reason
        assert known.off_differences(found) < ENTRY_TOLERANCE, known.reason
    else:
        assert known.kind in {"kinked", "inconclusive"}, f"a matrix where {known.reason}"
    if known.kind != "uncomputable" and not coarse:
        limit = COARSE if known.kind == "inconclusive" else SAME
        assert block_error(found, known.autograd, known.layout, noise=known.noise) < limit
    if known.kind == "computable" and not coarse:
        assert known.entry_error(found) < SAME


def assert_right_as_written(name, found, engines):
    """Right of its twin; or of itself, with what single precision rounds in it, where that has a Hessian.

    Of fresh ones: what a run leaves behind is no part of the truth.
    """
    try:
        assert_right(found, engines, truth(HAZARDS[name]()))
    except AssertionError:
        if HAZARDS[name]().twin is None or (own := truth(HAZARDS[name](), of_itself=True)).kind != "computable":
            raise
        assert_right(found, engines, own)


def assert_right_in_single(found, known: Truth):
    assert known.kind != "uncomputable", f"a matrix where {known.reason}"
    assert block_error(found, known.autograd, known.layout, ulps=SINGLE_ULPS, noise=2**29 * known.noise) < SINGLE


def keeps_its_word(hazard, known: Truth):
    """Whether the loss is the sum over samples that the problem says it is; several terms have samples of their own."""
    if "terms" in hazard.arguments:
        return True
    said = getattr(hazard.arguments.get("loss"), "reduction", hazard.arguments.get("reduction", "mean"))
    return not hazard.arguments.get("separable", True) or said.removeprefix("batch") in known.sums


def judged(hazard):
    """What is true of a hazard that was refused."""
    name = hazard.name
    known = truth(HAZARDS[name]())
    if known.kind == "computable" and keeps_its_word(hazard, known):
        known = truth(HAZARDS[name](), nearby=True)  # a head of zeros hides what is wrong before it
    if known.kind == "computable" and hazard.twin is not None:
        known = truth(HAZARDS[name](), of_itself=True)
    return known


def assert_justified(message, hazard, known: Truth):
    if known.kind == "computable" and not hazard.optional:
        assert not keeps_its_word(hazard, known), f"refused what is computable: {message}"
    assert "\n" not in message
    assert hazard.culprit, f"refused, and no culprit is known: {message}"
    assert re.search(hazard.culprit, message), f"{hazard.culprit} not named: {message}"


def assert_right_or_refused(name, device, dtype="float64"):
    hazard = HAZARDS[name]()
    before = state(hazard.model)
    found = outcome_apart(name, device, dtype) if hazard.kind == "transforms inside" else outcome(hazard, device, dtype)
    after = state(hazard.model)
    if isinstance(found, ProblemError):
        assert_justified(str(found), hazard, judged(hazard))
    elif dtype == "float32":
        assert_right_in_single(found[0], truth(HAZARDS[name]()))
    else:
        assert_right_as_written(name, *found)
    assert after == before


EVERY = 9  # hazard is of the default tier, and the first of every kind
LONG = 3  # every third of the others is left to .ci/long
SLOW = [name for name in HAZARDS if "checkpoint" in name]  # row by row, and all before each once more
FIRST = {make.kind: name for name, make in reversed(HAZARDS.items()) if name not in SLOW}.values()


def tier(place, name):
    """The marks of a hazard: one of those that are slow stands for the others."""
    if name in SLOW[1:]:
        return [pytest.mark.long]
    if (place % EVERY == 0 and name not in SLOW) or name in FIRST:
        return []
    return [pytest.mark.long if place % LONG == 1 else pytest.mark.full("one of seven hundred")]


TIERED = [pytest.param(name, marks=tier(place, name)) for place, name in enumerate(HAZARDS)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", TIERED)
def test_right_or_refused(name, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_right_or_refused(name, device)


SINGLE_KINDS = {"zero diagonals", "float32 written in", "surroundings"}


@pytest.mark.full("hazards once more")
@pytest.mark.parametrize(
    "name",
    [
        name if place % 2 == 0 else pytest.param(name, marks=pytest.mark.long)
        for place, name in enumerate(name for name, make in HAZARDS.items() if make.kind in SINGLE_KINDS)
    ],
)
def test_right_or_refused_in_single_precision(name):
    assert_right_or_refused(name, "cpu", "float32")


def test_there_are_enough():
    assert len(HAZARDS) >= 100
