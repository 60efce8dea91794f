"""What `compute_hessian` says of arguments that are not what it takes, and what it takes besides."""

import numpy as np
import pytest
import zoo
from torch import nn

from pipeline import FingerprintError, Problem, ProblemError, SpecError, compute_hessian, open_hessian

SERIAL = {"executor": "serial"}


def test_model_loss_and_data_in_its_place():
    """As other libraries take them; Python would say how many arguments it got."""
    case = zoo.mlp().problem
    for given in ((case.model, nn.MSELoss(), [1]), (case.model, nn.MSELoss()), (case.model,)):
        with pytest.raises(
            SpecError, match=r"got Sequential, expected .*write compute_hessian\(Problem\(model, loss, "
        ):
            compute_hessian(*given)
    with pytest.raises(SpecError, match=r"got Sequential"):
        compute_hessian(problem=case.model)
    with pytest.raises(SpecError, match=r"got Sequential"):
        compute_hessian(model=case.model, loss=nn.MSELoss())
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        compute_hessian()
    with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments but 3"):
        compute_hessian(case, "out", "more")


def test_the_class_of_a_loss():
    case = zoo.mlp().problem
    with pytest.raises(ProblemError, match=r"got the class CrossEntropyLoss.*write CrossEntropyLoss\(\)"):
        Problem(case.model, nn.CrossEntropyLoss, case.batches)


def test_one_glob_is_a_list_of_one():
    H = compute_hessian(zoo.mlp().problem, params="0.*", **SERIAL)
    assert H.parameters.names == ("0.weight", "0.bias")


def test_what_was_meant_by_blocks():
    with pytest.raises(SpecError, match=r"`blocks` got 'diag': [^;]*; did you mean `diagonal`\?"):
        compute_hessian(zoo.mlp().problem, blocks="diag", **SERIAL)


def test_overwrite(tmp_path):
    problem = zoo.mlp().problem
    compute_hessian(problem, str(tmp_path), params="0.*", **SERIAL)
    with pytest.raises(FingerprintError):
        compute_hessian(problem, str(tmp_path), **SERIAL)
    H = compute_hessian(problem, str(tmp_path), overwrite=True, **SERIAL)
    np.testing.assert_array_equal(open_hessian(str(tmp_path)).to_numpy(), H.to_numpy())
    assert H.shape[0] == problem.layout.size
    with pytest.raises(SpecError, match="leave one of them out"):
        compute_hessian(problem, str(tmp_path), overwrite=True, check=True, **SERIAL)
    assert compute_hessian(problem, str(tmp_path / "new"), overwrite=True, **SERIAL).shape == H.shape
