"""The page on the Hessians at many checkpoints: numbers over steps."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from pipeline.analysis.hessian import Hessian
from pipeline.analysis.pictures.canvas import new_figure, take
from pipeline.analysis.pictures.sweeps import draw_over_steps, draw_series
from pipeline.analysis.report.parts import Page, Part, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDS = 6  # eigenvalues: half of them from each end


@dataclass(frozen=True)
class Step:
    """A checkpoint.

    Attributes:
        name: its file's.
        loss: L.
        gradient_norm: |dL / dtheta|.
        trace: of H; NaN where it is not known.
        norm: of H; NaN where it is not known.
        blocks: Frobenius norms, by row and column parameter.
        hessian: where it is kept.
        worker_seconds: that it took.
    """

    name: str
    loss: float
    gradient_norm: float
    trace: float
    norm: float
    blocks: Mapping[tuple[str, str], float]
    hessian: Hessian | None
    worker_seconds: float


def loss_part(steps: Sequence[Step]) -> Part:
    """Draw loss and gradient."""
    return _series_part(
        steps, "loss", "Loss", {"loss": [s.loss for s in steps], "gradient's norm": [s.gradient_norm for s in steps]}
    )


def curvature_part(steps: Sequence[Step]) -> Part:
    """Draw trace and norm."""
    return _series_part(
        steps, "curvature", "Curvature", {"trace": [s.trace for s in steps], "Frobenius norm": [s.norm for s in steps]}
    )


def eigenvalues_part(steps: Sequence[Step]) -> Part:
    """Draw the outermost eigenvalues of the Hessians that are kept."""
    kept = [step for step in steps if step.hessian is not None and step.hessian.is_complete]
    if not kept:
        return Part("eigenvalues", "Top and bottom eigenvalues", ("No Hessian is kept, or none is complete.",))
    found = [_ends(step.hessian) for step in kept if step.hessian is not None]
    count = len(found[0])
    half = -(-count // 2)
    labels = [f"top {k + 1}" if k < half else f"bottom {count - k}" for k in range(count)]
    series = {label: [w[k] for w in found] for k, label in enumerate(labels)}
    named = list(series.items())
    with new_figure(10, 3.8) as figure:
        left, right = figure.subplots(1, 2)
        draw_series(left, places(kept), dict(named[:half]), "largest eigenvalues")
        draw_series(right, places(kept), dict(named[half:]) or dict(named), "smallest eigenvalues")
        _label(kept, left, right)
        picture = take(figure, "eigenvalues", f"The outermost eigenvalues at {len(kept)} checkpoints.")
    rows = ([step.name, *map(float, w)] for step, w in zip(kept, found, strict=True))
    table = Table.of(("checkpoint", *series), rows)
    text = "The largest and the smallest eigenvalues of the Hessians that are kept."
    return Part("eigenvalues", "Top and bottom eigenvalues", (text,), (picture,), table)


def blocks_part(steps: Sequence[Step]) -> Part:
    """Draw the norms of the parameters' own blocks."""
    names = list(dict.fromkeys(row for step in steps for row, col in step.blocks if row == col))
    values = np.array([[step.blocks.get((name, name), np.nan) for step in steps] for name in names])
    if not names:
        return Part("blocks", "Blocks", ("No block on the diagonal was computed whole.",))
    with new_figure(min(4.5 + 0.25 * len(steps), 12), min(2.2 + 0.22 * len(names), 14)) as figure:
        draw_over_steps(figure.add_subplot(), values, names, [step.name for step in steps], "Frobenius norm")
        picture = take(figure, "blocks", "Frobenius norm of each parameter's own block at each checkpoint.")
    changed = [
        (name, float(row[0]), float(row[-1]), float(row[-1] / row[0]) if row[0] else float("nan"))
        for name, row in zip(names, values, strict=True)
    ]
    return Part(
        "blocks",
        "Blocks",
        ("The norm of each parameter's own block at each checkpoint, on a logarithmic scale.",),
        (picture,),
        Table.of(("parameter", "first", "last", "last / first"), changed),
    )


PARTS: Mapping[str, Callable[[Sequence[Step]], Part]] = {
    "loss": loss_part,
    "curvature": curvature_part,
    "eigenvalues": eigenvalues_part,
    "blocks": blocks_part,
}


def sweep_page(steps: Sequence[Step], title: str, size: int, parts: Sequence[Part]) -> Page:
    """Put the page together.

    Args:
        steps: in order, at least one.
        title: what was computed.
        size: P.
        parts: its sections.

    Returns:
        The page.
    """
    first, last = steps[0], steps[-1]
    facts = [
        ("checkpoints", f"{len(steps):,}"),
        ("parameters P", f"{size:,}"),
        ("loss", f"{first.loss:.4g} to {last.loss:.4g}"),
        ("trace", f"{first.trace:.4g} to {last.trace:.4g}"),
        ("Hessians kept", f"{sum(step.hessian is not None for step in steps):,}"),
    ]
    return Page(title, f"The Hessian at {len(steps)} checkpoints, from {first.name} to {last.name}", facts, parts)


def places(steps: Sequence[Step]) -> list[float]:
    """Say where on the axis checkpoints lie: at the last number in their names where that ascends, else at 1, 2, ..."""
    numbers = [re.findall(r"\d+", step.name) for step in steps]
    found = [float(number[-1]) for number in numbers if number]
    if len(found) == len(steps) and all(a < b for a, b in pairwise(found)):
        return found
    return [float(k) for k in range(1, len(steps) + 1)]


def _series_part(steps: Sequence[Step], name: str, title: str, series: Mapping[str, Sequence[float]]) -> Part:
    with new_figure(10, 3.6) as figure:
        drawn = figure.subplots(1, len(series))
        for axes, (label, values) in zip(drawn, series.items(), strict=True):
            draw_series(axes, places(steps), {label: values}, label)
        _label(steps, *drawn)
        picture = take(figure, name, f"{' and '.join(series)} at {len(steps)} checkpoints.")
    rows = ([step.name, *values] for step, *values in zip(steps, *series.values(), strict=True))
    return Part(name, title, (), (picture,), Table.of(("checkpoint", *series), rows))


def _label(steps: Sequence[Step], *drawn: "Axes") -> None:
    counted = places(steps) == [float(k) for k in range(1, len(steps) + 1)]
    for axes in drawn:
        axes.set_xlabel("checkpoint" if counted else "step")


def _ends(hessian: Hessian) -> list[float]:
    w = hessian.eigsh(min(ENDS, hessian.shape[0]), "BE", return_eigenvectors=False)
    return [float(x) for x in w[::-1]]
