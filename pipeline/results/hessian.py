"""A finished Hessian where it lies: what every reader of it begins with."""

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.errors import IncompleteError
from pipeline.planning.manifest import Manifest
from pipeline.planning.parameters import ParameterLayout
from pipeline.storage.output import VERIFY, Output
from pipeline.storage.run_files import is_finished, open_run, read_proof
from pipeline.storage.zarr_store import MatrixStore


class StoredHessian:
    """The Hessian in an output. Nothing is read before it is asked for.

    Args:
        output: where it lies.
        manifest: what it is.

    Attributes:
        manifest: what was computed, and how.
        parameters: names, shapes and offsets, in the order of rows and columns.
        output: where it lies.
        store: the matrix as it is stored.
    """

    def __init__(self, output: Output, manifest: Manifest) -> None:
        self.manifest = manifest
        self.parameters: ParameterLayout = manifest.layout
        self.output = output
        self.store = MatrixStore(output, manifest)

    @classmethod
    def open(cls, url: str, endpoint_url: str | None = None, *, unproven: bool = False) -> Self:
        """Open a Hessian that was computed; see `pipeline.analysis.hessian.open_hessian`."""
        output, manifest = open_run(url, endpoint_url)
        if is_finished(output):
            return cls(output, manifest)
        if read_proof(output) is not False:
            raise IncompleteError(
                f"output {url}: the run is not finished; run the same job again, it goes on from there"
            )
        if not unproven:
            raise IncompleteError(
                f"output {url}: all is computed, but the proof failed (see its {VERIFY}): open_hessian(url, "
                "unproven=True) opens it all the same, the same job with --check computes anew what is damaged"
            )
        return cls(output, manifest)

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.output.url

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.parameters.size, self.parameters.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored type."""
        return np.dtype(self.manifest.store_dtype)

    @property
    def loss(self) -> float:
        """L, in float64."""
        return self.manifest.fingerprint.loss

    @property
    def gradient(self) -> npt.NDArray[np.float64]:
        """DL / dtheta, in float64.  # shape: (P,)."""
        return MatrixStore.gradient(self.output, self.manifest)
