"""What preflight and probe found and chose, for each parameter and engine: records of the manifest."""

from dataclasses import dataclass, replace

_STRICT = {"strict": True, "extra": "forbid"}  # read by pydantic, which a machine that only computes need not have


@dataclass(frozen=True)
class ParameterVerdict:
    """What preflight found about one parameter.

    Attributes:
        engine: the first that is right, or the faster of two that are.
        rival: another that is right, where only a measurement tells which is faster; the slower one, once it was made.
        gradient: relative error of it, against differences of the loss.
        differences: of double backward, against differences of the gradient.
        tried: by how much each engine is off, or what it raised; how long it took, where that was compared.
    """

    __pydantic_config__ = _STRICT

    engine: str
    rival: str | None
    gradient: float
    differences: float
    tried: dict[str, str]


@dataclass(frozen=True)
class PreflightVerdict:
    """What preflight found.

    Attributes:
        samples: looked at.
        contexts: what is set for the run.
        parameters: by name.
        asymmetry: of blocks and their mirror images, both computed.
        seconds: it took.
    """

    __pydantic_config__ = _STRICT

    samples: int
    contexts: list[str]
    parameters: dict[str, ParameterVerdict]
    asymmetry: float
    seconds: float

    @property
    def engines(self) -> dict[str, str]:
        """The engine of each parameter."""
        return {name: verdict.engine for name, verdict in self.parameters.items()}

    def led_by(self, engines: dict[str, str]) -> "PreflightVerdict":
        """Take, of two engines that are right, that which is the faster by others' measurement.

        Args:
            engines: by parameter, each of those that are right.

        Returns:
            The verdict with these.
        """
        led = {
            name: found if found.engine == engines[name] else replace(found, engine=engines[name], rival=found.engine)
            for name, found in self.parameters.items()
        }
        return replace(self, parameters=led)


@dataclass(frozen=True)
class EngineSizes:
    """Working sizes of one engine.

    Attributes:
        microbatch: samples at a time.
        row_group: rows at a time; units, of the factored engine.
    """

    __pydantic_config__ = _STRICT

    microbatch: int
    row_group: int

    def __post_init__(self) -> None:
        """Refuse sizes of nothing."""
        if self.microbatch < 1 or self.row_group < 1:
            raise ValueError(
                f"got a micro-batch of {self.microbatch} and a row group of {self.row_group}, expected 1 or more"
            )

    def halved(self, may_cut: bool) -> "EngineSizes | None":
        """Return the next smaller sizes; None where there are none.

        Args:
            may_cut: whether micro-batches may be made smaller.

        Returns:
            The sizes.
        """
        if self.row_group > 1:
            return EngineSizes(self.microbatch, self.row_group // 2)
        return EngineSizes(self.microbatch // 2, 1) if may_cut and self.microbatch > 1 else None
