"""The full, exact Hessian of a PyTorch model's loss with respect to its weights, every entry, block by block.

The public surface is what `__all__` lists. It is imported on first use, so that `import pipeline` stays free of torch,
ray and zarr.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pipeline.errors import (
    BlockError,
    CheckpointError,
    ClusterError,
    ConvergenceError,
    FingerprintError,
    HessianError,
    IncompleteError,
    IndefiniteError,
    LeaseError,
    MemoryRefusedError,
    NotFiniteError,
    OutputError,
    ProblemError,
    SpecError,
    SweepError,
    TileError,
    VerificationError,
    WorkerError,
)

if TYPE_CHECKING:
    from pipeline.analysis.hessian import Hessian, open_hessian
    from pipeline.problem.problem import Problem
    from pipeline.results.export import export_hessian
    from pipeline.results.verify import verify_hessian
    from pipeline.runs.api import compute_hessian
    from pipeline.runs.checkpoint import load_checkpoint

    __version__: str

_LAZY = {
    "Hessian": "pipeline.analysis.hessian",
    "open_hessian": "pipeline.analysis.hessian",
    "Problem": "pipeline.problem.problem",
    "load_checkpoint": "pipeline.runs.checkpoint",
    "compute_hessian": "pipeline.runs.api",
    "export_hessian": "pipeline.results.export",
    "verify_hessian": "pipeline.results.verify",
}

__all__ = [
    "BlockError",
    "CheckpointError",
    "ClusterError",
    "ConvergenceError",
    "FingerprintError",
    "Hessian",
    "HessianError",
    "IncompleteError",
    "IndefiniteError",
    "LeaseError",
    "MemoryRefusedError",
    "NotFiniteError",
    "OutputError",
    "Problem",
    "ProblemError",
    "SpecError",
    "SweepError",
    "TileError",
    "VerificationError",
    "WorkerError",
    "compute_hessian",
    "export_hessian",
    "load_checkpoint",
    "open_hessian",
    "verify_hessian",
]


def __getattr__(name: str) -> object:
    """Import a lazily provided public name."""
    if name == "__version__":
        from importlib.metadata import version  # which takes as long as the rest of this module

        return version("hessian-pipeline")
    if name not in _LAZY:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted([*__all__, "__version__"])
