"""Where log records go: warnings to the console, all of them to a file of JSON lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter
from rich.console import Console
from rich.logging import RichHandler

from pipeline.errors import OutputError, shown
from pipeline.urls import redacted

_FORMAT = "%(asctime)s %(levelname)s %(name)s %(process)d %(message)s"


class _Printable(logging.Formatter):
    """Leaves a terminal nothing to act on."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return shown(super().format(record), keep="\n")


class _Redacted(JsonFormatter):
    """Keeps no secrets of URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return redacted(super().format(record))


@contextmanager
def log_to(console: Console, file: Path | None = None) -> Iterator[None]:
    """Send this package's log records to a console and to a file, inside the context.

    Args:
        console: gets warnings and errors.
        file: gets all, appended, a JSON object a line, with the fields of each event.

    Raises:
        OutputError: the file cannot be written.
    """
    shown = RichHandler(logging.WARNING, console, show_path=False, show_level=False)
    shown.setFormatter(_Printable("%(message)s", "[%X]"))
    handlers: list[logging.Handler] = [shown]
    if file is not None:
        try:
            kept = logging.FileHandler(file)
        except OSError as error:
            raise OutputError(f"log {file}: {error.strerror}") from None
        kept.setFormatter(_Redacted(_FORMAT))
        handlers.append(kept)
    logger = logging.getLogger("pipeline")
    level = logger.level
    logger.setLevel(logging.DEBUG if file is not None else logging.WARNING)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
