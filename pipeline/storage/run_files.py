"""The manifest of a run as an object in its output, and the words that say how the run ended."""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pipeline.errors import OutputError, human_bytes
from pipeline.planning.manifest import FORMAT, Manifest
from pipeline.storage.output import (
    FORECAST,
    MANIFEST,
    METADATA_BYTES,
    MOST_BYTES,
    NOTE_BYTES,
    SUCCESS,
    VERIFY,
    Output,
)
from pipeline.storage.records import parsed, read_or_none


class _Proof(BaseModel):
    """What is read of the proof; people read the rest."""

    model_config = ConfigDict(strict=True)

    ok: bool


_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Forecast:
    """What was planned, kept to be compared with what it came to.

    Attributes:
        memory_bytes: of a worker at its peak.
        allowed_bytes: for one.
        tile_seconds: of all tiles, on the workers that were there.
    """

    __pydantic_config__ = ConfigDict(strict=True)

    memory_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    allowed_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    tile_seconds: _Amount


class _Success(BaseModel):
    """What the mark of a finished run says of the call that finished it; nothing, in older ones."""

    model_config = ConfigDict(strict=True)

    seconds: dict[str, _Amount] = {}


_MANIFEST, _PROOF = TypeAdapter(Manifest), TypeAdapter(_Proof)
_FORECAST, _SUCCESS = TypeAdapter(Forecast), TypeAdapter(_Success)


def write_forecast(output: Output, forecast: Forecast) -> None:
    """Put what was planned into the output."""
    output.put(FORECAST, json.dumps(asdict(forecast)).encode())


def read_forecast(output: Output) -> Forecast | None:
    """Read what was planned; None where nobody wrote it down, or it cannot be understood."""
    return read_or_none(output, FORECAST, _FORECAST, NOTE_BYTES)


def read_seconds(output: Output) -> dict[str, float]:
    """Read how long planning, tiles and verifying took in the call that finished the run; empty if that is not told."""
    told = read_or_none(output, SUCCESS, _SUCCESS, NOTE_BYTES)
    return told.seconds if told else {}


def write_manifest(output: Output, manifest: Manifest) -> None:
    """Put a manifest into the output.

    Args:
        output: of the run.
        manifest: of it.

    Raises:
        OutputError: it cannot be written, or would not be read back.
    """
    data = manifest.to_bytes()
    if len(data) > METADATA_BYTES:
        raise OutputError(
            f"output {output.url}: {MANIFEST} would have {human_bytes(len(data))}, expected at most "
            f"{human_bytes(METADATA_BYTES)}: select fewer parameters or blocks"
        )
    # An empty one, left where the machine ends a moment later, would keep all later runs from the output.
    output.put(MANIFEST, data, lasting=True)


def read_manifest(output: Output) -> Manifest | None:
    """Take the manifest from the output.

    Args:
        output: of a run.

    Returns:
        The manifest, None where there is none.

    Raises:
        OutputError: it cannot be read or understood.
    """
    data = output.get(MANIFEST, METADATA_BYTES)
    if data is None:
        return None
    try:
        return parsed(_MANIFEST, data)
    except ValueError as error:
        raise OutputError(
            f"output {output.url}: {MANIFEST} is not one of this version (format {FORMAT}): {error}"
        ) from None


def is_finished(output: Output) -> bool:
    """Whether a run went to its end there."""
    return output.get(SUCCESS, NOTE_BYTES) is not None


def read_proof(output: Output) -> bool | None:
    """Return what the proof of an output found.

    Args:
        output: of a run.

    Returns:
        Whether it was proven; None where there is no proof, or none that can be understood.
    """
    proof = read_or_none(output, VERIFY, _PROOF, MOST_BYTES)
    return None if proof is None else proof.ok


def open_run(url: str, endpoint_url: str | None = None) -> tuple[Output, Manifest]:
    """Open an output that holds a run, finished or not.

    Args:
        url: the output.
        endpoint_url: of its server, where it is not the cloud's own.

    Returns:
        The output, and its manifest.

    Raises:
        OutputError: there is no run.
    """
    output = Output(url, endpoint_url)
    output.check_readable()
    manifest = read_manifest(output)
    if manifest is None:
        raise OutputError(f"output {url}: holds no Hessian (no {MANIFEST})")
    return output, manifest
