"""Progress on standard error: a bar where there is a terminal or a notebook, else a line now and then."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.errors import human_bytes, human_seconds, shown
from pipeline.progress import Reporter

LINE_SECONDS = 10.0


def for_a_person(*, wanted: bool) -> Reporter:
    """Return a reporter on standard error where somebody looks, on a terminal or in a notebook; else a silent one.

    Args:
        wanted: whether there is to be any.
    """
    console = Console(stderr=True)
    return ConsoleReporter(console) if wanted and (console.is_terminal or console.is_jupyter) else Reporter()


class ConsoleReporter(Reporter):
    """Writes to a console.

    Args:
        console: on standard error, as a rule.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: tuple[Progress, TaskID] | None = None
        self._total = self._done = self._before = self._bytes = 0
        self._unit = "tiles"
        self._start = self._last = 0.0

    def say(self, text: str) -> None:
        """Print a step."""
        self._console.print(Text(shown(text)), soft_wrap=True)

    @contextmanager
    def tiles(self, total: int, done: int, unit: str = "tiles") -> Iterator[Reporter]:
        """Show a bar, or print lines."""
        self._total, self._done, self._before, self._bytes, self._unit = total, done, done, 0, unit
        self._start = self._last = time.monotonic()
        if not (self._console.is_terminal or (self._console.is_jupyter and find_spec("ipywidgets"))):
            yield self
            self._line()
            return
        columns = (
            TextColumn(unit),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as bar:
            self._bar = bar, bar.add_task(unit, total=total, completed=done, rate="")
            try:
                yield self
            finally:
                self._bar = None

    def advance(self, tile_bytes: int) -> None:
        """Count one."""
        self._done += 1
        self._bytes += tile_bytes
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            self._line()

    def _rate(self) -> str:
        return f"{human_bytes(self._bytes / max(time.monotonic() - self._start, 1e-9))}/s"

    def _line(self) -> None:
        """Print counts, rate and the time left."""
        new = self._done - self._before
        seconds = (time.monotonic() - self._start) / max(new, 1) * (self._total - self._done)
        left = f", {human_seconds(seconds)} left" if new and self._done < self._total else ""
        self.say(f"{self._unit} {self._done}/{self._total}, {self._rate()}{left}")
