"""Right or refused, never silently wrong: every ingredient, judged by `derive.truth`."""

import random
import re

import numpy as np
import pytest
import torch
from derive import Truth, truth
from hazards import HAZARDS
from oracle import block_error

from pipeline import ProblemError, compute_hessian
from pipeline.data import digest

RIGHT = 1e-6  # block error against differences
SAME = 1e-9  # against double backward
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
    return (
        digest({name: t.to_dense() if t.layout is not torch.strided else t for name, t in tensors.items()}),
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [(name, m.training) for name, m in model.named_modules()],
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )


def outcome(hazard, device):
    """The matrix, or the refusal; by micro-batches, whose last is smaller where there are seven samples."""
    options = {"microbatch": 3} | ({"gpus_per_worker": 1} if device == "cuda" else {})
    try:
        return compute_hessian(hazard.problem, executor="serial", dtype="float64", **options).to_numpy()
    except ProblemError as refusal:
        return refusal


def assert_right(found, known: Truth):
    if known.differences is not None:
        assert known.error(found) < RIGHT, known.reason
    else:
        assert known.kind in {"kinked", "inconclusive"}, f"a matrix where {known.reason}"
    if known.kind != "uncomputable":
        limit = COARSE if known.kind == "inconclusive" else SAME
        assert block_error(found, known.autograd, known.layout) < limit


def keeps_its_word(hazard, known: Truth):
    """Whether the loss is the sum over samples that the problem says it is."""
    said = getattr(hazard.arguments.get("loss"), "reduction", hazard.arguments.get("reduction", "mean"))
    return not hazard.arguments.get("separable", True) or said.removeprefix("batch") in known.sums


def assert_justified(message, hazard, known: Truth):
    if known.kind == "computable":
        assert not keeps_its_word(hazard, known), f"refused what is computable: {message}"
    assert "\n" not in message
    assert hazard.culprit, f"refused, and no culprit is known: {message}"
    assert re.search(hazard.culprit, message), f"{hazard.culprit} not named: {message}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", HAZARDS)
def test_right_or_refused(name, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    hazard = HAZARDS[name]()
    before = state(hazard.model)
    found = outcome(hazard, device)
    after = state(hazard.model)
    known = truth(HAZARDS[name]())  # of a fresh one: what a run leaves behind is no part of the truth
    if isinstance(found, ProblemError):
        if known.kind == "computable" and keeps_its_word(hazard, known):
            known = truth(HAZARDS[name](), nearby=True)  # a head of zeros hides what is wrong before it
        assert_justified(str(found), hazard, known)
    else:
        assert_right(found, known)
    assert after == before


def test_there_are_enough():
    assert len(HAZARDS) >= 100
