"""Eigenvalues of a Hessian: all of them in memory, those at the ends and their density at any size."""

from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.linalg

from pipeline.analysis.devices import chosen, placed
from pipeline.analysis.lanczos import SpectralDensity, Vector, Which, extreme_eigenpairs, lanczos_density, ranked
from pipeline.analysis.products import Products
from pipeline.errors import BlockError
from pipeline.planning.memory import available_bytes

FEW = 8  # vectors of a block at least: a read costs the same
SPARE = 4  # vectors beside those wanted, for the last of them to converge as fast
DENSE_UP_TO = 256  # rows: all eigenvalues by LAPACK are found at once
BLOCKS = range(4, 21)  # of vectors in a basis, as memory allows
SHARE_OF_BASIS = 0.25  # of free memory
REMEDY = "take H.eigsh(k), H.spectral_density(), or H.select(...)"
_F8 = 8  # bytes


class Inertia(NamedTuple):
    """Numbers of eigenvalues of each sign."""

    positive: int
    zero: int
    negative: int


class Spectrum(Products):
    """Of a Hessian: its eigenvalues.

    LAPACK works in float64 whatever the stored type: in float32 it was off by 1.7e-6 of the largest eigenvalue, where
    rounding what is stored costs 4e-9 (P = 1,500).
    """

    def eigvalsh(self, device: str | None = None) -> Vector:
        """Return all eigenvalues: one read, 4/3 P^3 operations, 8 P^2 bytes; kept, O(P), for the next call.

        Args:
            device: of torch, to compute on; a GPU where there is one, and three such matrices fit, when None.

        Returns:
            Ascending, right to rounding of the largest (LAPACK's or cuSOLVER's dsyevd).  # shape: (P,)

        Raises:
            MemoryRefusedError: the matrix does not fit into memory.
            IncompleteError: not all of H was computed.
        """
        if device is not None:
            self.__dict__["_eigenvalues"] = self._all(device)
        return self._eigenvalues.copy()

    def eigh(self, device: str | None = None) -> tuple[Vector, Vector]:
        """Return all eigenvalues and eigenvectors: one read, some 4 P^3 operations, 16 P^2 bytes (LAPACK's dsyevr).

        Args:
            device: see `eigvalsh`; four matrices there.

        Returns:
            Eigenvalues, ascending, and vectors in columns.  # shape: (P,), (P, P)

        Raises:
            MemoryRefusedError: they do not fit into memory.
            IncompleteError: not all of H was computed.
        """
        square = _F8 * self.shape[0] ** 2
        self.require_memory(2 * square, "eigh", REMEDY)
        if (on := chosen(device, 4 * square)) is not None:
            import torch

            found = torch.linalg.eigh(placed(self.to_numpy(np.float64), np.dtype(np.float64), on))
            return found.eigenvalues.cpu().numpy(), found.eigenvectors.cpu().numpy()
        w, U = scipy.linalg.eigh(self.to_numpy(np.float64).T, driver="evr", overwrite_a=True, check_finite=False)
        return w, U

    def inertia(self, tol: float | None = None) -> Inertia:
        """Count positive, zero and negative eigenvalues; see `eigvalsh` for cost and errors.

        Args:
            tol: what is at most that in absolute value is zero; P eps max|w|, eps of the stored type, when None.

        Returns:
            The numbers.
        """
        w, tol = self._eigenvalues, self._zero(tol)
        positive, negative = int((w > tol).sum()), int((w < -tol).sum())
        return Inertia(positive, len(w) - positive - negative, negative)

    def rank(self, tol: float | None = None) -> int:
        """Count eigenvalues that are not zero; see `inertia`."""
        return int((np.abs(self._eigenvalues) > self._zero(tol)).sum())

    def condition_number(self) -> float:
        """Return max|w| / min|w|, infinite where an eigenvalue is zero; see `eigvalsh` for cost and errors."""
        sizes = np.abs(self._eigenvalues)
        return float(sizes.max() / sizes.min()) if sizes.min() > 0 else float("inf")

    def layer_spectra(self) -> dict[str, Vector]:
        """Return the eigenvalues of each parameter's own block, by name; see `eigvalsh`. Only these blocks are read."""
        return {view.parameters.names[0]: view.eigvalsh() for view in self.block_diagonal()}

    def eigsh(
        self,
        k: int = 6,
        which: Literal["LM", "SM", "LA", "SA", "BE"] = "LM",
        *,
        tol: float = 1e-8,
        steps: int = 300,
        return_eigenvectors: bool = True,
        seed: int = 0,
    ) -> Any:
        """Find some eigenvalues, as `scipy.sparse.linalg.eigsh` does, a read of the store for a block of vectors.

        H is held in memory where it fits into half of what is free, else read once a step; the basis takes 32 P bytes
        for each of 4 (k + 4) to 20 (k + 4) vectors. An eigenvalue is off by at most tol |H|, in practice by its square.

        Args:
            k: how many.
            which: `"LM"` largest in absolute value, `"LA"` largest, `"SA"` smallest, `"BE"` half from each end; `"SM"`,
                smallest in absolute value, of a matrix in memory alone.
            tol: of the residual |H u - w u| / |H|; 0: as far as rounding allows.
            steps: most reads.
            return_eigenvectors: whether to give them, too.
            seed: of the first vectors.

        Returns:
            Eigenvalues, ascending, and vectors in columns, (P,) and (P, k); or the eigenvalues alone.

        Raises:
            BlockError: there are no k eigenvalues, or no such end.
            MemoryRefusedError: the basis does not fit into memory; or all of H, where it has to.
            ConvergenceError: more steps are needed.
            IncompleteError: not all of H was computed.
        """
        P = self.shape[0]
        if not 1 <= k <= P:
            raise BlockError(f"eigsh: got k={k}, expected 1 to {P}")
        if which not in {"LM", "SM", "LA", "SA", "BE"}:
            raise BlockError(f"eigsh: got which={which!r}, expected 'LM', 'SM', 'LA', 'SA' or 'BE'")
        width = max(FEW, k + SPARE)
        if which == "SM" or max(DENSE_UP_TO, 2 * width) >= P:
            w, U = self._some_of_all(k, which)
        else:
            start = np.random.default_rng(seed).standard_normal((P, width))
            most, tol = width * self._blocks(width), max(tol, P * float(np.finfo(float).eps))
            w, U = extreme_eigenpairs(self.multiplier(), start, k, which, most=most, tol=tol, steps=steps)
        return (w, U) if return_eigenvectors else w

    def spectral_density(self, probes: int = 8, steps: int = 64, *, seed: int = 0) -> SpectralDensity:
        """Estimate how the eigenvalues are spread: `steps` reads for all probes together, or one in memory.

        Stochastic Lanczos quadrature; an estimate, with standard errors over the probes. 40 P probes bytes.

        Args:
            probes: random vectors; errors fall with their root.
            steps: of Lanczos; the more, the finer.
            seed: of the vectors.

        Returns:
            The estimate: numbers of eigenvalues below a value or in bins, and traces of functions of H.

        Raises:
            BlockError: there is nothing to do.
            MemoryRefusedError: the vectors do not fit into memory.
            IncompleteError: not all of H was computed.
        """
        P = self.shape[0]
        if probes < 1 or steps < 1 or not P:
            raise BlockError(
                f"spectral_density: got probes={probes}, steps={steps} for P={P}, expected 1 or more of each"
            )
        self.require_memory(5 * _F8 * P * probes, f"Lanczos from {probes} vectors", "take fewer `probes`")
        signs = np.random.default_rng(seed).integers(0, 2, (P, probes)) * 2.0 - 1
        return lanczos_density(self.multiplier(), signs / np.sqrt(P), steps)

    @cached_property
    def _eigenvalues(self) -> Vector:
        return self._all(None)

    def _all(self, device: str | None) -> Vector:
        square = _F8 * self.shape[0] ** 2
        self.require_memory(square, "eigvalsh", REMEDY)
        full = self.to_numpy(np.float64)
        w: Vector
        if (on := chosen(device, 3 * square)) is not None:
            import torch

            w = torch.linalg.eigvalsh(placed(full, full.dtype, on)).cpu().numpy()
        else:  # in LAPACK's order: not copied
            w = scipy.linalg.eigvalsh(full.T, driver="evd", overwrite_a=True, check_finite=False)
        return w

    def _zero(self, tol: float | None) -> float:
        if tol is not None:
            return tol
        return float(self.shape[0] * np.finfo(self.dtype).eps * np.abs(self._eigenvalues).max(initial=0))

    def _some_of_all(self, k: int, which: Which) -> tuple[Vector, Vector]:
        """Choose among all eigenpairs."""
        w, U = self.eigh()
        chosen = np.sort(ranked(w, which)[:k])
        return w[chosen], U[:, chosen]

    def _blocks(self, width: int) -> int:
        """Say how many blocks of vectors a basis may have: it, its image, and both again while they are renewed."""
        one = 4 * _F8 * self.shape[0] * width
        self.require_memory(BLOCKS.start * one, f"eigsh: a basis of {BLOCKS.start * width} vectors", "take a smaller k")
        return int(min(max(SHARE_OF_BASIS * available_bytes() // one, BLOCKS.start), BLOCKS.stop - 1))
