"""Runs to disturb: small, planned once, and known to the last bit."""

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zoo

from pipeline.progress import Reporter
from pipeline.runs.api import run
from pipeline.runs.attempt import Outcome
from pipeline.spec import Settings
from pipeline.storage.output import SUCCESS, VERIFY, Output
from pipeline.storage.receipts import read_receipt
from pipeline.storage.run_files import read_manifest

# Sizes are given, so that every plan is the same; P = 59.
COMMON = {"executor": "serial", "dtype": "float64", "engine": "factored", "microbatch": 7, "row_group": 32}
SHAPES = {
    "zarr": {"chunk": 16, "tile": (1, 1)},  # ragged: 59 is not a multiple
    "parquet": {"chunk": 16, "tile": (1, 1), "formats": ("zarr", "parquet")},
    "upper": {"chunk": 16, "tile": (1, 2), "symmetry": "upper"},
    "one tile": {"chunk": 16, "tile": (4, 4)},
    "one chunk": {"chunk": 64},  # larger than P
}
WORKERS = {"serial": None, "ray": 2}
RESULTS = ("hessian.zarr/c/", "hessian.parquet/", "receipts/", SUCCESS, VERIFY)


@dataclass(frozen=True)
class Undisturbed:
    """A finished run.

    Attributes:
        settings: it ran with.
        objects: all that it left, by name.
        matrix: the result.  # shape: (P, P)
        tiles: how many.
    """

    settings: Settings
    objects: dict[str, bytes]
    matrix: npt.NDArray[np.float64]
    tiles: int

    def on(self, executor: str) -> "Undisturbed":
        """Give the same, to go on with on another executor."""
        return replace(
            self, settings=self.settings.model_copy(update={"executor": executor, "workers": WORKERS[executor]})
        )

    def finished(self, url: str) -> Output:
        """Put a copy of it somewhere."""
        return self._put(url, self.objects)

    def planned(self, url: str) -> Output:
        """Put a copy of what was there before its first tile."""
        return self._put(url, {name: data for name, data in self.objects.items() if not name.startswith(RESULTS)})

    def run(self, url: str, *, check: bool = False, report: Reporter | None = None) -> Outcome:
        """Go on with a copy."""
        return run(zoo.mlp().problem, self.settings, url, check=check, report=report)

    def equals(self, outcome: Outcome) -> bool:
        """Say whether a run ended with the same bits."""
        return np.array_equal(outcome.hessian.to_numpy(), self.matrix)

    def _put(self, url: str, objects: dict[str, bytes]) -> Output:
        output = Output(url)
        for name, data in objects.items():
            output.put(name, data)
        return output


@cache
def undisturbed(shape: str) -> Undisturbed:
    """Run one of the shapes, once."""
    settings = Settings(**COMMON, **SHAPES[shape])
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(zoo.mlp().problem, settings, folder)
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        objects = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        return Undisturbed(settings, objects, outcome.hessian.to_numpy(), outcome.tiles)


def planned_copy(finished: Output, url: str) -> Output:
    """Put what was there of a finished run before its first tile somewhere else."""
    output = Output(url)
    for name in finished.sizes():
        if not name.startswith(RESULTS):
            output.put(name, finished.get(name) or b"")
    return output


def finish_times(output: Output) -> dict[str, float]:
    """When each finished tile was finished, by its id."""
    manifest = read_manifest(output)
    assert manifest is not None
    receipts = [read_receipt(output, manifest, tile) for tile in manifest.plan.tiles()]
    return {receipt.tile: receipt.finished for receipt in receipts if receipt}
