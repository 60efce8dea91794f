"""The manifest of a run as an object in its output, and the words that say how the run ended."""

from pydantic import BaseModel, ConfigDict, TypeAdapter

from pipeline.errors import OutputError, human_bytes
from pipeline.planning.manifest import FORMAT, Manifest
from pipeline.storage.output import MANIFEST, METADATA_BYTES, MOST_BYTES, NOTE_BYTES, SUCCESS, VERIFY, Output
from pipeline.storage.records import parsed, read_or_none


class _Proof(BaseModel):
    """What is read of the proof; people read the rest."""

    model_config = ConfigDict(strict=True)

    ok: bool


_MANIFEST, _PROOF = TypeAdapter(Manifest), TypeAdapter(_Proof)


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
