"""A Hessian as the precision of a Laplace posterior, for the library laplace-torch."""

from typing import TYPE_CHECKING, Any, Literal

from pipeline.analysis.bridges import Bridges
from pipeline.analysis.solve import MARGIN, Solve
from pipeline.errors import BlockError, FingerprintError, IndefiniteError, SpecError

if TYPE_CHECKING:
    import torch
    from laplace import FullLaplace

ARRAYS = 4  # of P x P: H, what laplace-torch fills with zeros before, the precision, and its factor


class Posterior(Bridges, Solve):
    """Of a Hessian: the Gaussian about the weights."""

    def to_laplace(
        self,
        model: "torch.nn.Module",
        likelihood: Literal["classification", "regression"],
        example: "torch.Tensor",
        *,
        factor: float | None = None,
        **options: Any,
    ) -> "FullLaplace":
        """Return laplace-torch's posterior N(theta, (factor H / sigma^2 + prior precision)^-1), fitted by this H.

        That of `FullLaplace(model, likelihood, backend=CurvlinopsHessian)` after `fit`; theta is to be a minimum. One
        read, four arrays of P x P in the model's type, P^3 / 3 operations to see that it is definite. An L2 term of the
        run is no part of the likelihood, and is taken off: the prior stands for it (Daxberger et al., NeurIPS 2021).

        Args:
            model: with the weights that H is of, and those parameters trainable that H has.
            likelihood: `"classification"`, of a cross entropy; `"regression"`, of squared errors.
            example: an input, or a batch of some, to see how many outputs there are.
            factor: the negative log likelihood of all data is factor L, at noise one; when None, what undoes the mean
                of `CrossEntropyLoss`, or half of that of `MSELoss`.
            options: of `laplace.FullLaplace`, as `prior_precision` and `sigma_noise`.

        Returns:
            The posterior, for prediction, sampling and `log_marginal_likelihood`.

        Raises:
            SpecError: laplace-torch is not installed.
            BlockError: the model's trainable parameters are not those of H, or there is no such likelihood.
            FingerprintError: its weights are not those that H is of.
            IndefiniteError: the precision is not positive definite.
            MemoryRefusedError: it does not fit into memory.
            IncompleteError: not all of H was computed.
        """
        try:
            from laplace import FullLaplace
        except ImportError:
            raise SpecError("laplace-torch is not installed: python3 -m pip install laplace-torch") from None
        if likelihood not in {"classification", "regression"}:
            raise BlockError(f"to_laplace: got likelihood={likelihood!r}, expected 'classification' or 'regression'")
        self._require_model(model)
        made = self.manifest.fingerprint
        if factor is None:
            factor = (made.weight if made.reduction == "mean" else 1.0) * (0.5 if likelihood == "regression" else 1.0)
        found = FullLaplace(model, likelihood, **options)
        found.load_state_dict({**found.state_dict(), **self._fitted(model, example, factor)})
        self._require_definite(found, factor)
        return found

    def _require_model(self, model: "torch.nn.Module") -> None:
        """Refuse a model that H is not of."""
        from pipeline.problem.batches import weights_digest

        ours = [(p.name, p.shape) for p in self.parameters]
        theirs = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        if ours != theirs:
            differing = sorted({name for name, _ in set(ours) ^ set(theirs)})[:3] or "their order"
            raise BlockError(
                f"to_laplace: the model's trainable parameters are not those of H ({differing}): set requires_grad of "
                "those that H has, or take H.select(...)"
            )
        tensors = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
        if weights_digest(tensors) != self.manifest.fingerprint.weights:
            raise FingerprintError(
                f"{self.url}: H is of other weights than the model has: load those it was computed at"
            )
        item = next(iter(tensors.values())).element_size() if tensors else 0
        self.require_memory(ARRAYS * item * self.shape[0] ** 2, "a full Laplace posterior", "take H.select(...)")

    def _fitted(self, model: "torch.nn.Module", example: "torch.Tensor", factor: float) -> dict[str, Any]:
        """Return what `fit` would set, of sums over all data."""
        import torch

        trainable = [p for p in model.parameters() if p.requires_grad]
        mean, made = torch.nn.utils.parameters_to_vector(trainable).detach(), self.manifest.fingerprint
        with torch.no_grad():
            outputs = model.eval()(example).shape[-1]
        precision = torch.from_numpy(self.to_numpy("float64" if mean.dtype == torch.float64 else "float32"))
        precision.diagonal().sub_(made.l2)
        names = set(self.manifest.layout.names)  # those outside of this view, too: an L2 term is over them all
        squares = sum(float(p.detach().double().square().sum()) for n, p in model.named_parameters() if n in names)
        loss = torch.tensor(factor * (made.loss - made.l2 / 2 * squares), dtype=mean.dtype, device=mean.device)
        precision = precision.mul_(factor).to(mean)
        return {"mean": mean, "H": precision, "loss": loss, "n_data": made.samples, "n_outputs": outputs}

    def _require_definite(self, posterior: "FullLaplace", factor: float) -> None:
        """Refuse a precision that is none, and say which prior would do."""
        import torch

        if not torch.linalg.cholesky_ex(posterior.posterior_precision)[1]:
            return
        smallest = float(self.eigsh(1, "SA", return_eigenvectors=False, tol=1e-6)[0]) - self.manifest.fingerprint.l2
        enough = MARGIN * max(-smallest, 0.0) * factor / float(posterior.sigma_noise.square() * posterior.temperature)
        raise IndefiniteError(
            f"to_laplace: the posterior's precision is not positive definite: the smallest eigenvalue of H found is "
            f"{smallest:.6g}; prior_precision={enough:.3g} would do, or a minimum, where H is definite",
            smallest,
            enough,
        )
