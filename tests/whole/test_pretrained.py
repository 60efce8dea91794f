"""Networks that were trained by others, from packages that hold their weights, against plain double backward."""

from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import torch.nn.functional as F
from oracle import dense_hessian

from pipeline import ProblemError, compute_hessian
from pipeline.runs.problem_factory import build_problem

pytestmark = pytest.mark.full("takes Hessians of pretrained models")

JOBS = Path(__file__).parents[2] / "jobs"


def problem(reference, **arguments):
    """The job's; skipped where its weights are not installed, which it says itself."""
    try:
        return build_problem(reference, arguments, JOBS)
    except ProblemError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))


def face_loss(model, batch):
    (logits, box), face = model(batch[0]), batch[1]
    return F.cross_entropy(logits, face) + 0.5 * (box.square().sum(1) * face).mean()


def prose_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def compared(found, loss, params, rows):
    """Compute the blocks of some parameters, and hold some of their rows against the oracle."""
    assert ray.cloudpickle.dumps(found)  # so that workers can have it
    H = compute_hessian(found, params=params, executor="serial", dtype="float64")
    rows = np.linspace(0, H.shape[0] - 1, rows).astype(int)
    truth = dense_hessian(found.model, loss, found.batches[0], list(H.parameters.names), only=rows)
    assert np.abs(truth).max() > 0
    assert np.abs(H[rows, :] - truth).max() < 1e-12 * np.abs(H.to_numpy()).max()


def test_face_detector():
    found = problem("pnet.py:pnet")
    assert found.layout.size == 6632
    patches, face = found.batches[0]
    with torch.no_grad():
        assert (found.model(patches)[0].argmax(1) == face).float().mean() > 0.99  # it was trained elsewhere
    compared(found, face_loss, ["prelu3.weight", "conv4_2.bias", "conv1.bias"], rows=12)


def test_transformer():
    found = problem("minilm.py:classifier", passages=3)
    below, described = found.batches[0]
    assert sum(p.numel() for p in found.model.layer.parameters()) == 1_774_464
    with torch.no_grad():
        assert (found.model(below).argmax(1) == described).float().mean() > 0.9  # of six
    compared(found, prose_loss, ["layer.output.LayerNorm.bias", "head.bias"], rows=12)


def test_weights_that_are_not_there(tmp_path):
    """The error is the command that brings them."""
    (tmp_path / "job.py").write_text(
        "from packaged import folder_of\n\ndef make():\n    folder_of('no_such', '--no-deps no-such==1')\n"
    )
    (tmp_path / "packaged.py").write_text((JOBS / "packaged.py").read_text())
    with pytest.raises(ProblemError, match=r"python3 -m pip install --no-deps no-such==1"):
        build_problem("job.py:make", {}, tmp_path)
