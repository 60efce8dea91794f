"""Proof on the finished matrix, by paths that share nothing with the engine that computed it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import IncompleteError
from pipeline.handle import Hessian, open_hessian
from pipeline.identity import require_same
from pipeline.layout import Parameter
from pipeline.planner import REFERENCE_MICROBATCH
from pipeline.problem import PlacedProblem, Problem, exact_kernels, unchanged
from pipeline.reference import Vector, differenced_products, hessian_vector_products
from pipeline.store import chunk_key

TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # block error of a product
DIFFERENCES_TOLERANCE = 1e-5  # the same where differences of the gradient are the reference
STEPS = (1e-2, 1e-3, 1e-4, 1e-5)  # lengths of the shift in parameter space; two neighbours must agree
VECTOR_BYTES = 256 * 2**20  # of directions multiplied in one pass over the store
SAMPLED_ROWS = 16  # recomputed entry by entry from the other side of the diagonal
ROUNDING = 16 * float(np.finfo(np.float64).eps)
FLOOR = 1e-9  # of max|H|, in the denominator of a block error


@dataclass(frozen=True)
class Verification:
    """What was checked, and what was found.

    Attributes:
        ok: nothing is wrong.
        chunks: stored chunks read back against their checksums.
        faults: chunks that are missing, damaged, or not the mirror image of their partner.
        method: of the reference: "double backward", "differences", or None when there was no problem at hand.
        blocks: pairs of parameters compared.
        worst_block: the pair with the largest block error.
        block_error: that error.
        sampled_rows: rows recomputed entry by entry from the other side of the diagonal.
        worst_entry: row, column and block error of the worst sampled entry.
        tolerance: that errors are held against.
        inconclusive: pairs at which no two steps of the differences agreed.
    """

    ok: bool
    chunks: int
    faults: list[str]
    method: str | None = None
    blocks: int = 0
    worst_block: tuple[str, str] | None = None
    block_error: float = 0.0
    sampled_rows: int = 0
    worst_entry: tuple[int, int, float] | None = None
    tolerance: float | None = None
    inconclusive: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Give a plain mapping."""
        return asdict(self)

    def summary(self) -> str:
        """Say it in one line."""
        if self.faults:
            return f"{len(self.faults)} of {self.chunks} chunks are at fault, the first: {self.faults[0]}"
        if self.method is None:
            return f"{self.chunks} chunks present, checksums right; numbers not checked (no problem given)"
        found = (
            f"{self.chunks} chunks, {self.blocks} blocks against {self.method}, {self.sampled_rows} rows entry by "
            f"entry: block error {self.block_error:.1e}, tolerance {self.tolerance:.0e}"
        )
        if self.inconclusive:
            a, b = self.inconclusive[0]
            return f"{found}; inconclusive at {len(self.inconclusive)} blocks, the first H[{a}, {b}]"
        return found if self.ok else f"{found}; worst is {self._worst()}"

    def _worst(self) -> str:
        entry = self.worst_entry
        if entry is not None and entry[2] >= self.block_error:
            return f"entry ({entry[0]}, {entry[1]}), off by {entry[2]:.1e}"
        a, b = self.worst_block or ("?", "?")
        return f"block H[{a}, {b}]"


def verify_hessian(hessian: Hessian | str, problem: Problem | None = None) -> Verification:
    """Check a finished Hessian.

    Every chunk must be present and match its checksum, and its mirror image where the matrix is stored whole. With the
    problem at hand, H v is compared with plain double backward in float64 (differences of the gradient for rows that
    were computed by double backward), for v supported on one parameter at a time, row parameter by row parameter; and
    some rows are recomputed entry by entry from the other side of the diagonal.

    Args:
        hessian: a handle, or the output's URL.
        problem: what it is the Hessian of; without it only chunks and checksums are checked.

    Returns:
        What was found.

    Raises:
        FingerprintError: it is not the Hessian of that problem.
        OutputError: there is no Hessian.
        IncompleteError: the run is not finished.
    """
    hessian = open_hessian(hessian) if isinstance(hessian, str) else hessian
    if problem is None:
        scan = _Scan(hessian, np.zeros((0, hessian.shape[0])))
        return Verification(ok=not scan.faults, chunks=scan.chunks, faults=scan.faults)
    same = require_same(problem.select(hessian.parameters.names), hessian.manifest, hessian.output)
    return check(hessian, same)


def check(hessian: Hessian, problem: Problem) -> Verification:
    """Check a Hessian against its problem, which is known to be the same; see `verify_hessian`."""
    with unchanged(problem.model), exact_kernels():
        return _Check(hessian, problem.place(torch.float64)).run()


class _Scan:
    """One pass over the store: every chunk checked, and products with vectors on the way.

    Attributes:
        chunks: read, mirrors included.
        faults: what is wrong, one line a chunk.
        products: H V'.  # shape: (k, P)
        largest: max|H_aa| by parameter; max|H| where that block was not computed.
    """

    def __init__(self, hessian: Hessian, vectors: Vector) -> None:
        self.faults: list[str] = []
        self.chunks = 0
        self.products = np.zeros_like(vectors)
        self.largest = {p.name: 0.0 for p in hessian.parameters}
        self._hessian, self._store = hessian, hessian.store
        plan, maximum = hessian.manifest.plan, 0.0
        for i, j in np.argwhere(plan.selected):
            chunk = self._checked(int(i), int(j))
            if chunk is None:
                continue
            rows, cols = plan.span(range(i, i + 1)), plan.span(range(j, j + 1))
            self._multiply(chunk, rows, cols, vectors)
            self._measure(chunk, rows, cols)
            maximum = max(maximum, float(np.abs(chunk).max()))
        for p in hessian.parameters:
            if not plan.covers(p.span, p.span):
                self.largest[p.name] = maximum

    def _checked(self, i: int, j: int) -> npt.NDArray[np.float64] | None:
        """Read a chunk and its mirror image."""
        chunk = self._read(i, j)
        if i != j and self._hessian.manifest.symmetry == "mirrored":
            mirror = self._read(j, i)
            if chunk is not None and mirror is not None and not np.array_equal(chunk, mirror.T):
                self.faults.append(f"{chunk_key(j, i)} is not the mirror image of {chunk_key(i, j)}")
        if i == j and chunk is not None and not np.array_equal(chunk, chunk.T):
            self.faults.append(f"{chunk_key(i, j)} is not symmetric")
        return chunk

    def _read(self, i: int, j: int) -> npt.NDArray[np.float64] | None:
        self.chunks += 1
        try:
            return self._store.read_chunk(i, j).astype(np.float64)
        except IncompleteError as error:
            self.faults.append(str(error))
            return None

    def _multiply(self, chunk: npt.NDArray[np.float64], rows: range, cols: range, vectors: Vector) -> None:
        self.products[:, _slice(rows)] += vectors[:, _slice(cols)] @ chunk.T
        if rows != cols:
            self.products[:, _slice(cols)] += vectors[:, _slice(rows)] @ chunk

    def _measure(self, chunk: npt.NDArray[np.float64], rows: range, cols: range) -> None:
        """Note the largest entries of diagonal blocks."""
        for p, r in self._hessian.parameters.segments(rows):
            c = range(max(cols.start, p.offset), min(cols.stop, p.span.stop))
            if c:
                part = chunk[r.start - rows.start : r.stop - rows.start, c.start - cols.start : c.stop - cols.start]
                self.largest[p.name] = max(self.largest[p.name], float(np.abs(part).max()))


class _Check:
    """The comparison with a reference."""

    def __init__(self, hessian: Hessian, placed: PlacedProblem) -> None:
        self._hessian, self._placed = hessian, placed
        manifest = hessian.manifest
        self._weight, self._plan = manifest.fingerprint.weight, manifest.plan
        self._by_rows = "rows" in manifest.engines.values()
        stored = TOLERANCE[manifest.store_dtype]
        self._tolerance = max(TOLERANCE[manifest.dtype], stored, DIFFERENCES_TOLERANCE if self._by_rows else 0.0)
        self._parameters = [p for p in hessian.parameters if p.size]
        self._random = np.random.default_rng(0)

    def run(self) -> Verification:
        """Scan, multiply, compare."""
        errors: dict[tuple[str, str], float] = {}
        inconclusive: list[tuple[str, str]] = []
        scan = None
        for group in self._groups():
            vectors = np.stack([self._direction(p) for p in group])
            scan = _Scan(self._hessian, vectors)
            if scan.faults:
                return Verification(ok=False, chunks=scan.chunks, faults=scan.faults)
            references = self._references(vectors)
            for k, b in enumerate(group):
                for a in self._parameters:
                    if self._plan.covers(a.span, b.span):
                        error = self._error(scan, a, b, scan.products[k], [r[k] for r in references])
                        if error is None:
                            inconclusive.append((a.name, b.name))
                        else:
                            errors[a.name, b.name] = error
        if scan is None:
            raise IncompleteError("the Hessian has no entries to check")
        worst = max(errors, key=lambda pair: errors[pair]) if errors else None
        block_error = errors[worst] if worst else 0.0
        sampled, entry = self._sample(scan)
        failed = max(block_error, entry[2] if entry else 0.0) > self._tolerance
        return Verification(
            ok=not (failed or inconclusive),
            chunks=scan.chunks,
            faults=[],
            method="differences" if self._by_rows else "double backward",
            blocks=len(errors),
            worst_block=worst,
            block_error=block_error,
            sampled_rows=sampled,
            worst_entry=entry,
            tolerance=self._tolerance,
            inconclusive=inconclusive,
        )

    def _groups(self) -> Iterator[list[Parameter]]:
        """Give parameters in groups whose directions fit into memory."""
        size = max(1, VECTOR_BYTES // (8 * self._hessian.shape[0]))
        for start in range(0, len(self._parameters), size):
            yield self._parameters[start : start + size]

    def _direction(self, p: Parameter) -> Vector:
        """Give a vector of random signs on one parameter, of length one.  # shape: (P,)."""
        vector = np.zeros(self._hessian.shape[0])
        vector[_slice(p.span)] = self._random.choice((-1.0, 1.0), p.size) / p.size**0.5
        return vector

    def _references(self, vectors: Vector) -> list[Vector]:
        """Give H V' by other means; by several steps where differences are taken.  # shape of each: (k, P)."""
        if not self._by_rows:
            return [hessian_vector_products(self._placed, vectors, self._weight, REFERENCE_MICROBATCH)]
        return [differenced_products(self._placed, vectors, REFERENCE_MICROBATCH, s) for s in STEPS]

    def _error(self, scan: _Scan, a: Parameter, b: Parameter, found: Vector, references: list[Vector]) -> float | None:
        """Give the block error of H_ab v; None where no two neighbouring steps agree."""
        scale = self._scale(scan, a, b)
        parts = [r[_slice(a.span)] for r in references]
        if len(parts) > 1:
            gaps = [float(np.abs(x - y).max()) / scale for x, y in pairwise(parts)]
            best = int(np.argmin(gaps))
            if gaps[best] > self._tolerance:
                return None
            parts = [parts[best + 1]]
        gap = self._beyond_rounding(scan, np.abs(found[_slice(a.span)] - parts[0]))
        return float(gap.max()) / scale

    def _scale(self, scan: _Scan, a: Parameter, b: Parameter) -> float:
        """Give the denominator of a block error; 1 where all of H is zero."""
        return (scan.largest[a.name] * scan.largest[b.name]) ** 0.5 + FLOOR * max(scan.largest.values()) or 1.0

    @staticmethod
    def _beyond_rounding(scan: _Scan, gap: Vector) -> Vector:
        """Take off the rounding of max|H|, which structural zeros carry whatever their own size."""
        return np.maximum(gap - ROUNDING * max(scan.largest.values()), 0)

    def _sample(self, scan: _Scan) -> tuple[int, tuple[int, int, float] | None]:
        """Recompute rows below the diagonal from their own gradient entry and compare every entry left of it."""
        last = [p.span.stop - 1 for p in self._parameters if self._plan.covers(range(p.span.stop), p.span)]
        rows = sorted(
            {*last[-SAMPLED_ROWS // 2 :], *self._random.choice(last, min(len(last), SAMPLED_ROWS // 2))} if last else ()
        )
        if not rows:
            return 0, None
        units = np.zeros((len(rows), self._hessian.shape[0]))
        units[np.arange(len(rows)), rows] = 1
        truth = hessian_vector_products(self._placed, units, self._weight, REFERENCE_MICROBATCH)
        worst = (rows[0], 0, 0.0)
        for row, expected in zip(rows, truth, strict=True):
            found = self._hessian[int(row), : row + 1].astype(np.float64)
            b, _ = next(self._hessian.parameters.segments(range(row, row + 1)))
            for a, cols in self._hessian.parameters.segments(range(row + 1)):
                gap = self._beyond_rounding(scan, np.abs(found[_slice(cols)] - expected[_slice(cols)]))
                gap /= self._scale(scan, a, b)
                if gap.max() > worst[2]:
                    worst = (int(row), cols.start + int(gap.argmax()), float(gap.max()))
        return len(rows), worst


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
