"""What was measured: costs of engines on real data, from which seconds are predicted."""

from dataclasses import dataclass

import numpy as np

from pipeline.planning.engine_traits import TRAITS


@dataclass(frozen=True)
class Measured:
    """One call of an engine: rows of one parameter, one micro-batch.

    Attributes:
        rows: rows computed.
        work: that is; see `work`.
        samples: in the micro-batch.
        seconds: wall time.
        flops: of matrix products and convolutions; 0 where they were not counted.
        peak_bytes: most bytes alive at once, of what the call allocated.
    """

    rows: int
    work: float
    samples: int
    seconds: float
    flops: int
    peak_bytes: int

    @property
    def seconds_per_row(self) -> float:
        """Seconds per row and sample."""
        return self.seconds / self.rows / self.samples

    @property
    def seconds_per_work(self) -> float:
        """Seconds per sample and what `work` counts."""
        return self.seconds / self.work / self.samples

    @property
    def flops_per_work(self) -> float:
        """FLOPs likewise."""
        return self.flops / self.work / self.samples


@dataclass(frozen=True)
class Timing:
    """Calls of an engine as workers make them: warm, a micro-batch each, with as many at work beside it.

    Attributes:
        call_seconds: of a call, whatever its rows and columns.
        first_cols: of calls that were timed, ascending.
        work_seconds: of what `work` counts, from each of these columns on.
    """

    call_seconds: float
    first_cols: tuple[int, ...]
    work_seconds: tuple[float, ...]

    def seconds(self, amount: float, first_col: int) -> float:
        """Predict what comes to the seconds of a call.

        Args:
            amount: of work, as `work` counts it.
            first_col: of the columns.

        Returns:
            Seconds; between columns that were timed they are taken to go straight.
        """
        return amount * float(np.interp(first_col, self.first_cols, self.work_seconds))


@dataclass(frozen=True)
class Finishing:
    """Seconds of what comes after the engines: for each entry of a tile, and for each object that is put."""

    entry_seconds: float
    chunk_seconds: float


def work(engine: str, rows: range, cols: range, symmetric: range) -> float:
    """Count what an engine does, in terms that its seconds are in proportion to.

    Args:
        engine: its name.
        rows: of one parameter.
        cols: of the tile, those below the diagonal too.
        symmetric: columns with which half of the entries are computed.

    Returns:
        Where the engine goes by units, entries at or right of the diagonal; else rows, as each is pulled back through
        the network, or less of it, as a whole.
    """
    right = range(max(cols.start, rows.start), cols.stop)
    if not TRAITS[engine].by_units or not right:
        return float(len(rows) * bool(right))
    below = max(min(rows.stop, right.stop) - right.start, 0) / 2
    twice = max(min(symmetric.stop, right.stop) - max(symmetric.start, right.start) - below, 0) / 2
    return len(rows) * (len(right) - below - twice)


@dataclass(frozen=True)
class AroundTiles:
    """Seconds of a run before its first tile and after its last.

    Attributes:
        planning: that it took.
        start: of workers, predicted.
        proof: predicted.
    """

    planning: float
    start: float
    proof: float
