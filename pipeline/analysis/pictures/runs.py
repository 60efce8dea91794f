"""Where a run's time and memory went."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.analysis.pictures.canvas import NEGATIVE, POSITIVE, THIRD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMED = 48  # workers
RASTERIZED_FROM = 1000  # tiles: more of them make a large file of lines


@dataclass(frozen=True)
class Span:
    """When a tile was computed, and when it was written, in seconds of the run."""

    worker: int
    start: float
    compute_seconds: float
    write_seconds: float
    repeated: bool


def draw_timeline(axes: "Axes", spans: Sequence[Span], workers: Sequence[str]) -> None:
    """Draw tiles by worker over time; tiles that an earlier worker had lost are hatched."""
    raster = len(spans) > RASTERIZED_FROM
    kinds = (
        ("computing", POSITIVE, "", [(s.worker, s.start, s.compute_seconds) for s in spans if not s.repeated]),
        (
            "computing what was lost",
            NEGATIVE,
            "////",
            [(s.worker, s.start, s.compute_seconds) for s in spans if s.repeated],
        ),
        ("writing", THIRD, "", [(s.worker, s.start + s.compute_seconds, s.write_seconds) for s in spans]),
    )
    for label, ink, hatch, bars in kinds:
        if bars:
            rows, starts, lengths = zip(*bars, strict=True)
            height = 0.25 if label == "writing" else 0.7
            axes.barh(
                rows, lengths, height, starts, color=ink, hatch=hatch, edgecolor="white", linewidth=0.3, label=label,
                rasterized=raster,
            )  # fmt: skip
    if len(workers) <= MOST_NAMED:
        axes.set_yticks(range(len(workers)), workers, parse_math=False)
    axes.set(xlabel="seconds since the first tile began", ylim=(len(workers) - 0.5, -0.5))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def draw_memory(axes: "Axes", peaks: Sequence[float], workers: Sequence[str], planned: float | None) -> None:
    """Draw the most that each worker held, in MB, beside what was planned."""
    axes.barh(range(len(peaks)), peaks, 0.7, color=POSITIVE, label="held at most")
    if planned is not None:
        axes.axvline(planned, color=NEGATIVE, linestyle="--", linewidth=1.5, label="planned")
    if len(workers) <= MOST_NAMED:
        axes.set_yticks(range(len(workers)), workers, parse_math=False)
    axes.set(xlabel="MB", xlim=(0, 1.1 * max([*peaks, planned or 0, 1])), ylim=(len(peaks) - 0.5, -0.5))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
