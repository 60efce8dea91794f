"""The outputs below a URL."""

from collections.abc import Iterator
from typing import Any

from pipeline.runs.status import status
from pipeline.runs.sweep_table import TABLE
from pipeline.storage.output import LEASE, MANIFEST, Output

DEEPEST = 4  # folders below the one that is asked about


def list_outputs(url: str, endpoint_url: str | None = None) -> Iterator[dict[str, Any]]:
    """Find outputs below a URL; what lies in one is not searched.

    Args:
        url: a folder or a prefix.
        endpoint_url: of its server, where it is not the cloud's own.

    Yields:
        Of each its URL and what `status` says, in the order of names.

    Raises:
        OutputError: it cannot be listed.
    """
    top = Output(url, endpoint_url)
    top.check_readable()
    yield from _below(top, endpoint_url, DEEPEST)


def _below(output: Output, endpoint_url: str | None, depth: int) -> Iterator[dict[str, Any]]:
    there = output.below()
    is_planned = LEASE in there and TABLE not in there  # a sweep has a lease, too
    if MANIFEST in there or is_planned:
        yield {"url": output.url} | status(output.url, endpoint_url)
        return
    for name, is_folder in there.items() if depth else ():
        if is_folder and name != LEASE:
            yield from _below(Output(f"{output.url}/{name}", endpoint_url), endpoint_url, depth - 1)
