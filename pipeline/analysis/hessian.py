"""The handle that users hold: a finished Hessian, an array as far as it can be one, and what it is used for."""

from pipeline.analysis.plots import Plots
from pipeline.analysis.posterior import Posterior


class Hessian(Posterior, Plots):
    """The Hessian in an output, or its rows and columns of some parameters; see `pipeline.analysis`."""


def open_hessian(url: str, endpoint_url: str | None = None, *, unproven: bool = False) -> Hessian:
    """Open a Hessian that was computed.

    Args:
        url: the output of a run, a path or an fsspec URL.
        endpoint_url: of its server, where it is not the cloud's own or the environment's.
        unproven: opens one whose proof failed, too.

    Returns:
        A handle; nothing of the matrix is read yet.

    Raises:
        OutputError: there is none.
        IncompleteError: the run is not finished, or its proof failed.
    """
    return Hessian.open(url, endpoint_url, unproven=unproven)
