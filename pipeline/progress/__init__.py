"""What a run tells while it goes on, and the bar that shows it.

In come steps and finished tiles; out go lines, or nothing. Everything may tell; only the command and the calls of a
person show.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class Reporter:
    """What a run tells while it goes on; this one says nothing."""

    def say(self, text: str) -> None:  # noqa: ARG002
        """Report a step."""
        return

    @contextmanager
    def tiles(self, total: int, done: int, unit: str = "tiles") -> Iterator["Reporter"]:  # noqa: ARG002
        """Report on tiles, or other units, inside the context, of which some were done before."""
        yield self

    def advance(self, tile_bytes: int) -> None:  # noqa: ARG002
        """Report a finished one."""
        return
