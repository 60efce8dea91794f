"""The manifest of a run as an object in its output."""

from pipeline.errors import OutputError
from pipeline.planning.manifest import FORMAT, Manifest
from pipeline.storage.output import MANIFEST, Output


def write_manifest(output: Output, manifest: Manifest) -> None:
    """Put a manifest into the output."""
    # An empty one, left where the machine ends a moment later, would keep all later runs from the output.
    output.put(MANIFEST, manifest.to_bytes(), lasting=True)


def read_manifest(output: Output) -> Manifest | None:
    """Take the manifest from the output.

    Args:
        output: of a run.

    Returns:
        The manifest, None where there is none.

    Raises:
        OutputError: it cannot be read or understood.
    """
    data = output.get(MANIFEST)
    if data is None:
        return None
    try:
        return Manifest.model_validate_json(data)
    except ValueError as error:
        raise OutputError(
            f"output {output.url}: {MANIFEST} is not one of this version (format {FORMAT}): {error}"
        ) from None
