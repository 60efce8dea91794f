"""Proof on the finished matrix, by paths that share nothing with the engine that computed it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pipeline.contexts import exact_kernels, unchanged
from pipeline.handle import Hessian, open_hessian
from pipeline.identity import require_same
from pipeline.layout import Parameter
from pipeline.output import PARQUET
from pipeline.problem import Problem
from pipeline.reference import Vector, differenced_products, hessian_vector_products, reference_samples
from pipeline.scan import Scan

# Block errors that are let pass, by the types that compute and store, and by the reference.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "double backward": 0.0, "differences": 1e-5}
ROUNDING = {"double backward": 4e-15, "differences": 1e-8}  # of max|H|, in the reference itself
NOISE = 8  # times the rounding that plain double backward shows in the run's own type, which excuses as much,
MOST_NOISE = 1e-5  # but never more than this of max|H|
FLOOR = 1e-9  # of max|H|, in the denominator of a block error
STEPS = (1e-2, 1e-3, 1e-4, 1e-5)  # lengths of the shift in parameter space; two neighbours must agree
VECTOR_BYTES = 256 * 2**20  # of directions multiplied in one pass over the store
SAMPLED_ROWS = 16  # recomputed entry by entry from the other side of the diagonal


@dataclass(frozen=True)
class Verification:
    """What was checked, and what was found.

    Attributes:
        ok: nothing is wrong.
        chunks: stored chunks read back against their checksums.
        faults: chunks that are missing, damaged, or not the mirror image of their partner; Parquet files that are
            missing, damaged, of something else, or not what the chunk is.
        method: of the reference: "double backward", "differences", or None when there was no problem at hand.
        blocks: pairs of parameters compared.
        worst_block: the pair with the largest block error.
        block_error: that error.
        sampled_rows: rows recomputed entry by entry from the other side of the diagonal.
        worst_entry: row, column and block error of the worst sampled entry, and the names of its block.
        tolerance: that errors are held against.
        inconclusive: pairs at which no two steps of the differences agreed.
        files: Parquet files read back against their checksums and the chunks.
    """

    ok: bool
    chunks: int
    faults: list[str]
    method: str | None = None
    blocks: int = 0
    worst_block: tuple[str, str] | None = None
    block_error: float = 0.0
    sampled_rows: int = 0
    worst_entry: tuple[int, int, float, str, str] | None = None
    tolerance: float | None = None
    inconclusive: list[tuple[str, str]] = field(default_factory=list)
    files: int = 0

    def to_json(self) -> dict[str, Any]:
        """Give a plain mapping."""
        return asdict(self)

    def summary(self) -> str:
        """Say it in one line."""
        stored = f"{self.chunks} chunks" + (f" and {self.files} Parquet files" if self.files else "")
        if self.faults:
            return f"{len(self.faults)} of {stored} are at fault, the first: {self.faults[0]}"
        if self.method is None:
            return f"{stored} present, checksums right; numbers not checked (no problem given)"
        found = (
            f"{stored}, {self.blocks} blocks against {self.method}, {self.sampled_rows} rows entry by "
            f"entry: block error {self.block_error:.1e}, tolerance {self.tolerance:.0e}"
        )
        if self.inconclusive:
            a, b = self.inconclusive[0]
            return f"{found}; inconclusive at {len(self.inconclusive)} blocks, the first H[{a}, {b}]"
        return found if self.ok else f"{found}; worst is {self._worst()}"

    def _worst(self) -> str:
        entry = self.worst_entry
        if entry is not None and entry[2] >= self.block_error:
            return f"entry ({entry[0]}, {entry[1]}) of block H[{entry[3]}, {entry[4]}], off by {entry[2]:.1e}"
        a, b = self.worst_block or ("?", "?")
        return f"block H[{a}, {b}]"


def verify_hessian(hessian: Hessian | str, problem: Problem | None = None, *, retrained: bool = False) -> Verification:
    """Check a finished Hessian.

    Every chunk must be present and match its checksum, and its mirror image where the matrix is stored whole. With the
    problem at hand, H v is compared with plain double backward in float64 (differences of the gradient for rows that
    were computed by double backward), for v supported on one parameter at a time, row parameter by row parameter; and
    some rows are recomputed entry by entry from the other side of the diagonal. Parquet files in the output must be
    those of its chunks, entry for entry.

    Args:
        hessian: a handle, or the output's URL.
        problem: what it is the Hessian of; without it only chunks and checksums are checked.
        retrained: whether the problem was trained anew since, to other last bits; the stored weights are used.

    Returns:
        What was found.

    Raises:
        FingerprintError: it is not the Hessian of that problem.
        OutputError: there is no Hessian.
        IncompleteError: the run is not finished.
    """
    hessian = open_hessian(hessian) if isinstance(hessian, str) else hessian
    parquet = "parquet" in hessian.manifest.formats or bool(hessian.output.sizes(PARQUET))
    if problem is None:
        scan = Scan(hessian, np.zeros((0, hessian.shape[0])), parquet=parquet)
        return Verification(ok=not scan.faults, chunks=scan.chunks, faults=scan.faults, files=scan.files)
    named = problem.select(hessian.parameters.names)
    return check(hessian, require_same(named, hessian.manifest, hessian.output, retrained=retrained), parquet=parquet)


def check(hessian: Hessian, problem: Problem, *, parquet: bool) -> Verification:
    """Check a Hessian against its problem, which is known to be the same; see `verify_hessian`.

    Args:
        hessian: a handle.
        problem: what it is the Hessian of.
        parquet: whether Parquet files are there to be checked.

    Returns:
        What was found.
    """
    with unchanged(problem.model), exact_kernels(problem.model):
        return _Check(hessian, problem, parquet=parquet).run()


class _Check:
    """The comparison with a reference."""

    def __init__(self, hessian: Hessian, problem: Problem, *, parquet: bool) -> None:
        manifest, self._parquet = hessian.manifest, parquet
        self._hessian, self._plan, self._weight = hessian, manifest.plan, manifest.fingerprint.weight
        self._placed = problem.place(torch.float64)
        self._samples = reference_samples(manifest.microbatch)
        self._same_type = problem.place(torch.float32) if manifest.dtype == "float32" else None
        self._method = "differences" if "rows" in manifest.engines.values() else "double backward"
        kinds = (manifest.dtype, manifest.store_dtype, self._method)
        self._tolerance = max(TOLERANCE[kind] for kind in kinds)
        self._parameters = [p for p in hessian.parameters if p.size]
        self._random = np.random.default_rng(0)
        self._scan: Scan  # the latest

    def run(self) -> Verification:
        """Scan, multiply, compare."""
        errors: dict[tuple[str, str], float] = {}
        files = 0
        for group in self._groups():
            vectors = np.stack([self._direction(p) for p in group])
            self._scan = Scan(self._hessian, vectors, parquet=self._parquet and not files)  # once is enough
            files = files or self._scan.files
            if self._scan.faults:
                return Verification(ok=False, chunks=self._scan.chunks, faults=self._scan.faults, files=files)
            errors |= self._block_errors(group, vectors)
        known = {pair: error for pair, error in errors.items() if not np.isnan(error)}
        inconclusive = [pair for pair in errors if pair not in known]
        worst = max(known, key=lambda pair: known[pair]) if known else None
        block_error = known[worst] if worst else 0.0
        rows = self._sampled_rows()
        entry = self._worst_entry(rows) if rows else None
        failed = max(block_error, entry[2] if entry else 0.0) > self._tolerance
        return Verification(
            ok=not (failed or inconclusive),
            chunks=self._scan.chunks,
            faults=[],
            method=self._method,
            blocks=len(errors),
            worst_block=worst,
            block_error=block_error,
            sampled_rows=len(rows),
            worst_entry=entry,
            tolerance=self._tolerance,
            inconclusive=inconclusive,
            files=files,
        )

    def _groups(self) -> Iterator[list[Parameter]]:
        """Give parameters in groups whose directions fit into memory."""
        size = max(1, VECTOR_BYTES // (8 * self._hessian.shape[0]))
        for start in range(0, len(self._parameters), size):
            yield self._parameters[start : start + size]

    def _direction(self, p: Parameter) -> Vector:
        """Give a vector of random signs on one parameter, of length one.  # shape: (P,)."""
        vector = np.zeros(self._hessian.shape[0])
        vector[p.place] = self._random.choice((-1.0, 1.0), p.size) / p.size**0.5
        return vector

    def _block_errors(self, group: list[Parameter], vectors: Vector) -> dict[tuple[str, str], float]:
        """Compare the scan's products, column parameter by row parameter; NaN where no two steps agree."""
        references = self._references(vectors)
        noise = self._noise(vectors, references[-1])
        errors: dict[tuple[str, str], float] = {}
        for k, b in enumerate(group):
            for a in self._parameters:
                if self._plan.covers(a.span, b.span):
                    rows = a.place
                    scale = self._scale(a, b, float(noise[k, rows].max()))
                    reference = self._agreed([r[k, rows] for r in references], scale)
                    errors[a.name, b.name] = float(np.abs(self._scan.products[k, rows] - reference).max()) / scale
        return errors

    def _references(self, vectors: Vector) -> list[Vector]:
        """Give H V' by other means; by several steps where differences are taken.  # shape of each: (k, P)."""
        if self._method == "double backward":
            return [hessian_vector_products(self._placed, vectors, self._weight, self._samples)]
        return [differenced_products(self._placed, vectors, self._samples, step) for step in STEPS]

    def _agreed(self, references: list[Vector], scale: float) -> Vector:
        """Give the reference of the two neighbouring steps that agree best; NaN where none do."""
        if len(references) == 1:
            return references[0]
        gaps = [float(np.abs(x - y).max()) / scale for x, y in pairwise(references)]
        best = int(np.argmin(gaps))
        return references[best + 1] if gaps[best] <= self._tolerance else np.full_like(references[0], np.nan)

    def _noise(self, vectors: Vector, reference: Vector) -> Vector:
        """Measure the rounding of plain double backward in the run's own type.  # shape: (k, P)."""
        if self._same_type is None:
            return np.zeros_like(reference)
        rounded = hessian_vector_products(self._same_type, vectors, self._weight, self._samples)
        return NOISE * np.abs(rounded - reference)

    def _scale(self, a: Parameter, b: Parameter, noise: float) -> float:
        """Give the denominator of a block error; 1 where all of H is zero."""
        # Never so small that rounding alone would exceed the tolerance: structural zeros (a bias before a
        # normalisation) carry the rounding of max|H| whatever their own size.
        largest = self._scan.largest
        scale = (largest[a.name] * largest[b.name]) ** 0.5 + FLOOR * max(largest.values())
        rounding = max(min(noise, MOST_NOISE * max(largest.values())), ROUNDING[self._method] * max(largest.values()))
        return max(scale, rounding / self._tolerance) or 1.0

    def _sampled_rows(self) -> list[int]:
        """Choose the last rows of some parameters, whose columns to the left are all there."""
        last = [p.span.stop - 1 for p in self._parameters if self._plan.covers(range(p.span.stop), p.span)]
        if len(last) > SAMPLED_ROWS:
            last = [last[-1], *self._random.choice(last[:-1], SAMPLED_ROWS - 1, replace=False)]
        return sorted(map(int, last))

    def _worst_entry(self, rows: list[int]) -> tuple[int, int, float, str, str]:
        """Recompute rows from their own gradient entry and compare every entry left of the diagonal."""
        units = np.zeros((len(rows), self._hessian.shape[0]))
        units[np.arange(len(rows)), rows] = 1
        truth = hessian_vector_products(self._placed, units, self._weight, self._samples)
        noise = self._noise(units, truth)
        worst = (rows[0], 0, 0.0, "", "")
        for k, row in enumerate(rows):
            found = self._hessian[row, : row + 1].astype(np.float64)
            b, _ = next(self._hessian.parameters.segments(range(row, row + 1)))
            for a, cols in self._hessian.parameters.segments(range(row + 1)):
                scale = self._scale(a, b, float(noise[k, _slice(cols)].max()))
                gap = np.abs(found[_slice(cols)] - truth[k, _slice(cols)]) / scale
                if gap.max() > worst[2]:
                    worst = (row, cols.start + int(gap.argmax()), float(gap.max()), b.name, a.name)
        return worst


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
