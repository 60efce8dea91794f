"""Proof on the finished matrix, by paths that share nothing with the engine that computed it."""

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, starmap

import numpy as np

from pipeline.planning.engine_traits import TRAITS
from pipeline.planning.manifest import Manifest
from pipeline.problem.contexts import differentiable, exact_kernels, unchanged
from pipeline.problem.double_backward import (
    Vector,
    by_parameter,
    differenced_products,
    loss_and_gradient,
    own_sizes,
    reference_samples,
)
from pipeline.problem.problem import Problem
from pipeline.problem.scales import MEASURED, STEEPEST, SWEEPS, Products, Yardstick, directions, yardstick
from pipeline.results.chunk_scan import Mask, Scan
from pipeline.results.fingerprint_check import require_same
from pipeline.results.hessian import StoredHessian
from pipeline.results.reference import Here, Reference, reference_device
from pipeline.results.verification import Entry, Verification
from pipeline.storage.output import PARQUET

# Errors that are let pass, in units of an entry's row and column scales, by the types that compute and store, and by
# the reference.
TOLERANCE = {"float64": 1e-6, "float32": 5e-6, "double backward": 0.0, "differences": 1e-5}
WEIGHT_TOLERANCE = 1e-9  # relative, of sums over all data in another order
NEAR = 1e-4  # largest step of differences over all data, at which double backward computed H itself
AGREED, CONFIRMED = 1e-6, 1e-4  # gap between steps, and error against them, that confirm double backward
ROUNDING_LET_PASS = {"float32": 2e-2}  # rounding that is excused, where preflight found that the type is good enough
DIRECTIONS = 3  # dense ones, for each group of columns
OTHERS = 3  # ways of rounding that are measured
GROUP = 16_384  # columns of a direction: rounding adds up over them, and hides what is wrong in one
VECTOR_BYTES = 256 * 2**20  # of directions multiplied in one pass over the store
SAMPLED_ROWS = 4  # compared entry by entry
MOVED = 8  # times by their last bit, weights at which rounding decides what is wrong


def effort(manifest: Manifest) -> tuple[int, int]:
    """Return how many times a proof goes through the data, and how many products with H it takes there.

    Args:
        manifest: of the run.

    Returns:
        Passes and products, as long as nothing is wrong.
    """
    measured = 2 * (1 + OTHERS)  # ways to multiply, for each of two measurements
    products = SWEEPS + measured * MEASURED + DIRECTIONS * len(_column_groups(manifest)) + SAMPLED_ROWS
    return SWEEPS + measured + 2, products


def _column_groups(manifest: Manifest) -> list[range]:
    """Return columns whose directions are drawn together: as many as one pass over the store has room for."""
    size = manifest.plan.size
    if not manifest.plan.covers(range(size), range(size)):
        return [p.span for p in manifest.layout if p.size]
    most = max(1, (VECTOR_BYTES // (8 * size) - SAMPLED_ROWS) // DIRECTIONS)
    count = min(most, math.ceil(size / GROUP))
    cuts = [round(k * size / count) for k in range(count + 1)]
    return list(starmap(range, pairwise(cuts)))


def verify_hessian(
    hessian: StoredHessian | str, problem: Problem | None = None, *, retrained: bool = False
) -> Verification:
    """Check a finished Hessian.

    Every chunk must be present and match its checksum, and its mirror image where the matrix is stored whole; the
    chunks of a tile must have the products that were taken of it where it was computed. With the problem at hand, H v
    is compared with plain double backward in float64 (differences of the gradient where H was computed by them), row by
    row, in the scales of rows and columns, for several random v that are others each time; and some rows entry by
    entry. Loss, gradient and weight are the problem's, not the manifest's. Parquet files in the output must be those of
    its chunks, entry for entry.

    Args:
        hessian: a handle, or the output's URL; of a view, the whole is checked.
        problem: what it is the Hessian of; without it only what is stored is checked.
        retrained: whether the problem was trained anew since, to other last bits; the stored weights are used.

    Returns:
        What was found.

    Raises:
        FingerprintError: it is not the Hessian of that problem.
        OutputError: there is no Hessian.
        IncompleteError: the run is not finished.
    """
    if isinstance(hessian, str):
        hessian = StoredHessian.open(hessian, unproven=True)
    else:
        hessian = StoredHessian(hessian.output, hessian.manifest)
    parquet = "parquet" in hessian.manifest.formats or bool(hessian.output.sizes(PARQUET))
    if problem is None:
        scan = Scan(hessian, np.zeros((0, hessian.shape[0])), parquet=parquet)
        return Verification(ok=not scan.faults, chunks=scan.chunks, faults=scan.faults, files=scan.files)
    named = problem.select(hessian.parameters.names)
    return check(hessian, require_same(named, hessian.manifest, hessian.output, retrained=retrained), parquet=parquet)


def check(
    hessian: StoredHessian, problem: Problem, *, parquet: bool, reference: Reference | None = None
) -> Verification:
    """Check a Hessian against its problem, which is known to be the same; see `verify_hessian`.

    Args:
        hessian: a handle.
        problem: what it is the Hessian of.
        parquet: whether Parquet files are there to be checked.
        reference: of the problem, elsewhere; computed in this process when None.

    Returns:
        What was found.
    """
    with differentiable(), unchanged(*problem.modules), exact_kernels(problem.model):
        return _Check(hessian, problem, reference, parquet=parquet).run()


class _Check:
    """The comparison with a reference."""

    def __init__(self, hessian: StoredHessian, problem: Problem, reference: Reference | None, *, parquet: bool) -> None:
        manifest, self._parquet = hessian.manifest, parquet
        self._hessian, self._plan = hessian, manifest.plan
        self._samples = reference_samples(manifest.microbatch)
        here = Here(problem, self._samples, reference_device())
        self._placed, self._reference = here.placed("float64"), reference or here
        self._weight = loss_and_gradient(self._placed, self._samples).weight
        used = [TRAITS[engine] for engine in manifest.engines.values()]
        self._method = "differences" if any(traits.by_differences for traits in used) else "double backward"
        self._is_own_reference = any(traits.is_reference for traits in used)
        self._yardsticks = 0  # made
        self._tolerance = max(TOLERANCE[kind] for kind in (manifest.dtype, manifest.store_dtype, self._method))
        self._parameters = [p for p in hessian.parameters if p.size]
        self._seed = secrets.randbits(63)
        self._random = np.random.default_rng(self._seed)
        self._rows = self._sampled_rows()
        self._scan: Scan  # the latest
        self._files = 0

    def run(self) -> Verification:
        """Multiply, scan, compare."""
        stored = self._hessian.manifest.fingerprint.weight
        if abs(stored - self._weight) > WEIGHT_TOLERANCE * abs(self._weight):
            return self._at_fault([f"the manifest's total weight is {stored:.9g}, the problem's {self._weight:.9g}"], 0)
        measure = self._yardstick()
        errors, entries, suspects = self._compare(measure)
        chunks = self._scan.chunks
        if not self._scan.faults and suspects:
            # A row that is wrong is so along other directions and held against another measure too. One that was
            # rounded more than that showed is not: of tens of thousands there are some.
            measure = self._yardstick(measure)
            again, found, _ = self._compare(measure, suspects)
            errors = {pair: min(error, again.get(pair, error)) for pair, error in errors.items()}
            entries = [entry for entry in entries if entry[2] <= self._tolerance] + found
        if self._scan.faults:
            return self._at_fault(self._scan.faults, chunks)
        worst = max(errors, key=lambda pair: errors[pair], default=None)
        inconclusive = self._unconfirmed(measure) if self._is_own_reference else []
        error = errors[worst] if worst else 0.0
        is_wrong = worst is not None and error > self._tolerance
        place, unsteady = self._located(measure, *worst) if worst and is_wrong else (None, 0.0)
        return Verification(
            ok=not is_wrong,
            chunks=chunks,
            faults=[],
            method=self._method,
            blocks=sum(self._plan.covers(a.span, b.span) for a in self._parameters for b in self._parameters),
            worst_block=place,
            block_error=error,
            sampled_rows=len(self._rows),
            worst_entry=max(entries, key=lambda entry: entry[2], default=None),
            tolerance=self._tolerance,
            inconclusive=inconclusive,
            files=self._files,
            seed=self._seed,
            unsteady=unsteady,
        )

    def _compare(
        self, measure: Yardstick, suspects: dict[range, Mask] | None = None
    ) -> tuple[dict[tuple[str, range], float], list[Entry], dict[range, Mask]]:
        """Multiply along directions drawn anew, until something is at fault.

        Args:
            measure: what errors are held against.
            suspects: the rows that are looked at, by columns; all when None.

        Returns:
            Errors by block, the worst entries, and the rows that are further off than is let pass, by columns.
        """
        errors: dict[tuple[str, range], float] = {}
        entries: list[Entry] = []
        off: dict[range, Mask] = {}
        only = np.any(list(suspects.values()), axis=0) if suspects else None
        for vectors, spans in self._batches(measure, suspects):
            products = self._read(vectors, only)
            if self._scan.faults:
                break
            found = measure.errors(products, self._truth(vectors, measure), self._tolerance)
            for error, cols in zip(found, spans, strict=True):
                if suspects is not None:
                    error[~suspects[cols]] = 0.0
                if error.max() > self._tolerance:
                    off[cols] = off.get(cols, False) | (error > self._tolerance)
            for pair, worst in self._by_block(found, spans).items():
                errors[pair] = max(errors.get(pair, 0.0), worst)
            entries += [entry] if (entry := self._worst_entry(found, spans)) else []
        return errors, entries, off

    def _at_fault(self, faults: list[str], chunks: int) -> Verification:
        """Return what is wrong with what is stored: numbers are not compared then."""
        return Verification(False, chunks, faults, method=self._method, files=self._files, seed=self._seed)

    def _yardstick(self, before: Yardstick | None = None) -> Yardstick:
        """Find what errors are held against, from the problem alone; rounding anew where there is such a measure."""
        if self._method == "double backward":
            seeds = range(self._yardsticks * OTHERS, (self._yardsticks + 1) * OTHERS)
            self._yardsticks += 1
            multiply, others = self._products(), [self._rounded(seed) for seed in seeds]
            dtype = self._hessian.manifest.dtype
            known = before.equilibrated if before else None
            layout, most = self._placed.layout, ROUNDING_LET_PASS.get(dtype)
            return yardstick(layout, multiply, others, dtype, self._random, most, known)
        ones = np.ones(self._hessian.shape[0])

        def by_steps(vectors: Vector) -> Vector:
            return differenced_products(self._placed, vectors, ones, self._samples)[0]

        found = yardstick(self._placed.layout, by_steps, [by_steps], "float32", self._random)
        return replace(found, scales=np.maximum(found.scales, STEEPEST * found.scales.max(initial=0.0)))

    def _rounded(self, seed: int) -> Products:
        """Multiply in the run's type, at weights that are moved by their last bit but for the first time in float32."""
        dtype = self._hessian.manifest.dtype
        return self._products(dtype, None if seed == 0 and dtype == "float32" else seed)

    def _products(self, dtype: str = "float64", seed: int | None = None) -> Products:
        return lambda vectors: self._reference.multiply(vectors, self._weight, dtype, seed)

    def _truth(self, vectors: Vector, measure: Yardstick) -> Vector:
        """Return H V' by other means.  # shape: (k, P)."""
        if self._method == "double backward":
            return self._products()(vectors)
        return differenced_products(self._placed, vectors, measure.scales, self._samples)[0]

    def _batches(self, measure: Yardstick, suspects: dict[range, Mask] | None) -> Iterator[tuple[Vector, list[range]]]:
        """Yield directions with the columns that they are on, as many at a time as memory has room for."""
        size = self._hessian.shape[0]
        spans = [cols for cols in _column_groups(self._hessian.manifest) for _ in range(DIRECTIONS)]
        spans += [range(row, row + 1) for row in self._rows]
        spans = [cols for cols in spans if suspects is None or cols in suspects]
        room = max(1, VECTOR_BYTES // (8 * size))
        for start in range(0, len(spans), room):
            some = spans[start : start + room]
            yield self._along(measure, some), some

    def _along(self, measure: Yardstick, spans: Sequence[range]) -> Vector:
        """Draw a direction on the columns of each span.  # shape: (spans, P)."""
        vectors = np.zeros((len(spans), self._hessian.shape[0]))
        for vector, cols in zip(vectors, spans, strict=True):
            place = slice(cols.start, cols.stop)
            vector[place] = directions(self._random, measure.scales[place])
        return vectors

    def _read(self, vectors: Vector, only: Mask | None = None) -> Vector:
        """Multiply the stored matrix, or some rows, and check it on the way; the files once, which is enough."""
        self._scan = Scan(self._hessian, vectors, parquet=self._parquet and not self._files, only=only)
        self._files = self._files or self._scan.files
        return self._scan.products

    def _by_block(self, errors: Vector, spans: list[range]) -> dict[tuple[str, range], float]:
        """Return the worst error of each row parameter against the columns of each direction."""
        worst: dict[tuple[str, range], float] = {}
        for found, cols in zip(errors, spans, strict=True):
            for a in self._parameters:
                if self._plan.covers(a.span, cols):
                    worst[a.name, cols] = max(worst.get((a.name, cols), 0.0), float(found[a.place].max()))
        return worst

    def _located(self, measure: Yardstick, row: str, cols: range) -> tuple[tuple[str, str], float]:
        """Name the block of the rows and some columns that is furthest off, each parameter's columns by themselves.

        Returns:
            The block, and by how much the reference changes there as the weights move by their last bit.
        """
        segments = list(self._hessian.parameters.segments(cols))
        vectors, rows = self._along(measure, [span for _, span in segments]), self._hessian.parameters[row].place
        truth = self._truth(vectors, measure)
        errors = measure.errors(self._read(vectors), truth, self._tolerance)
        worst, unsteady = int(errors[:, rows].max(1).argmax()), 0.0
        if self._method == "double backward":
            some = slice(worst, worst + 1)
            moved = [self._products(seed=seed)(vectors[some]) for seed in range(MOVED)]
            unsteady = max(float(measure.errors(each, truth[some], self._tolerance)[0, rows].max()) for each in moved)
        return (row, segments[worst][0].name), unsteady

    def _sampled_rows(self) -> list[int]:
        """Choose the last rows of some parameters."""
        last = [p.span.stop - 1 for p in self._parameters]
        if len(last) > SAMPLED_ROWS:
            last = [last[-1], *self._random.choice(last[:-1], SAMPLED_ROWS - 1, replace=False)]
        return sorted(map(int, last))

    def _worst_entry(self, errors: Vector, spans: list[range]) -> Entry | None:
        """Return the worst entry of the rows that were compared entry by entry."""
        layout, worst = self._hessian.parameters, None
        for found, cols in zip(errors, spans, strict=True):
            if cols.start not in self._rows or len(cols) > 1:
                continue
            for a in self._parameters:
                if self._plan.covers(a.span, cols):
                    col = a.offset + int(found[a.place].argmax())
                    if worst is None or found[col] > worst[2]:
                        b = next(layout.segments(cols))[0]
                        worst = cols.start, col, float(found[col]), b.name, a.name
        return worst

    def _unconfirmed(self, measure: Yardstick) -> list[str]:
        """Name the parameters at which differences of the gradient do not confirm the reference.

        Where double backward computed H, the reference is no other. Preflight held it against differences on a few
        samples; over all data kinks are so dense that steps seldom agree, or agree on what lies behind them: what does
        not confirm is said, and is no error.

        Returns:
            Their names.
        """
        vector = measure.directions(self._random, 1)
        found, gaps = differenced_products(self._placed, vector, measure.scales, self._samples, NEAR)
        parts = by_parameter(self._placed, found[0] / measure.scales)
        truth = by_parameter(self._placed, self._truth(vector, measure)[0] / measure.scales)
        return [
            p.name
            for p, a, b, size, gap in zip(self._placed.layout, parts, truth, own_sizes(parts), gaps[0], strict=True)
            if p.size and not (gap <= AGREED and float(np.abs(a - b).max()) <= CONFIRMED * size)
        ]
