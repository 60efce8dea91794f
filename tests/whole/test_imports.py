"""What is imported when, and what the public surface is."""

import inspect
import subprocess
import sys

import pytest

import pipeline
from pipeline.spec import Settings


@pytest.mark.parametrize("arguments", [["-c", "import pipeline"], ["-m", "pipeline", "--help"]])
def test_neither_torch_nor_ray(arguments):
    found = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "pipeline" in imported
    assert not imported & {"torch", "ray", "zarr", "pyarrow", "pydantic", "numpy"}


def test_reading_needs_no_torch():
    code = "import sys; from pipeline import Hessian, open_hessian; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_exist():
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pipeline.no_such_name


def test_compute_hessian_says_what_a_spec_says():
    """The same names with the same defaults; `check`, `overwrite` and `progress` are of one call, not of the run."""
    arguments = dict(inspect.signature(pipeline.compute_hessian).parameters)
    of_a_call = {"problem", "output", "check", "overwrite", "progress"}
    assert {name: p.default for name, p in arguments.items() if name not in of_a_call} == {
        name: field.default for name, field in Settings.model_fields.items()
    }


def test_errors_are_one_family():
    kinds = [getattr(pipeline, name) for name in pipeline.__all__ if name.endswith("Error")]
    for kind in kinds:
        assert issubclass(kind, pipeline.HessianError)
        assert kind is pipeline.HessianError or len(kind.__bases__) == 2  # also a builtin
        assert str(kind("got this")) == "got this"
