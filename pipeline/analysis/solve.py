"""Linear systems with a Hessian: solutions, log-determinant, parts of the inverse."""

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.linalg import lapack

from pipeline.analysis.cholesky import DiskFactor, NotDefiniteError
from pipeline.analysis.lanczos import Vector
from pipeline.analysis.minres import solve_by_minres
from pipeline.analysis.one_pass import OnePass
from pipeline.analysis.spectrum import Spectrum
from pipeline.analysis.view import Multiply
from pipeline.errors import BlockError, IndefiniteError
from pipeline.planning.memory import available_bytes

BLOCK = 1024  # rows of a block of the preconditioner, as memory allows
SHARE_OF_BLOCKS = 0.25  # of free memory
FLATTEST = 1e-6  # of a block's largest eigenvalue: directions flatter than that are taken to be so curved
MARGIN = 1.01  # over the damping that would just do
_F8 = 8  # bytes
_EPS = np.finfo(float).eps


class Solve(Spectrum, OnePass):
    """Of a Hessian: systems (H + damping I) x = b. In float64, whatever the stored type."""

    def solve(
        self,
        b: npt.ArrayLike,
        damping: float = 0.0,
        *,
        method: Literal["auto", "direct", "minres", "cholesky"] = "auto",
        tol: float = 1e-8,
        steps: int = 1000,
        scratch: str | Path | None = None,
    ) -> Vector:
        """Solve (H + damping I) x = b; H may be indefinite.

        Directly: one read, 8 P^2 bytes, P^3 / 3 operations, by Cholesky's factors; where there are none one more read
        and those of Bunch and Kaufman (LAPACK's dpotrf, dsytrf). By MINRES: one read a step for all columns, 80 P k
        bytes, with the inverses of chunks on the diagonal to precondition it, 8 P bytes for each of up to 1,024 rows.

        Args:
            b: # shape: (P,) or (P, k)
            damping: added to the diagonal.
            method: `"direct"`, `"minres"`, `"cholesky"`, by a factor on a local disk, see `cholesky`; or `"auto"`:
                directly where the matrix fits into memory, else by MINRES.
            tol: of MINRES, |b - (H + damping I) x| <= tol |b|.
            steps: most reads of MINRES.
            scratch: see `cholesky`.

        Returns:
            x.  # shape: as `b`

        Raises:
            BlockError: b does not fit.
            IndefiniteError: H + damping I is singular; for `"cholesky"`, not positive definite.
            MemoryRefusedError: it is to be solved directly, and does not fit into memory.
            OutputError: there is no room for the factor.
            ConvergenceError: MINRES takes more steps.
            IncompleteError: not all of H was computed.
        """
        right = np.asarray(b, dtype=np.float64)
        P = self.shape[0]
        if right.ndim not in {1, 2} or len(right) != P:
            raise BlockError(f"solve: got b of shape {right.shape}, expected ({P},) or ({P}, k)")
        if method not in {"auto", "direct", "minres", "cholesky"}:
            raise BlockError(f"solve: got method={method!r}, expected 'auto', 'direct', 'minres' or 'cholesky'")
        columns = right.reshape(P, -1)
        if method == "cholesky":
            with self.cholesky(damping, scratch) as factor:
                return factor.solve(columns).reshape(right.shape)
        if method == "direct" or (method == "auto" and available_bytes() >= _F8 * P * P):
            return self._directly(columns, damping).reshape(right.shape)
        multiply, precondition = self.multiplier(), self._preconditioner(damping)
        x = solve_by_minres(lambda v: multiply(v) + damping * v, precondition, columns, tol=tol, steps=steps)
        return x.reshape(right.shape)

    def logdet(
        self,
        damping: float = 0.0,
        *,
        method: Literal["direct", "cholesky"] = "direct",
        scratch: str | Path | None = None,
    ) -> float:
        """Return log det (H + damping I), by Cholesky: one read, 8 P^2 bytes, P^3 / 3 operations.

        Beyond memory by a factor on a local disk; or estimated, by `H.spectral_density(...).trace_of(...)`.

        Args:
            damping: added to the diagonal.
            method: `"direct"`, in memory, or `"cholesky"`, by a factor on a local disk, see `cholesky`.
            scratch: see `cholesky`.

        Returns:
            The natural logarithm.

        Raises:
            BlockError: there is no such method.
            IndefiniteError: it is not positive definite.
            MemoryRefusedError: the matrix does not fit into memory.
            OutputError: there is no room for the factor.
            IncompleteError: not all of H was computed.
        """
        if method not in {"direct", "cholesky"}:
            raise BlockError(f"logdet: got method={method!r}, expected 'direct' or 'cholesky'")
        if method == "cholesky":
            with self.cholesky(damping, scratch) as factor:
                return factor.logdet
        return float(2 * np.log(self._definite(damping).diagonal()).sum())

    def cholesky(self, damping: float = 0.0, scratch: str | Path | None = None) -> DiskFactor:
        """Factorise H + damping I on a local disk, whatever fits into memory: a factor for several solves.

        `with H.cholesky(damping) as factor: factor.solve(b), factor.logdet`; the factor is removed at its end. One read
        of H; cost and room are those of `pipeline.analysis.cholesky.DiskFactor`.

        Args:
            damping: added to the diagonal.
            scratch: a folder on a local disk; the system's for temporary files when None.

        Returns:
            The factor.

        Raises:
            IndefiniteError: it is not positive definite.
            MemoryRefusedError: not even a panel of it fits into memory.
            OutputError: there is no room on the disk.
            SpecError: dask is not installed.
            IncompleteError: not all of H was computed.
        """
        P = self.shape[0]
        try:
            return DiskFactor(self.entries, P, min(self.manifest.chunk, P), damping, scratch, self.report)
        except NotDefiniteError:
            raise self._indefinite(damping) from None

    def inverse_diagonal(
        self,
        damping: float = 0.0,
        *,
        method: Literal["auto", "direct", "cholesky"] = "auto",
        scratch: str | Path | None = None,
    ) -> Vector:
        """Return the diagonal of (H + damping I)^-1: of a posterior of that precision, the marginal variances.

        In memory one read, 8 P^2 bytes, P^3 operations (LAPACK's dpotrf, dpotri); beyond it by a factor on a local
        disk, 2 P^3 / 3 operations, see `pipeline.analysis.cholesky.DiskFactor`.

        Args:
            damping: added to the diagonal.
            method: `"direct"`, in memory, `"cholesky"`, by a factor on a local disk, or `"auto"`: in memory where the
                matrix fits.
            scratch: see `cholesky`.

        Returns:
            # shape: (P,)

        Raises:
            BlockError: there is no such method.
            IndefiniteError: it is not positive definite.
            MemoryRefusedError: it is to be in memory, and does not fit.
            OutputError: there is no room for the factor.
            IncompleteError: not all of H was computed.
        """
        if method not in {"auto", "direct", "cholesky"}:
            raise BlockError(f"inverse_diagonal: got method={method!r}, expected 'auto', 'direct' or 'cholesky'")
        if method == "cholesky" or (method == "auto" and available_bytes() < _F8 * self.shape[0] ** 2):
            with self.cholesky(damping, scratch) as factor:
                return factor.inverse_diagonal()
        inverse, _ = lapack.dpotri(self._definite(damping), lower=1, overwrite_c=1)
        return np.array(inverse.diagonal())

    def inverse_block(self, a: str, b: str, damping: float = 0.0) -> Vector:
        """Return a block of (H + damping I)^-1, the inverse of the whole, by solving for the columns of b.

        Args:
            a: a parameter.
            b: a parameter; the fewer entries it has, the cheaper.
            damping: added to the diagonal.

        Returns:
            # shape: a.shape + b.shape

        Raises:
            BlockError: there is no such parameter.
            HessianError: see `solve`.
        """
        p, q = self.parameters[a], self.parameters[b]
        columns = np.zeros((self.shape[0], q.size))
        columns[q.place] = np.eye(q.size)
        return self.solve(columns, damping)[p.place].reshape(p.shape + q.shape)

    def _damped(self, damping: float) -> Vector:
        """Read H + damping I, in LAPACK's order."""
        remedy = "take solve(b, method='minres'), method='cholesky' on a disk, or H.select(...)"
        self.require_memory(_F8 * self.shape[0] ** 2, "a factor of H", remedy)
        full = self.to_numpy(np.float64).T
        full[np.diag_indices(len(full))] += damping
        return full

    def _cholesky(self, damping: float) -> Vector | None:
        """Factorise, in the lower triangle; None where it is not positive definite, or is so by rounding alone."""
        full = self._damped(damping)
        length = lapack.dlange("1", full)
        factor, info = lapack.dpotrf(full, lower=1, clean=0, overwrite_a=1)
        return factor if info == 0 and lapack.dpocon(factor, length, uplo="L")[0] > _EPS else None

    def _definite(self, damping: float) -> Vector:
        """Factorise, or say which damping would do."""
        factor = self._cholesky(damping)
        if factor is None:
            raise self._indefinite(damping)
        return factor

    def _directly(self, b: Vector, damping: float) -> Vector:
        factor = self._cholesky(damping)
        if factor is not None:
            x, _ = lapack.dpotrs(factor, b, lower=1)
            return np.asarray(x)
        full = self._damped(damping)
        length = lapack.dlange("1", full)
        factor, pivots, info = lapack.dsytrf(full, lower=1, overwrite_a=1)
        reciprocal, _ = lapack.dsycon(factor, pivots, length, lower=1)
        if info > 0 or reciprocal < _EPS:
            raise self._indefinite(damping)
        x, _ = lapack.dsytrs(factor, pivots, b, lower=1)
        return np.asarray(x)

    def _indefinite(self, damping: float) -> IndefiniteError:
        """Look for the smallest eigenvalue, and for a damping that lifts it off zero by more than rounding."""
        w = self.eigsh(1, "SA", return_eigenvectors=False, tol=1e-6)[0]
        rounding = self.shape[0] * np.finfo(self.dtype).eps * self.norm(1)
        enough = float(MARGIN * (max(-w, 0.0) + rounding))
        return IndefiniteError(
            f"H + {damping:g} I is singular or not positive definite: the smallest eigenvalue of H found is {w:.6g}; "
            f"damping={enough:.3g} would do",
            float(w),
            enough,
        )

    def _preconditioner(self, damping: float) -> Multiply:
        """Return X -> M X, M being |D|^-1 of blocks D on the diagonal of H + damping I: chunks, cut where large."""
        P = self.shape[0]
        side = int(min(BLOCK, max(SHARE_OF_BLOCKS * available_bytes() // (_F8 * P), 1)))
        inverses: list[tuple[slice, Vector]] = []
        for piece in self.pieces(diagonal=True):
            for start in range(0, len(piece.values), side):
                here = slice(start, start + side)
                block = _absolute_inverse(piece.values[here, here].astype(np.float64), damping)
                first = piece.rows.start + start
                inverses.append((slice(first, first + len(block)), block))

        def precondition(v: Vector) -> Vector:
            return np.concatenate([inverse @ v[place] for place, inverse in inverses])

        return precondition


def _absolute_inverse(block: Vector, damping: float) -> Vector:
    """Invert the absolute value of a symmetric matrix: MINRES needs a definite preconditioner."""
    w, U = scipy.linalg.eigh(block, check_finite=False)
    sizes = np.abs(w + damping)
    sizes = np.maximum(sizes, max(FLATTEST * sizes.max(initial=0), np.finfo(float).tiny))
    return np.asarray((U / sizes) @ U.T)
