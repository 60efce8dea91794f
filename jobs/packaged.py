"""Pretrained weights that lie in Python packages: found without importing those, which need more."""

from importlib.util import find_spec
from pathlib import Path

from pipeline import ProblemError


def folder_of(package: str, install: str) -> Path:
    """Find the folder of an installed package; `install` is what pip is told where it is missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ProblemError(f"package {package} is not installed: python3 -m pip install {install}")
    return Path(spec.submodule_search_locations[0])
