"""The proof's reference products in a worker's place, for drivers whose machine has no GPU."""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.cluster.actors import in_short, options_of, set_up, unpickled
from pipeline.problem.contexts import differentiable, exact_kernels, unchanged
from pipeline.problem.double_backward import Vector
from pipeline.results.reference import Here, Reference
from pipeline.spec import Settings

PLACE_SECONDS = 120.0  # until there is one: those that computed tiles have just left theirs


class _Multiplier:
    """`Reference` in a process of its own."""

    def __init__(self, problem: bytes, samples: int, settings: Settings) -> None:
        device = set_up(settings)
        self._problem = unpickled(problem)
        self._here = Here(self._problem, samples, device)

    def multiply(self, vectors: Vector, weight: float, dtype: str, seed: int | None) -> Vector:
        """See `Reference`."""
        with differentiable(), unchanged(*self._problem.modules), exact_kernels(self._problem.model):
            return self._here.multiply(vectors, weight, dtype, seed)


class There:
    """`Reference` in a worker's place, as long as there is one; then here.

    Args:
        problem: reference to what was sent.
        samples: at a time.
        settings: what workers take.
        here: computes what is not computed there.
        tell: is told, in a line, of a worker that is lost.
    """

    def __init__(
        self, problem: Any, samples: int, settings: Settings, here: Reference, tell: Callable[[str], None]
    ) -> None:
        actor: Any = ray.remote(_Multiplier)
        self._actor: Any = actor.options(**options_of(settings)).remote(problem, samples, settings)
        self._ready = self._actor.__ray_ready__.remote()
        self._here, self._tell = here, tell

    def multiply(self, vectors: Vector, weight: float, dtype: str = "float64", seed: int | None = None) -> Vector:
        """See `Reference`."""
        if self._actor is not None:
            try:
                ray.get(self._ready, timeout=PLACE_SECONDS)
                products: Vector = ray.get(self._actor.multiply.remote(vectors, weight, dtype, seed))
                return products
            except RayTaskError as error:
                raise error.cause from None
            except RayError as error:  # it is lost, or there is no place for it
                self._tell(f"no worker multiplies for the proof ({in_short(error)}): going on here")
                self.end()
        return self._here.multiply(vectors, weight, dtype, seed)

    def end(self) -> None:
        """Let the worker go."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
